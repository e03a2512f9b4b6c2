"""When compiling in the background begins."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.engine import background_compile, supervisor
from hf_async_batching.engine.background_compile import BackgroundCompile
from hf_async_batching.engine.builder import build_engine
from hf_async_batching.engine.engine_thread import EngineThread
from hf_async_batching.model.view.model_view import make_view


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The views that were compiled."""
    compiled: list[Any] = []
    monkeypatch.setattr(background_compile, "compile_for", lambda model, parts: compiled.append(model))
    return compiled


class _Parts(SimpleNamespace):
    __hash__ = object.__hash__
    view: Any = None


def test_it_begins_with_the_first_token(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_compile, "_FIRST_STEP", 30.0)
    model, first_step, parts = tiny_model("Llama"), threading.Event(), _Parts()
    made = BackgroundCompile(model, parts, first_step)  # type: ignore[arg-type]
    assert not made.done.wait(0.2)
    assert not compiled
    first_step.set()
    assert made.done.wait(60)
    (view,) = compiled
    assert view is not model and view.lm_head.weight is model.lm_head.weight


def test_it_takes_the_view_that_was_checked(compiled: list[Any]) -> None:
    """Another copy of the modules would hold up the first token."""
    view = tiny_model("Llama")
    made = BackgroundCompile(tiny_model("Llama"), _Parts(view=view), threading.Event())  # type: ignore[arg-type]
    assert made.done.wait(60)
    assert compiled == [view]


def test_it_begins_though_no_request_comes(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_compile, "_FIRST_STEP", 0.1)
    made = BackgroundCompile(tiny_model("Llama"), _Parts(), threading.Event())  # type: ignore[arg-type]
    assert made.done.wait(60)
    assert compiled


def test_requests_and_warm_ups_let_it_begin(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_compile, "_FIRST_STEP", 600.0)
    settings = BatchingConfig(compile=True)
    with GenerationManager(tiny_model("Llama"), settings) as manager:
        manager.submit([5], max_new_tokens=1, do_sample=False).result()
        began = time.monotonic()
        while not compiled and time.monotonic() - began < 60:
            time.sleep(0.01)
        assert len(compiled) == 1
    with GenerationManager(tiny_model("Llama"), settings) as manager:
        manager.warmup()
        assert len(compiled) == 2


def test_a_chunk_of_a_prompt_is_no_first_token(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_compile, "_FIRST_STEP", 600.0)
    seen: list[tuple[bool, bool]] = []
    deliver = EngineThread._deliver

    def watched(self: EngineThread, emissions: Any) -> None:
        seen.append((bool(emissions), self.first_step.is_set()))
        deliver(self, emissions)

    monkeypatch.setattr(EngineThread, "_deliver", watched)
    settings = BatchingConfig(compile=True, max_batch_tokens=16, max_rows=2)
    with GenerationManager(tiny_model("Llama"), settings) as manager:
        manager.submit(list(range(1, 60)), max_new_tokens=3, do_sample=False, eos_token_id=None).result()
    first = next(number for number, (emitted, _) in enumerate(seen) if emitted)
    assert first >= 2, "steps without a token"
    assert not any(begun for _, begun in seen[: first + 1])
    assert all(begun for _, begun in seen[first + 1 :])


def test_an_interrupted_start_leaves_nothing_behind(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    before = {thread for thread in threading.enumerate() if thread.name == "hf_async_batching"}
    with GenerationManager(tiny_model("Llama"), BatchingConfig(compile=True)) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(supervisor, "BackgroundCompile", interrupt)
            with pytest.raises(KeyboardInterrupt):
                manager.submit([5], max_new_tokens=1)
        assert before == {thread for thread in threading.enumerate() if thread.name == "hf_async_batching"}
        manager.warmup()
        assert len(compiled) == 1, "the next one has all of it"


@pytest.mark.parametrize("ends", [True, False])
def test_a_compiler_that_fails_because_the_process_ends_says_nothing(
    ends: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no compiler")

    model = tiny_model("Llama")
    engine = build_engine(model, BatchingConfig(compile=True))
    monkeypatch.setattr(background_compile, "compile_checked", fail)
    monkeypatch.setattr(background_compile, "process_ends", lambda: ends)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        assert not background_compile.compile_for(make_view(model, None), weakref.ref(engine))
    assert ("runs uncompiled: no compiler" in caplog.text) != ends
    caplog.clear()

    def fail_as_executors_do(*args: Any, **options: Any) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(background_compile, "compile_checked", fail_as_executors_do)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        assert not background_compile.compile_for(make_view(model, None), weakref.ref(engine))
    assert not caplog.text
    engine.engine.close()
