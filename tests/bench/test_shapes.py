"""Random models of real shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from support.small_shapes import small

from hf_async_batching.bench.shapes import SHAPES, random_model, shape_config
from hf_async_batching.experts.mxfp4 import dequantize
from hf_async_batching.experts.mxfp4_model import Mxfp4Experts
from hf_async_batching.model.view.quantization import adjust, is_quantized

CPU = torch.device("cpu")

# Parameters of the released models, tied embeddings counted once; of multimodal ones, the text model's.
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3.5-9b": 8_953_803_264,
    "gemma-3-12b": 11_766_034_176,
    "gpt-oss-20b": 20_914_757_184,
    "deepseek-v2-lite": 15_706_484_224,
    "lfm2-8b-a1b": 8_339_929_856,
    "granite-4-h-tiny": 6_939_037_248,
    "nemotron-h-8b": 8_100_852_736,
    "smollm2-135m": 134_515_008,
}

KINDS = {
    "qwen3.5-9b": {"linear_attention": 24, "full_attention": 8},
    "gemma-3-12b": {"sliding_attention": 40, "full_attention": 8},
    "gpt-oss-20b": {"sliding_attention": 12, "full_attention": 12},
    "lfm2-8b-a1b": {"conv": 18, "full_attention": 6},
    "granite-4-h-tiny": {"linear_attention": 36, "full_attention": 4},
    "nemotron-h-8b": {"linear_attention": 24, "mlp": 24, "full_attention": 4},
}

# A shape of each model class.
CLASSES = {shape.config: name for name, shape in SHAPES.items() if name in PARAMETERS}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", PARAMETERS)
def test_shapes_have_the_size_of_the_real_models(shape: str) -> None:
    config = shape_config(shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[shape]
    # Nothing of size is made in float32 first.
    assert {parameter.dtype for parameter in model.parameters() if parameter.numel() > 1e6} == {torch.bfloat16}


@pytest.mark.parametrize("shape", KINDS)
def test_shapes_have_the_layers_of_the_real_models(shape: str) -> None:
    config = shape_config(shape)
    kinds = Counter(config.layer_types)
    assert kinds == KINDS[shape]
    assert config.num_hidden_layers == kinds.total()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("shape", CLASSES.values())
def test_everything_is_drawn(shape: str, quantize: str | None) -> None:
    if quantize:
        pytest.importorskip("bitsandbytes")
    model = random_model(shape, CPU, torch.float32, quantize=quantize, **small(shape))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device == CPU, name
        assert torch.isfinite(tensor).all(), name
    assert is_quantized(model) == bool(quantize)
    torch.use_deterministic_algorithms(False)
    for module in model.modules():
        adjust(module)  # for some CPUs, bitsandbytes packs 4-bit weights anew, where their sizes allow it
    with torch.no_grad():
        logits = model(torch.arange(1, 9)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


@pytest.mark.parametrize("shape", ["qwen3-4b", "qwen3-8b"])
def test_quantized_layers_are_those_that_transformers_quantizes(shape: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model: Any = random_model(shape, CPU, torch.bfloat16, quantize="nf4", **small(shape))
    layer = model.model.layers[1].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert layer.weight.quant_state.quant_type == "nf4"
    assert not layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.bfloat16
    drawn = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert 0.015 < drawn.float().std() < 0.025
    # As in transformers, the output layer is not quantized, and is the embedding where the model ties them.
    assert type(model.lm_head) is torch.nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (shape == "qwen3-4b")
    assert model.is_loaded_in_4bit
    assert model.hf_quantizer.quantization_config is model.config.quantization_config


def test_experts_in_mxfp4_are_drawn_as_bytes() -> None:
    sizes = {**small("gpt-oss-20b"), "intermediate_size": 64}
    model: Any = random_model("gpt-oss-20b", CPU, torch.bfloat16, quantize="mxfp4", **sizes)
    assert not is_quantized(model), "unpacked weights are exact, and no activation is rounded"
    experts = model.model.layers[1].mlp.experts
    assert type(experts) is Mxfp4Experts
    weight = dequantize(experts.down_proj_blocks, experts.down_proj_scales, torch.float32)
    assert 0.01 < weight.std() < 0.04
    assert experts.down_proj_bias.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.config.quantization_config.to_dict()["quant_method"] == "mxfp4"
    again: Any = random_model("gpt-oss-20b", CPU, torch.bfloat16, quantize="mxfp4", **sizes)
    assert again.model.layers[1].mlp.experts.down_proj_blocks.equal(experts.down_proj_blocks)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(1, 9)[None]).logits).all()


def test_mxfp4_is_for_gpt_oss() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts of gpt-oss"):
        random_model("tiny", CPU, torch.bfloat16, quantize="mxfp4")


def test_fewer_layers_are_some_of_each_kind() -> None:
    def kinds(shape: str, layers: int) -> list[str]:
        config = shape_config(shape, num_hidden_layers=layers)
        assert config.num_hidden_layers == layers
        return list(config.layer_types)

    assert kinds("qwen3.5-9b", 5) == [*["linear_attention"] * 3, "full_attention", "linear_attention"]
    assert kinds("qwen3.5-9b", 2) == ["linear_attention", "full_attention"]
    assert kinds("nemotron-h-8b", 4) == ["linear_attention", "mlp", "linear_attention", "full_attention"]
    assert kinds("gemma-3-12b", 1) == ["sliding_attention"]
    assert shape_config("lfm2-8b-a1b", num_hidden_layers=2).num_dense_layers == 1
    assert shape_config("deepseek-v2-lite", num_hidden_layers=1).first_k_dense_replace == 0
    with pytest.raises(ValueError, match="'qwen3-8b' has 36 layers: choose 1 to 36, not 37"):
        shape_config("qwen3-8b", num_hidden_layers=37)


def test_weights_follow_from_the_seed_and_leak_nothing() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (random_model("tiny", CPU, torch.float32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected), "the caller's generator was touched"
    weights = [model.state_dict()["model.layers.1.mlp.up_proj.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_model_that_nothing_stops() -> None:
    model = random_model("tiny", CPU, torch.bfloat16, num_hidden_layers=1)
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert len(model.model.layers) == 1
    assert model.config.eos_token_id is None
    assert model.generation_config.eos_token_id is None


def test_blocks_of_8_bit_floats() -> None:
    model: Any = random_model("tiny", CPU, torch.bfloat16, quantize="fp8", hidden_size=256, intermediate_size=384)
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer).__name__ == "FP8Linear"
    assert (layer.weight.dtype, layer.weight_scale_inv.shape) == (torch.float8_e4m3fn, (3, 2))
    assert layer.weight.float().std() > 0.5 and len(layer.weight_scale_inv.unique()) == 6
    assert type(model.lm_head) is torch.nn.Linear
    assert is_quantized(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor.float()).all(), name


def test_an_unknown_shape() -> None:
    with pytest.raises(ValueError, match=r"no shape 'huge'; choose one of llama-3\.1-8b"):
        random_model("huge", CPU, torch.float32)


def test_an_unknown_quantization() -> None:
    with pytest.raises(ValueError, match="no quantization 'q8'; choose one of nf4, fp8"):
        random_model("tiny", CPU, torch.float32, quantize="q8")


@pytest.mark.parametrize("missing", ["config", "model"])
def test_a_transformers_without_the_model(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # "CLIPTextConfig" is a config that no causal language model has.
    name = {"config": "FutureConfig", "model": "CLIPTextConfig"}[missing]
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["tiny"]._replace(config=name))
    with pytest.raises(ValueError, match=f"'tiny' needs a transformers whose causal language models include {name}"):
        random_model("tiny", CPU, torch.float32)


def test_quantizing_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="nf4 weights need bitsandbytes: pip install bitsandbytes"):
        random_model("tiny", CPU, torch.float32, quantize="nf4")
