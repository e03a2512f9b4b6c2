"""What the parity check takes for the truth: few forwards where it can, each prompt token by token elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from transformers import PreTrainedModel

from hf_async_batching.checks import reference_logits as module
from hf_async_batching.checks.reference_logits import Expected, Prompts, prompts_for, reference_logits
from hf_async_batching.coverage.families import tiny_model as coverage_model
from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.model.forward.cache_forward import MODES, CacheForward
from hf_async_batching.model.forward.generate_loop import prepare_view
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.view.model_view import make_view

LABELS = [
    *("a chunk of a prompt", "the rest of a prompt", "a decode alone", "a decode"),
    *("a prompt that joined late", "a late decode", "another that joined late", "another late decode"),
]


def view_of(model: PreTrainedModel) -> PreTrainedModel:
    view = make_view(model, None)
    prepare_view(view)
    return view


@torch.inference_mode()
def logits_of(model: PreTrainedModel, forward: PackedForward | CacheForward, prompts: Prompts) -> Expected:
    return reference_logits(view_of(model), forward, prompts)


def watch(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> list[int]:
    """Query tokens of each forward."""
    ran: list[int] = []
    run = type(model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(kwargs["input_ids"].shape[1])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    return ran


def test_few_forwards_of_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a start each takes tens of milliseconds, and attention over another length as much again."""
    model = tiny_model("Llama")
    forward = PackedForward(model)
    ran = watch(monkeypatch, model)
    prompts = prompts_for(model, forward.vocab_size)
    logits_of(model, forward, prompts)
    kept = len(prompts.second) - 1
    assert sorted(ran) == [1, 1, 1, 1, kept, kept, kept, len(prompts.first)]


@pytest.mark.parametrize(
    "route", ["few forwards", "no logits but the last", "a window between", "another route", "row by row"]
)
def test_the_logits_of_every_prompt(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    forward: PackedForward | CacheForward = PackedForward(model)
    prompts = prompts_for(model, forward.vocab_size)
    first, second, third = prompts
    if route == "no logits but the last":
        start = module.GenerateLoop.start
        monkeypatch.setattr(
            module.GenerateLoop, "start", lambda *args, everywhere=False: last(start(*args), everywhere)
        )
    elif route == "a window between":
        model.config.some_window = len(second)
    elif route == "another route":
        forward = CacheForward(model, *MODES[0])
    elif route == "row by row":
        forward = CacheForward(model)
    assert forward.recomputes == (route != "row by row")
    found = logits_of(model, forward, prompts)
    assert list(found.logits) == LABELS
    assert (found.noise == 0) == (route in ("few forwards", "row by row"))
    known = [first[: len(first) // 3], first[:-2], first[:-1], first, second[:-1], second, third[:-1], third]
    for label, tokens in zip(LABELS, known, strict=True):
        want = model(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(found.logits[label], want, rtol=1e-4, atol=1e-5, msg=label)


def last(logits: torch.Tensor, everywhere: bool) -> torch.Tensor:
    return logits[None] if everywhere else logits


class Backwards(torch.nn.Module):
    """A layer that lets tokens reach those before them."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(hidden + hidden.mean(1, keepdim=True), *args, **kwargs)


@pytest.mark.parametrize("few", [False, True])
def test_tokens_that_change_what_came_before_are_refused(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    forward = PackedForward(model)
    monkeypatch.setattr(module, "_decodes_alike", lambda *_: few)
    model.model.layers[0] = Backwards(model.model.layers[0])
    with pytest.raises(UnsupportedModelError, match="change the logits of tokens before them"):
        logits_of(model, forward, prompts_for(model, forward.vocab_size))


@pytest.mark.parametrize("few", [False, True])
def test_one_token_that_looks_ahead_is_enough(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own logits change by a little more than rounding, and nobody else's."""
    model = tiny_model("Llama")
    forward = PackedForward(model)
    monkeypatch.setattr(module, "_decodes_alike", lambda *_: few)
    start = module.GenerateLoop.start

    def looks_ahead(self: Any, tokens: torch.Tensor, *, everywhere: bool = False) -> torch.Tensor:
        logits = start(self, tokens, everywhere=everywhere)
        if everywhere and tokens.shape[1] > 40:
            logits[5] += 3e-4 * float(1 + tokens[0, -1] % 7) * logits[5].roll(1)
        return logits

    monkeypatch.setattr(module.GenerateLoop, "start", looks_ahead)
    with pytest.raises(UnsupportedModelError, match="change the logits of tokens before them"):
        logits_of(model, forward, prompts_for(model, forward.vocab_size))


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("wrong", ["every step", "the second step", "NaN"])
def test_tokens_that_differ_one_by_one_are_refused(few: bool, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    forward = PackedForward(model)
    monkeypatch.setattr(module, "_decodes_alike", lambda *_: few)
    step = module.GenerateLoop.step

    def wrong_step(self: Any, token: torch.Tensor) -> torch.Tensor:
        logits = step(self, token)
        self.steps = getattr(self, "steps", 0) + 1
        if wrong == "the second step" and self.steps < 2:
            return logits
        return logits * float("nan") if wrong == "NaN" else logits + 0.1 * logits.roll(1)

    monkeypatch.setattr(module.GenerateLoop, "step", wrong_step)
    with pytest.raises(UnsupportedModelError, match="differ, by nan" if wrong == "NaN" else "differ, by 0.[01]"):
        logits_of(model, forward, prompts_for(model, forward.vocab_size))


def test_the_second_prompt_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    forward = CacheForward(model, *MODES[0])
    prompts = prompts_for(model, forward.vocab_size)
    step, by = module.GenerateLoop.step, [1e-4]

    def wrong_step(self: Any, token: torch.Tensor) -> torch.Tensor:
        logits = step(self, token)
        return logits + by[0] * logits.roll(1) if int(token) == prompts.second[-1] else logits

    monkeypatch.setattr(module.GenerateLoop, "step", wrong_step)
    assert prompts.second[-1] not in (prompts.first[-1], prompts.first[-2])
    assert 0.5e-4 < logits_of(model, forward, prompts).noise < 2e-4
    by[0] = 0.1
    with pytest.raises(UnsupportedModelError, match="token by token and all at once differ"):
        logits_of(model, forward, prompts)


def test_where_decodes_may_differ() -> None:
    def alike(**config: Any) -> bool:
        text = SimpleNamespace(**config)
        view: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda **_: text))
        return module._decodes_alike(view, Prompts([0] * 69, [0] * 34, [0] * 34))

    assert alike() and alike(sliding_window=None, index_topk=8, max_window_layers=28, block_type="block")
    for name in ("sliding_window", "attention_chunk_size", "index_topk", "block_size"):
        assert not alike(**{name: 33}) and not alike(**{name: 69})
        assert alike(**{name: 32}) and alike(**{name: 70}), "seen by all decodes, or by none of either way"
    assert alike(rope_parameters={"rope_type": "yarn"})
    assert not alike(rope_parameters={"rope_type": "longrope"})


def test_a_family_whose_own_decode_forgets_its_window_is_not_packed() -> None:
    """Moshi's decode differs from its prompts behind its window, wherever that ends."""
    model = coverage_model("MoshiForCausalLM")
    model.config.sliding_window = 40
    for layer in model.modules():
        if hasattr(layer, "sliding_window"):
            layer.sliding_window = 40
    with pytest.raises(UnsupportedModelError, match="token by token and all at once differ"):
        logits_of(model, PackedForward(model), prompts_for(model, 32))


def test_a_prompt_is_long_enough_for_attention_to_leave_keys_out() -> None:
    def of(context: int | None, **config: int) -> list[int]:
        text = SimpleNamespace(max_position_embeddings=context, **config)
        config_of = SimpleNamespace(get_text_config=lambda **_: text)
        model: Any = SimpleNamespace(config=config_of, named_modules=lambda: [])
        prompts = prompts_for(model, 50)
        assert all(0 <= token < 50 for tokens in prompts for token in tokens)
        return [len(tokens) for tokens in prompts]

    assert of(4096) == [69, 34, 34]
    assert of(None) == [69, 34, 34]
    assert of(4096, index_topk=200) == [205, 37, 37]
    assert of(4096, index_topk=8) == [69, 34, 34]
    assert of(20) == [20, 10, 10]
    assert of(2) == [4, 2, 2]
