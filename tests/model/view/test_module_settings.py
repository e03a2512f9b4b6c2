"""Numbers, flags and functions in modules and configs: noticed when they change, and not when nothing has."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from support.tiny_models import FAMILIES, greedy_alone, ragged_prompts, tiny_model
from torch import nn
from transformers import PreTrainedConfig

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.coverage import families
from hf_async_batching.model.view.module_settings import config_settings, module_settings
from hf_async_batching.model.view.snapshot import ModelSnapshot

PROMPTS = ragged_prompts(4, 30, seed=5)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
CONFIG = BatchingConfig(page_size=16, max_batch_tokens=64, debug=True)


def served(manager: GenerationManager) -> list[list[int]]:
    handles = [manager.submit(prompt, **GREEDY) for prompt in PROMPTS]
    return [handle.result(60).token_ids for handle in handles]


def expected(model: Any) -> list[list[int]]:
    return [greedy_alone(model, prompt, 8, eos_token_id=None) for prompt in PROMPTS]


def scaling(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 6


def scaling_of_numpy(model: Any) -> None:
    for factor in (2, 3):
        model.model.layers[1].self_attn.scaling = numpy.float64(model.model.layers[1].self_attn.scaling * factor)


def eps(model: Any) -> None:
    model.model.norm.variance_epsilon = 3.0
    model.model.layers[0].input_layernorm.variance_epsilon = 9.0


def multiplier(model: Any) -> None:
    for layer in model.model.layers:
        layer.residual_multiplier = 3.0


def logits_scaling(model: Any) -> None:
    """Read in the forward, from the config."""
    model.config.logits_scaling = -1.0


def cap(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.3


def window(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 3
    model.config.sliding_window = 3


def rope(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 3.0


def frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 7


CHANGES: list[tuple[str, Callable[[Any], None]]] = [
    ("Llama", scaling),
    ("Llama", scaling_of_numpy),
    ("Llama", eps),
    ("Granite", multiplier),
    ("Granite", logits_scaling),
    ("Gemma2", cap),
    ("Mistral", window),
    ("Llama", rope),
    ("Llama", frequencies),
]


@pytest.mark.parametrize(("family", "change"), CHANGES, ids=lambda value: getattr(value, "__name__", value))
def test_the_next_call_sees_the_change(family: str, change: Callable[[Any], None]) -> None:
    model = tiny_model(family)
    with GenerationManager(model, CONFIG) as manager:
        before = served(manager)
        assert before == expected(model)
        change(model)
        after = served(manager)
        assert after == expected(model)
        assert after != before, "the change changes nothing: this test would prove nothing"
        engine = manager.assembly
        assert served(manager) == after
        assert manager.assembly is engine


def test_live_requests_end_as_they_began() -> None:
    model = tiny_model("Llama")
    want = greedy_alone(model, PROMPTS[3], 200, eos_token_id=None)
    with GenerationManager(model, CONFIG) as manager:
        handle = manager.submit(PROMPTS[3], **{**GREEDY, "max_new_tokens": 200})
        scaling(model)
        assert served(manager) == expected(model)
        assert handle.result(60).token_ids == want


class Pointwise(nn.Module):
    """Reads a function, and a tensor in a plain attribute."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.function: Any = torch.tanh
        self.shift = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.inner(x)) + self.shift


def test_functions_are_noticed_and_tensors_in_plain_attributes_need_a_word() -> None:
    model = tiny_model("Llama")
    mlp = model.model.layers[0].mlp = Pointwise(model.model.layers[0].mlp)
    with GenerationManager(model, CONFIG) as manager:
        seen = [served(manager)]
        mlp.function = functools.partial(torch.clamp, max=0.1)
        manager.model_changed()
        seen.append(served(manager))
        for offset in (0.5, -3.0):
            mlp.function = lambda x, offset=offset: x * 0.1 + offset
            seen.append(served(manager))
            assert seen[-1] == expected(model)
        mlp.shift = torch.full((1,), 5.0)
        live = manager.submit(PROMPTS[3], **GREEDY)
        manager.model_changed()
        seen.append(served(manager))
        assert seen[-1] == expected(model)
        assert live.result(60).finish_reason == "length"
    assert len({str(tokens) for tokens in seen}) == 5


def use_by_its_owner(model: Any) -> None:
    """What happens to a model between two calls, and changes nothing of what it computes."""
    for length in (5, 40, 9):
        model.generate(torch.arange(3, 3 + length)[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
    model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    model.train()
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.eval()


OTHERS = ["OPTForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM", "MambaForCausalLM", "GPT2LMHeadModel"]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS, "dynamic", "longrope"])
def test_forwards_of_the_owner_start_no_engine(family: str) -> None:
    if family in ("dynamic", "longrope"):
        rope = {"rope_type": family, "rope_theta": 10000.0, "factor": 4.0}
        if family == "longrope":
            rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
        else:
            rope |= {"original_max_position_embeddings": 16}
        model = tiny_model("Llama", rope_parameters=rope, max_position_embeddings=64)
    else:
        model = families.tiny_model(family) if family in OTHERS else tiny_model(family)
    with GenerationManager(model, CONFIG) as manager:
        prompt = [5, 6, 7]
        manager.submit(prompt, **GREEDY).result(60)
        engine = manager.assembly
        manager.submit(prompt, **GREEDY).result(60)
        assert manager.assembly is engine
        use_by_its_owner(model)
        manager.submit(prompt, **GREEDY).result(60)
        assert manager.assembly is engine


class Early(nn.Module):
    """Sets an attribute before `nn.Module` sets its own, as several embeddings of positions do."""

    def __init__(self) -> None:
        self.offset = 2
        super().__init__()


@pytest.mark.parametrize(
    ("name", "values", "noticed"),
    [
        ("offset", [2, 3], True),
        ("flag", [None, True, False], True),
        ("kinds", [["a", "b"], ["a", "c"], ("a",)], True),
        ("nested", [[(1, 2), [3]], [(1, 2), [4]]], True),
        ("dtype", [torch.float32, torch.float16], True),
        ("function", [torch.relu, torch.tanh], True),
        ("training", [True, False], False),
        ("rope_max_seq_len_cached", [4, 5], False),
        ("cache", [{1: 2}, {1: 3}, {}], False),
        ("tensor", [torch.zeros(2), torch.ones(2)], False),
    ],
)
def test_what_is_noticed(name: str, values: list[Any], noticed: bool) -> None:
    module = Early()
    found = []
    for value in values:
        setattr(module, name, value)
        found.append(module_settings([module]))
        assert module_settings([module]) == found[-1]
    assert all((a != b) is noticed for a, b in itertools.pairwise(found))


def test_modules_of_a_class_with_other_attributes() -> None:
    first, second = Early(), Early()
    first.a, second.b = 1, 2
    before = module_settings([first, second])
    second.b = 3
    assert module_settings([first, second]) != before


def test_lists_that_are_changed_in_place() -> None:
    module = Early()
    module.kinds = ["full", "sliding"]
    before = module_settings([module])
    module.kinds[1] = "full"
    assert module_settings([module]) != before


def test_fields_of_configs() -> None:
    make: Any = PreTrainedConfig
    config = make(rope_parameters={"full": {"factor": 2.0}}, layer_types=["full"])
    config.text = make(scale=1.0)
    seen = [config_settings(config)]
    config.rope_parameters["full"]["factor"] = 3.0
    seen.append(config_settings(config))
    config.layer_types[0] = "sliding"
    seen.append(config_settings(config))
    config.text.scale = 2.0
    seen.append(config_settings(config))
    assert all(a != b for a, b in itertools.pairwise(seen))
    config.use_cache = False
    assert config_settings(config) == seen[-1]
    assert config_settings(None) == ()


def test_a_copy_of_the_state_is_equal() -> None:
    for family in ("Llama", "Gemma3Text"):
        model = tiny_model(family)
        assert ModelSnapshot.of(model) == ModelSnapshot.of(model)
