"""Positions of packed tokens, however a family takes them; and logits of -inf."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model as llama_like
from transformers import LlamaForCausalLM, PreTrainedModel

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.attention.select import make_backend
from hf_async_batching.checks.parity_check import check_parity, compile_checked
from hf_async_batching.coverage.check import check_model, make_prompts, reference
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.view.model_view import make_view
from hf_async_batching.model.view.position_cache import PositionCache

CONFIG = BatchingConfig(page_size=16, max_rows=4, max_batch_tokens=32)
TEMPERATURE: dict[str, Any] = {"floor_scale": 8, "attn_scale": 0.5}


def test_a_temperature_by_position_is_packed_and_exact() -> None:
    """Llama-4's counts from the length of a cache, not from `position_ids`."""
    verdict = check_model(tiny_model("Llama4ForCausalLM", **TEMPERATURE))
    assert (verdict.status, verdict.reason, verdict.route) == ("exact", "", "packed")
    assert verdict.distinct_tokens > 20


def test_a_temperature_by_position_in_the_drop_in() -> None:
    model = tiny_model("Llama4ForCausalLM", **TEMPERATURE)
    prompts = make_prompts(190, (5, 37, 23, 40))
    alone = reference(model, prompts).tokens
    for rows in ([0], [1], [3, 0], [0, 1, 2, 3]):
        width = max(len(prompts[row]) for row in rows)
        ids = torch.tensor([[0] * (width - len(prompts[row])) + prompts[row] for row in rows])
        mask = torch.tensor([[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            custom_generate=hf_async_batching.generate,
        )
        assert out[:, width:].tolist() == [alone[row] for row in rows]


def test_a_temperature_by_position_compiles() -> None:
    forward = PackedForward(tiny_model("Llama4ForCausalLM", **TEMPERATURE), fused=True)
    compile_checked(forward, make_backend("auto", torch.device("cpu")), "eager")


def test_a_position_cache_adds_up_to_positions() -> None:
    positions = torch.tensor([7, 8, 0, 1, 2, 30])
    cache = PositionCache(positions)
    assert (torch.arange(6) + cache.get_seq_length(3)).tolist() == positions.tolist()
    keys, values = torch.randn(2, 1, 2, 6, 8)
    assert all(a is b for a, b in zip(cache.update(keys, values, 0, kwargs={}), (keys, values)))
    assert cache.get_mask_sizes(6, 0) == (6, 0) and cache.get_query_offset() == 0


class Open(LlamaForCausalLM):
    """Names none of its arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Around(LlamaForCausalLM):
    """Calls a whole model within."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole(*args, **kwargs)


class Closed(LlamaForCausalLM):
    """Hands on what it names, and no positions."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        kept = {name: value for name, value in kwargs.items() if name in ("use_cache", "return_dict")}
        name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
        past = cache if cache is not None else kwargs.get(name)
        return super().forward(input_ids, attention_mask=attention_mask, **{name: past}, **kept)


def of_class(model_class: type[LlamaForCausalLM]) -> PreTrainedModel:
    plain = llama_like("Llama")
    model = model_class(plain.config).eval()
    if model_class is Around:
        model.whole = plain
    model.load_state_dict(plain.state_dict(), strict=False)
    model.generation_config = plain.generation_config
    return model


@pytest.mark.parametrize(("model_class", "packed"), [(Open, True), (Around, True), (Closed, False)])
def test_a_forward_that_names_no_arguments_gets_positions(model_class: type[LlamaForCausalLM], packed: bool) -> None:
    model = of_class(model_class)
    known = reference(llama_like("Llama"), make_prompts(90))
    verdict = check_model(model, known)
    assert (verdict.status, verdict.reason, verdict.route == "packed") == ("exact", "", packed)


@pytest.mark.parametrize("in_drop_in", [True, False])
def test_tokens_that_only_fill_the_vocabulary_up(in_drop_in: bool) -> None:
    model = llama_like("Llama")
    model.lm_head = torch.nn.Linear(64, 97)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        model.lm_head.bias[90:] = -torch.inf
    prompt = list(range(3, 40))
    expected = reference(model, [prompt]).tokens[0]
    if in_drop_in:
        arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        out = model.generate(torch.tensor([prompt]), custom_generate=hf_async_batching.generate, **arguments)
        assert out[0, len(prompt) :].tolist() == expected
        return
    with GenerationManager(model, CONFIG) as manager:
        handle = manager.submit(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert handle.result(60).token_ids == expected
        assert manager.assembly is not None and manager.assembly.forward.route == "packed"


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_the_same_forward_on_another_view(family: str) -> None:
    """Nothing is probed again: what the probe found goes with the modules' places."""
    model = llama_like(family)
    forward = PackedForward(model, fused=True)
    view = make_view(model, None)
    other = forward.on_view(view)
    assert other.view is view and other.packed_groups is None and not other.regions
    modules = {id(module): name for name, module in view.named_modules()}
    before = {id(module): name for name, module in forward.view.named_modules()}
    assert {modules[key]: layer for key, layer in other._paged_layers.items()} == {
        before[key]: layer for key, layer in forward._paged_layers.items()
    }
    check_parity(model, other, make_backend("auto", torch.device("cpu")))
    other.fuse()
    assert other.packed_groups == forward.packed_groups
    check_parity(model, other, make_backend("auto", torch.device("cpu")))
    smaller = make_view(llama_like(family, num_hidden_layers=1), None)
    with pytest.raises(ValueError, match=r"is shorter|is longer"):
        forward.on_view(smaller)
