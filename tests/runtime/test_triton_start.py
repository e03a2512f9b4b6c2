"""Triton comes up once, in threads of its own, and whoever needs it waits for that."""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.forked_python import run_python
from support.tiny_models import tiny_model

from hf_async_batching import BatchingConfig
from hf_async_batching.engine import builder, route
from hf_async_batching.runtime import triton_start as compiler_start
from hf_async_batching.runtime.triton_start import after_compiler_start, start_compiler

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_start, "_starting", [])
    monkeypatch.setattr(compiler_start, "_has_triton", lambda: True)


@pytest.mark.parametrize("slow", ["_hash_files", "_connect"])
def test_it_starts_once_and_jobs_wait_for_all_of_it(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    up, started, ran = threading.Event(), [], threading.Event()

    def step(name: str) -> Any:
        def run(*device: torch.device) -> None:
            started.append((name, *device))
            if name == slow:
                up.wait(30)

        return run

    for name in ("_hash_files", "_connect"):
        monkeypatch.setattr(compiler_start, name, step(name))
    daemon = threading.Thread(target=start_compiler, args=(CUDA,), daemon=True)
    daemon.start()
    daemon.join()  # returns though it is not up
    assert not any(thread.daemon for thread in compiler_start._starting)
    start_compiler(CUDA)
    thread = threading.Thread(target=after_compiler_start(ran.set))
    thread.start()
    assert not ran.wait(0.1)
    up.set()
    assert ran.wait(30)
    thread.join()
    assert sorted(started) == [("_connect", CUDA), ("_hash_files",)]


def test_it_starts_where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    start_compiler(CPU)
    monkeypatch.setattr(compiler_start, "_has_triton", lambda: False)
    start_compiler(CUDA)
    assert not compiler_start._starting
    assert after_compiler_start(lambda: 5)() == 5


def test_a_start_that_fails_is_for_the_first_kernel_to_tell(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*device: torch.device) -> None:
        raise AttributeError("another release")

    monkeypatch.setattr(compiler_start, "_hash_files", fail)
    monkeypatch.setattr(compiler_start, "_connect", fail)
    with caplog.at_level(logging.DEBUG, logger=compiler_start.__name__):
        start_compiler(CUDA)
        assert after_compiler_start(lambda: 5)() == 5
    assert caplog.text.count("AttributeError: another release") == 2


def test_what_it_asks_of_triton_is_there() -> None:
    pytest.importorskip("triton")
    compiler_start._hash_files()
    from triton.runtime.cache import triton_key  # type: ignore[import-untyped,unused-ignore]

    assert triton_key.cache_info().currsize == 1, "others find it"
    driver: list[torch.device] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda device: nullcontext(driver.append(device)))
        patch.setattr(import_module("triton.runtime"), "driver", SimpleNamespace(active=_Active(driver)))
        compiler_start._connect(CUDA)
    assert driver == [CUDA, "asked"]
    assert "triton.experimental.gluon.nvidia.hopper" in sys.modules


class _Active:
    def __init__(self, log: list[Any]) -> None:
        self.get_current_target = lambda: log.append("asked")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_connects_to_the_driver() -> None:
    compiler_start._connect(CUDA)


def test_it_begins_before_the_model_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    packed = route._packed_forward

    def look(*args: Any) -> Any:
        order.append("model")
        return packed(*args)

    monkeypatch.setattr(route, "start_compiler", order.append)
    monkeypatch.setattr(route, "_packed_forward", look)
    builder.build_engine(tiny_model("Llama"), BatchingConfig()).engine.close()
    assert order == [CPU, "model"]


def test_the_first_conftest_chooses_the_kernels_interpreter() -> None:
    """Before any hook: the conftest of a folder may import Triton as soon as the first one is imported."""
    done = run_python("import os, conftest; print(os.environ.get('TRITON_INTERPRET'))")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("None\n" if torch.cuda.is_available() else "1\n")
