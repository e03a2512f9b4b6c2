"""Triton comes up once, in a thread of its own, and whoever needs it waits for that."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model

from hf_async_batching import attach_check as attach_check_module
from hf_async_batching import compiler_start
from hf_async_batching.attach_check import attach_check
from hf_async_batching.attention.backend import make_backend
from hf_async_batching.compiler_start import after_compiler_start, start_compiler
from hf_async_batching.model_forward import ModelForward

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_start, "_starting", None)


def test_it_starts_once_and_jobs_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    up, started, ran = threading.Event(), [], threading.Event()

    def start(*args: Any) -> None:
        started.append(args)
        up.wait(30)

    monkeypatch.setattr(compiler_start, "_start", start)
    start_compiler(CUDA, torch.float16, 100)  # returns though it is not up
    start_compiler(CUDA, torch.bfloat16, 200)
    thread = threading.Thread(target=after_compiler_start(ran.set))
    thread.start()
    assert not ran.wait(0.1)
    up.set()
    assert ran.wait(30)
    thread.join()
    assert started == [(CUDA, torch.float16, 100)]


def test_it_starts_on_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_start, "_start", lambda *args: pytest.fail("not for a CPU"))
    start_compiler(CPU, torch.float32, 100)
    assert after_compiler_start(lambda: 5)() == 5


def test_a_start_that_fails_is_for_the_first_kernel_to_tell(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiler_start, "argmax", fail)
    with caplog.at_level(logging.DEBUG, logger=compiler_start.__name__):
        start_compiler(CUDA, torch.float32, 100)
        assert after_compiler_start(lambda: 5)() == 5
    assert "did not start" in caplog.text


def test_the_plain_forward_waits_for_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def one_by_one(jobs: list[Callable[[], object]], device: torch.device) -> None:
        for number, job in enumerate(jobs):
            order.append(f"job {number}")
            job()

    def wait(job: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            order.append("waits")
            return job()

        return run

    monkeypatch.setattr(attach_check_module, "side_by_side", one_by_one)
    monkeypatch.setattr(attach_check_module, "after_compiler_start", wait)
    model = tiny_model("Llama")
    attach_check(model, ModelForward(model), make_backend("auto", CPU))
    assert order == ["job 0", "job 1", "waits", "job 2", "waits", "job 3", "waits"]
