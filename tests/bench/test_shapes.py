"""Random models of real shapes."""

from __future__ import annotations

import pytest
import torch
import transformers

from hf_async_batching.bench.shapes import SHAPES, random_model

# Parameters of the released models, tied embeddings counted once.
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("shape", PARAMETERS)
def test_shapes_have_the_size_of_the_real_models(shape: str) -> None:
    config = getattr(transformers, SHAPES[shape].config)(**SHAPES[shape].fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[shape]


def test_weights_follow_from_the_seed_and_leak_nothing() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (random_model("tiny", torch.device("cpu"), torch.float32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected), "the caller's generator was touched"
    weights = [model.state_dict()["model.layers.1.mlp.up_proj.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_model_that_nothing_stops() -> None:
    model = random_model("tiny", torch.device("cpu"), torch.bfloat16, num_hidden_layers=1)
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert len(model.model.layers) == 1
    assert model.config.eos_token_id is None
    assert model.generation_config.eos_token_id is None


def test_an_unknown_shape() -> None:
    with pytest.raises(ValueError, match=r"no shape 'huge'; choose one of llama-3\.1-8b"):
        random_model("huge", torch.device("cpu"), torch.float32)
