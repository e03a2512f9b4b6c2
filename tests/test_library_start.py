"""What a first forward loads is loaded once, in a thread, where there is something to load."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from hf_async_batching import BatchingConfig, assembly, library_start
from hf_async_batching.library_start import first_calls, start_libraries

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
THREAD = "hf_async_batching_libraries"


@pytest.fixture(autouse=True)
def not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_start, "_started", set())


def end() -> None:
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()


def test_once_for_a_device_in_a_thread_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    go_on = threading.Event()

    def first(device: torch.device, dtype: torch.dtype) -> None:
        go_on.wait(30)
        thread = threading.current_thread()
        calls.append((device, dtype, thread.name, thread.daemon, torch.is_inference_mode_enabled()))

    monkeypatch.setattr(library_start, "first_calls", first)
    daemon = threading.Thread(target=start_libraries, args=(CUDA, torch.bfloat16), daemon=True)
    daemon.start()
    daemon.join()
    start_libraries(CUDA, torch.float16)
    start_libraries(CPU, torch.float32)
    go_on.set()
    end()
    assert calls == [(CUDA, torch.bfloat16, THREAD, False, True)]
    start_libraries(torch.device("cuda", 1), torch.float32)
    end()
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_it_calls(dtype: torch.dtype) -> None:
    called, dtypes, causal = list[str](), set[torch.dtype](), list[bool]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            dtypes.update(a.dtype for a in args if isinstance(a, torch.Tensor))
            causal.append("attention" in str(func) and True in args[3:])
            return func(*args, **(kwargs or {}))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Watch():
        first_calls(device, dtype)
    for name in ("embedding", "mm", "attention"):
        assert any(name in one for one in called), f"{name}: {called}"
    assert sum("attention" in one for one in called) >= 2, "of prompts and of single tokens"
    assert dtypes == {dtype, torch.int64} and sum(causal) == 1


def test_what_fails_is_for_the_model_to_tell(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such library")

    monkeypatch.setattr(library_start, "first_calls", fail)
    with caplog.at_level(logging.DEBUG, logger=library_start.__name__):
        start_libraries(CUDA, torch.float32)
        end()
    assert "no such library" in caplog.text


def test_without_a_thread_to_spare_the_model_loads_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with caplog.at_level(logging.DEBUG, logger=library_start.__name__):
        start_libraries(CUDA, torch.float32)
    assert "can't start new thread" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_before_the_model_is_looked_at(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    made = assembly.ModelForward

    def make(*args: Any, **named: Any) -> Any:
        order.append("model")
        return made(*args, **named)

    monkeypatch.setattr(assembly, "start_libraries", lambda *what: order.append(what))
    monkeypatch.setattr(assembly, "ModelForward", make)
    model = tiny_model("Llama").to(dtype)
    assembly._checked_forward(model, BatchingConfig())
    assert order == [(model.device, dtype), "model"]
