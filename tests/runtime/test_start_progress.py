"""A start that takes long says what it does."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.engine import route
from hf_async_batching.runtime import start_progress
from hf_async_batching.runtime.start_progress import stage, told


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "start progress" in thread.name]


def test_a_long_start_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(start_progress, "_EVERY", 0.02)
    with caplog.at_level(logging.WARNING, "hf_async_batching"), told("Llama"):
        assert threads()
        time.sleep(0.05)
        stage("its kernels are compiled")
        time.sleep(0.05)
    first, *others = caplog.messages
    assert first.startswith("Llama is prepared for batching, 0 s so far: it is looked at. This is normal")
    assert "done once" in first and "get_manager(model).warmup()" in first
    assert others[-1] == "Llama is prepared for batching, 0 s so far: its kernels are compiled"
    assert not threads()
    stage("no start is told")


def test_a_short_start_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "hf_async_batching"), told("Llama"):
        stage("its kernels are compiled")
    assert not caplog.text


def test_a_start_that_fails_says_no_more(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(start_progress, "_EVERY", 0.02)
    with pytest.raises(ValueError, match="broken"), told("Llama"):
        raise ValueError("broken")
    assert not threads()
    time.sleep(0.05)
    assert not caplog.text


def test_an_engine_says_which_route_is_checked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(start_progress, "_EVERY", 0.02)
    check = route.check_parity

    def slowly(*args: Any) -> Any:
        time.sleep(0.1)
        return check(*args)

    monkeypatch.setattr(route, "check_parity", slowly)
    with GenerationManager(tiny_model("LlamaForCausalLM"), BatchingConfig(max_sequence_length=32)) as manager:
        manager.submit([3, 4, 5], max_new_tokens=2).result()
    assert (
        "LlamaForCausalLM is prepared for batching, 0 s so far: its logits as packed are compared with those of plain"
        in caplog.text
    )
    assert not threads()
