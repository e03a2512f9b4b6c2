"""What a first look at a model has found is handed on to its engine: no second copy, and no second probe."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from torch import nn

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.coverage.families import tiny_model as coverage_model
from hf_async_batching.engine.route import check_servable, choose_route
from hf_async_batching.model.forward import attention_probe
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.view import model_view

CONFIG = BatchingConfig(max_rows=4, max_batch_tokens=32, page_size=16)
PROMPT = [5, 3, 8, 1]


class Counts:
    """Copies and probes of one model since they were last asked for."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self._model, self._copies, self._probes = model, 0, 0
        refuse_split, probe = model_view._refuse_split, attention_probe.probe

        def copied(of: Any) -> None:  # the first thing that making a view does
            self._copies += any(a is b for a, b in zip(of.parameters(), model.parameters(), strict=False))
            refuse_split(of)

        def probed(*arguments: Any, **options: Any) -> Any:
            self._probes += 1
            return probe(*arguments, **options)

        monkeypatch.setattr(model_view, "_refuse_split", copied)
        monkeypatch.setattr(attention_probe, "probe", probed)

    def __call__(self) -> tuple[int, int]:
        counted = self._copies, self._probes
        self._copies = self._probes = 0
        return counted


def greedy(model: Any, new: int = 6) -> list[int]:
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=new, do_sample=False, eos_token_id=None)
    return out[0, len(PROMPT) :].tolist()


def served(manager: GenerationManager, new: int = 6) -> list[int]:
    return list(manager.submit(PROMPT, max_new_tokens=new, do_sample=False, eos_token_id=None).result(120).token_ids)


@pytest.mark.parametrize("fused", [True, False])
def test_a_start_copies_a_model_for_serving_and_for_the_check_and_probes_it_once(
    fused: bool, monkeypatch: pytest.MonkeyPatch, quick_compiler: None
) -> None:
    """Compiling takes over the copy that the check has made."""
    model = tiny_model("Llama")
    want, counts = greedy(model), Counts(model, monkeypatch)
    config = BatchingConfig(max_rows=4, max_batch_tokens=32, compile=True, fuse_weights=fused)
    with GenerationManager(model, config) as manager:
        assert counts() == (1, 1), "the look at the model"
        assert served(manager) == want
        manager.warmup()
        assert counts() == (1, 0), "the check's own copy, in which `generate` runs"
        assert served(manager) == want
        parts = manager.assembly
        assert parts is not None and parts.runner._forward._compiled
        assert parts.runner._forward.view is parts.view
    assert counts() == (0, 0)


def test_without_the_check_there_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    counts = Counts(model, monkeypatch)
    with GenerationManager(model, BatchingConfig(max_rows=4, max_batch_tokens=32, attach_check=False)) as manager:
        served(manager)
    assert counts() == (1, 1)


def test_a_model_that_cannot_be_packed_is_not_tried_so_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = coverage_model("BloomForCausalLM")
    counts = Counts(model, monkeypatch)
    hint = check_servable(model)
    assert isinstance(hint.packed, str)
    assert counts() == (2, 1), "packed, and a row at a time"
    route = choose_route(model, CONFIG, hint)
    assert isinstance(route.forward, CacheForward)
    assert counts() == (2, 0), "the route's copy and the check's"
    assert "slower than packed: its" in caplog.text


def switched_head(model: Any) -> None:
    model.lm_head = nn.Linear(*model.lm_head.weight.shape[::-1], bias=False)


def scaled_attention(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 3


@pytest.mark.parametrize("change", [switched_head, scaled_attention])
def test_a_model_that_changed_meanwhile_is_looked_at_again(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("Llama")
    with GenerationManager(model, CONFIG) as manager:
        counts = Counts(model, monkeypatch)
        change(model)
        assert served(manager) == greedy(model)
        assert counts() == (2, 1)


def test_weights_that_changed_in_place_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    with GenerationManager(model, CONFIG) as manager:
        counts = Counts(model, monkeypatch)
        with torch.no_grad():
            model.lm_head.weight.neg_()
        assert served(manager) == greedy(model)
        assert counts() == (1, 0)


def test_what_a_caller_reports_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("Llama")
    with GenerationManager(model, CONFIG) as manager:
        counts = Counts(model, monkeypatch)
        manager.model_changed()
        served(manager)
        assert counts() == (2, 1)


def test_another_autocast_is_another_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    with GenerationManager(model, CONFIG) as manager:
        counts = Counts(model, monkeypatch)
        with torch.autocast("cpu", torch.bfloat16):
            served(manager)
        assert counts() == (2, 1)
        parts = manager.assembly
        assert parts is not None and parts.forward.layers[0].dtype == torch.bfloat16


def test_an_engine_that_starts_again_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first engine may have compiled and packed what it took over."""
    model = tiny_model("Llama")
    counts = Counts(model, monkeypatch)
    with GenerationManager(model, CONFIG) as manager:
        served(manager)
        assert counts() == (2, 1)
        manager.model_changed()
        served(manager)
        assert counts() == (2, 1)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM"])
def test_a_hint_keeps_no_model_alive(name: str) -> None:
    model = coverage_model(name)
    gone, hint = weakref.ref(model), check_servable(model)
    del model
    gc.collect()
    assert gone() is None
    assert hint.packed is not None


def test_weights_that_do_not_pass_fused_are_served_unfused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(forward: PackedForward, *, skinny: bool) -> None:
        raise RuntimeError("no room")

    model = tiny_model("Llama")
    hint = check_servable(model)
    monkeypatch.setattr(PackedForward, "fuse", fail)
    route = choose_route(model, BatchingConfig(fuse_weights=True), hint)
    assert "runs without fused weights: no room" in caplog.text
    assert isinstance(route.forward, PackedForward) and route.forward.packed_groups is None
    assert route.forward is not hint.packed, "what was half fused is not used"
