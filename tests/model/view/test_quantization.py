"""Quantized models by the libraries that make them: `generate`'s tokens, and not one byte of weights more."""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.packed_linear import pack_linears
from support.storages import storages
from support.tiny_models import greedy_alone, ragged_prompts, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.view.model_view import make_view
from hf_async_batching.model.view.quantization import is_quantized

PROMPTS = ragged_prompts(4, 20, seed=5)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
KINDS = {
    "torchao int8 weights": "torchao",
    "torchao int8 weights and activations": "torchao",
    "quanto int8": "optimum.quanto",
    "quanto int4": "optimum.quanto",
    "bitsandbytes int8": "bitsandbytes",
    "bitsandbytes fp4": "bitsandbytes",
    "bitsandbytes nf4, scales quantized too": "bitsandbytes",
    "packed buffers": "torch",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("Llama").save_pretrained(folder)
    return folder


@pytest.fixture
def _quanto_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpack integers of a few bits in torch: quanto's C++ takes a minute to compile, into the installed package.

    The compiler's lock in that folder outlives a killed process, and every later process would wait for it for ever.
    """
    pytest.importorskip("optimum.quanto")

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])

    extension = SimpleNamespace(lib=SimpleNamespace(unpack=unpack))
    monkeypatch.setattr("optimum.quanto.library.extensions.cpp.ext", extension)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, checkpoint: Path) -> Any:
    kind = request.param
    if kind.startswith("quanto"):
        request.getfixturevalue("_quanto_in_python")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(KINDS[kind])
        except ImportError:
            pytest.skip(f"{KINDS[kind]} is not installed")
        return quantized(kind, checkpoint)


def quantized(kind: str, checkpoint: Path) -> Any:
    if kind == "packed buffers":
        model = tiny_model("Llama")
        pack_linears(model)
        return model
    half = {"bnb_4bit_compute_dtype": torch.float32}
    if kind.startswith("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

        config = Int8DynamicActivationInt8WeightConfig if "activations" in kind else Int8WeightOnlyConfig
        arguments: dict[str, Any] = {"quantization_config": TorchAoConfig(config())}
    elif kind.startswith("quanto"):
        arguments = {"quantization_config": QuantoConfig(weights=kind.split()[1])}
    elif kind == "bitsandbytes int8":
        arguments = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    else:
        double = "scales" in kind
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4" if double else "fp4",
            bnb_4bit_use_double_quant=double,
            **half,
        )
        arguments = {"quantization_config": settings, "device_map": "cpu"}
    made = AutoModelForCausalLM.from_pretrained(checkpoint, **arguments).eval()
    for module in made.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On processors that multiply bfloat16 themselves 4-bit layers pack themselves anew in their first forward,
            # with scales in bfloat16, and fail where an input is no multiple of 64.
            module.support_avx512bf16_for_cpu = False
    return made


def attributes_of(model: Any) -> list[tuple[str, Any]]:
    """Where all memory lies, and what hangs on parameters and state objects, by identity."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found.append((f"{name}.{key}", id(value)))
        state = getattr(module, "state", None)
        found.append((f"{name} state", sorted((k, id(v)) for k, v in vars(state).items()) if state else None))
    for name, parameter in model.named_parameters():
        attributes = sorted((key, id(value)) for key, value in vars(parameter).items())
        found.append((name, (id(parameter), attributes)))
        quant_state = getattr(parameter, "quant_state", None)
        found.append(
            (f"{name} quant_state", sorted((k, id(v)) for k, v in vars(quant_state).items()) if quant_state else 0)
        )
    return found


def assert_generated(model: Any, got: list[list[int]]) -> None:
    """`generate`'s tokens; where activations are quantized, too, up to what a step of that quantization changes."""
    for prompt, tokens in zip(PROMPTS, got, strict=True):
        if tokens == greedy_alone(model, prompt, 6, eos_token_id=None):
            continue
        assert quantizes_activations(model), f"{tokens} for {prompt}"
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        gap = logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert (gap <= 0.05 * logits.abs().amax(-1)).all(), f"{gap} for {prompt}"


def quantizes_activations(model: Any) -> bool:
    layer = model.model.layers[0].mlp.up_proj
    return type(layer).__name__ == "Linear8bitLt" or getattr(layer.weight, "act_quant_kwargs", None) is not None


@pytest.mark.filterwarnings("ignore")
def test_the_same_tokens_the_same_memory_and_an_untouched_model(model: Any) -> None:
    # Nobody has run the model yet: layers that prepare themselves in their first forward must not do it by the view.
    memory, before = storages(model), attributes_of(model)
    with GenerationManager(model, BatchingConfig(page_size=16, max_batch_tokens=64)) as manager:
        got = [manager.submit(prompt, **GREEDY) for prompt in PROMPTS]
        got = [handle.result(120).token_ids for handle in got]
        assert manager.assembly is not None
        assert storages(manager.assembly.forward.view).keys() <= memory.keys(), "weights in the view alone"
    assert storages(model) == memory
    assert attributes_of(model) == before
    assert_generated(model, got)
    # And once more, after the model has run its own forward, and asked to fuse what cannot be fused.
    config = BatchingConfig(page_size=16, max_batch_tokens=64, fuse_weights=True)
    with GenerationManager(model, config) as manager:
        handles = [manager.submit(prompt, **GREEDY) for prompt in PROMPTS]
        assert_generated(model, [handle.result(120).token_ids for handle in handles])
        assert manager.assembly is not None
        assert not manager.assembly.forward.packed_groups
    assert is_quantized(model) or model.model.layers[0].mlp.up_proj.__class__.__name__ == "PackedLinear"


def test_tensors_are_shared_wherever_they_hang() -> None:
    class State:
        __slots__ = ("scale",)

        def __init__(self) -> None:
            self.scale = torch.ones(3)

    model = tiny_model("Llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.state, layer.table = State(), {"codes": [torch.arange(4), (torch.zeros(2).requires_grad_() * 2,)]}
    layer.weight.quant_state = State()
    model.model.layers[1].mlp.up_proj.state = layer.state
    view = make_view(model, None)
    copied = view.model.layers[0].mlp.up_proj
    assert copied.state is not layer.state
    assert copied.state is view.model.layers[1].mlp.up_proj.state
    assert copied.state.scale is layer.state.scale
    assert copied.table is not layer.table
    assert copied.table["codes"][0] is layer.table["codes"][0]
    assert copied.table["codes"][1][0] is layer.table["codes"][1][0]
    assert storages(view) == storages(model)


@pytest.mark.filterwarnings("ignore")
def test_the_log_names_quantized_layers_that_run_their_own_forward_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hf_async_batching.model.forward.packed_forward._told", set())
    model = tiny_model("Llama")
    pack_linears(model)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            PackedForward(model, fused=True)
    told = [record.getMessage() for record in caplog.records if "run their own forward" in record.getMessage()]
    assert told == [
        "LlamaForCausalLM: layers of PackedLinear run their own forward: our kernels do not read their weights here"
    ]
