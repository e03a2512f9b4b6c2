"""When compiling in the background begins."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_models import tiny_model

from hf_async_batching import BatchingConfig, GenerationManager, preparation
from hf_async_batching.preparation import Preparation


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The views that were compiled."""
    compiled: list[Any] = []
    monkeypatch.setattr(preparation, "compile_for", lambda model, assembly: compiled.append(model))
    return compiled


class _Assembly(SimpleNamespace):
    __hash__ = object.__hash__


def test_it_begins_with_the_first_token(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_FIRST_STEP", 30.0)
    model, first_step, assembly = tiny_model("Llama"), threading.Event(), _Assembly()
    made = Preparation(model, assembly, first_step)  # type: ignore[arg-type]
    assert not made.done.wait(0.2)
    assert not compiled
    first_step.set()
    assert made.done.wait(10)
    (view,) = compiled
    assert view is not model and view.lm_head.weight is model.lm_head.weight


def test_it_begins_though_no_request_comes(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_FIRST_STEP", 0.1)
    made = Preparation(tiny_model("Llama"), _Assembly(), threading.Event())  # type: ignore[arg-type]
    assert made.done.wait(10)
    assert compiled


def test_requests_and_warm_ups_let_it_begin(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_FIRST_STEP", 600.0)
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
