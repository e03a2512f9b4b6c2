"""gpt-oss whose experts stay in MXFP4: loaded by `keep_mxfp4`, computed as transformers computes unpacked weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.mxfp4_checkpoint import pack, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, PreTrainedModel
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.experts import hf_interface
from hf_async_batching.experts.hf_interface import use_kernels
from hf_async_batching.experts.mxfp4 import dequantize
from hf_async_batching.experts.mxfp4_model import METHOD, Mxfp4Experts, keep_mxfp4
from hf_async_batching.experts.recognise import idle_bytes
from hf_async_batching.model.view.model_view import make_view

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpt-oss")
    write_checkpoint(made)
    return made


def packed_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM
    loaded: PreTrainedModel = model.from_pretrained(folder, config=keep_mxfp4(folder), dtype=dtype)
    return loaded.to(DEVICE).eval()


def unpacked_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As transformers unpacks the checkpoint."""
    model: Any = AutoModelForCausalLM
    loaded: PreTrainedModel = model.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype, experts_implementation="eager"
    )
    for parameter in loaded.parameters():
        parameter.data = parameter.data.to(dtype)  # transformers 5.17 always unpacks to bfloat16, which is exact
    return loaded.to(DEVICE).eval()


def experts_of(model: Any) -> list[Mxfp4Experts]:
    return [module for module in model.modules() if isinstance(module, Mxfp4Experts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_plain_forward_equals_that_of_unpacked_weights(folder: Path, dtype: torch.dtype) -> None:
    ours, theirs = packed_model(folder, dtype), unpacked_model(folder, dtype)
    layers: Any = (ours.model.layers, theirs.model.layers)
    for mine, other in zip(*layers, strict=True):
        blocks, scales = mine.mlp.experts.gate_up_proj_blocks, mine.mlp.experts.gate_up_proj_scales
        assert dequantize(blocks, scales, dtype).transpose(1, 2).equal(other.mlp.experts.gate_up_proj)
    ids = torch.randint(0, ours.config.vocab_size, (2, 9), device=DEVICE)
    assert ours(ids).logits.equal(theirs(ids).logits)
    assert ours.generate(ids, max_new_tokens=6, do_sample=False).equal(
        theirs.generate(ids, max_new_tokens=6, do_sample=False)
    )


def test_the_parameters_are_the_checkpoints_tensors(folder: Path) -> None:
    model = packed_model(folder, torch.bfloat16)
    module = experts_of(model)[0]
    shapes = {name: (tuple(one.shape), one.dtype) for name, one in module.named_parameters()}
    assert shapes == {
        "gate_up_proj_blocks": ((6, 192, 2, 16), torch.uint8),
        "gate_up_proj_scales": ((6, 192, 2), torch.uint8),
        "gate_up_proj_bias": ((6, 192), torch.bfloat16),
        "down_proj_blocks": ((6, 64, 3, 16), torch.uint8),
        "down_proj_scales": ((6, 64, 3), torch.uint8),
        "down_proj_bias": ((6, 64), torch.bfloat16),
    }


@torch.no_grad()
def test_a_saved_model_is_a_checkpoint_in_mxfp4(folder: Path, tmp_path: Path) -> None:
    model = packed_model(folder)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["quant_method"] == "mxfp4"
    ids = torch.tensor([[1, 2, 3]], device=DEVICE)
    assert unpacked_model(tmp_path)(ids).logits.equal(model(ids).logits)


def test_experts_that_a_token_does_not_choose_are_idle(folder: Path) -> None:
    model = packed_model(folder)
    held = sum(parameter.nbytes for module in experts_of(model) for parameter in module.parameters())
    assert idle_bytes(model) == int(held * (1 - model.config.num_experts_per_tok / 6))


def test_modules_that_the_checkpoint_excludes_stay(folder: Path) -> None:
    config = keep_mxfp4(folder)
    config.quantization_config["modules_to_not_convert"] = ["model.layers.0.mlp.experts"]
    model: Any = AutoModelForCausalLM
    loaded = model.from_pretrained(folder, config=config)
    assert len(experts_of(loaded)) == config.num_hidden_layers - 1


def test_keep_mxfp4_refuses_other_checkpoints(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    kept = keep_mxfp4(config)
    assert kept.quantization_config["quant_method"] == METHOD
    assert config.quantization_config["quant_method"] == "mxfp4", "the config that was given stays as it is"
    assert keep_mxfp4(kept).quantization_config == kept.quantization_config
    for change in ({"quantization_config": {"quant_method": "fp8"}}, {"model_type": "llama"}):
        other = AutoConfig.from_pretrained(folder)
        for name, value in change.items():
            setattr(other, name, value)
        with pytest.raises(ValueError, match="keep_mxfp4 is for gpt-oss"):
            keep_mxfp4(other)
    del config.quantization_config
    with pytest.raises(ValueError, match="quantized: None"):
        keep_mxfp4(config)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kernels run on the CPU, in the interpreter; the numbers of tokens of all calls."""
    pytest.importorskip("triton")
    from hf_async_batching.experts import triton_experts

    original = triton_experts.experts_by_kernel
    seen: list[int] = []

    def counted(hidden: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(hidden.shape[0])
        return original(hidden, *rest, **options)

    monkeypatch.setattr(triton_experts, "experts_by_kernel", counted)
    monkeypatch.setattr(hf_interface, "runs_triton", lambda device: device.type == DEVICE.type)
    monkeypatch.setattr(hf_interface, "_compared", {})
    monkeypatch.setattr(hf_interface, "_COMPARED_TOKENS", (1, 6))
    monkeypatch.setattr(hf_interface, "_COMPARED_PACKED", 7)
    monkeypatch.setattr(hf_interface, "first_tokens", lambda *_, **__: [1])
    return seen


def served(model: PreTrainedModel) -> list[list[int]]:
    # The interpreter is slow, and a captured step would call nothing.
    config = BatchingConfig(max_rows=4, attach_check=False, compile=False, cuda_graphs=False)
    with GenerationManager(model, config) as manager:
        handles = [manager.submit(ids, max_new_tokens=3, do_sample=False) for ids in PROMPTS]
        return [handle.result().token_ids for handle in handles]


def generated(model: Any) -> list[list[int]]:
    return [
        model.generate(torch.tensor([ids], device=DEVICE), max_new_tokens=3, do_sample=False)[0, len(ids) :].tolist()
        for ids in PROMPTS
    ]


def test_tokens_equal_those_of_generate_with_unpacked_weights(folder: Path, calls: list[int]) -> None:
    model = packed_model(folder)
    tokens = served(model)
    assert calls[:3] == [1, 6, 7], "compared when the model was attached"
    assert len(calls) >= 3 + 3 * len(experts_of(model))
    assert tokens == generated(unpacked_model(folder)) == generated(model)
    assert all(module._engine_experts is None for module in experts_of(model)), "the user's model stays as it is"


@torch.inference_mode()
def test_compiled_code_calls_the_operator(folder: Path, calls: list[int]) -> None:
    view = make_view(packed_model(folder), None)
    assert use_kernels(view) == len(experts_of(view))
    module = experts_of(view)[0]
    given = torch.randn(3, 64, device=DEVICE), torch.tensor([[0, 1], [5, 2], [3, 0]], device=DEVICE), torch.rand(3, 2)
    want = module(*given[:2], given[2].to(DEVICE))
    calls.clear()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert compiled(*given[:2], given[2].to(DEVICE)).equal(want)
    assert calls == [3]


def test_without_kernels_the_engine_calls_the_plain_forward(folder: Path) -> None:
    model = packed_model(folder)
    assert served(model) == generated(model)


def test_scales_that_the_kernels_do_not_read_keep_the_plain_forward(folder: Path, calls: list[int]) -> None:
    model = packed_model(folder)
    first, *others = experts_of(make_view(model, None))
    first.down_proj_scales[0, 0, 0] = 129
    view = make_view(model, None)
    assert use_kernels(view) == len(others)
    assert [module._engine_form is not None for module in experts_of(view)] == [False] + [True] * len(others)


def test_weights_of_another_kind_keep_the_plain_forward(folder: Path, calls: list[int]) -> None:
    for name, change in (
        ("down_proj_bias", lambda one: one.double()),
        ("gate_up_proj_bias", lambda one: one.bfloat16()),
        ("down_proj_scales", lambda one: one.int()),
        ("down_proj_blocks", lambda one: one.flatten(2)),
        ("gate_up_proj_blocks", lambda one: one.transpose(0, 1).contiguous().transpose(0, 1)),
    ):
        view = make_view(packed_model(folder), None)
        module = experts_of(view)[0]
        changed = torch.nn.Parameter(change(getattr(module, name)), requires_grad=False)  # type: ignore[no-untyped-call]
        setattr(module, name, changed)
        assert hf_interface.form_of(module) is None, name


def test_the_layout_of_the_hubs_kernels_is_told_once(
    folder: Path, calls: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    hf_interface._tell_of_hub_kernels.cache_clear()
    for _ in range(2):
        view: Any = make_view(packed_model(folder), None)
        view.model.layers[0].mlp.experts = Mxfp4GptOssExperts(view.config)  # type: ignore[no-untyped-call]
        assert use_kernels(view) == 1
    assert caplog.text.count("layout of the Hub's MXFP4 kernels") == 1


def test_the_packer_rounds_to_the_nearest() -> None:
    weight = torch.randn(5, 64) * torch.tensor([1e-3, 0.1, 1.0, 3.0, 0.0])[:, None]
    blocks, scales = pack(weight)
    assert blocks.shape == (5, 2, 16)
    back = dequantize(blocks, scales, torch.float32)
    largest = weight.unflatten(-1, (2, 32)).abs().amax(-1, keepdim=True)
    assert ((back - weight).unflatten(-1, (2, 32)).abs() <= largest / 4 + 1e-12).all()
    assert dequantize(*pack(back), torch.float32).equal(back)
