"""A process may end while a forward is compiled in its background."""

from __future__ import annotations

import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.forked_python import run_python

from hf_async_batching.runtime import process_exit as process_end
from hf_async_batching.runtime.process_exit import ProcessEndsError, end_with_the_process

_SCRIPT = textwrap.dedent(
    """
    import sys, time
    from support.tiny_models import tiny_model
    from hf_async_batching import BatchingConfig, GenerationManager
    manager = GenerationManager(tiny_model("Llama"), BatchingConfig(compile=True))
    handle = manager.submit([5], max_new_tokens=2, do_sample=False, eos_token_id=None)
    print(len(handle.result().token_ids), flush=True)
    time.sleep(float(sys.argv[1]))
    """
)


@pytest.mark.parametrize("seconds", [0, 1.5])
def test_a_script_that_ends_while_its_model_compiles(seconds: float, tmp_path: Path) -> None:
    done = run_python(_SCRIPT, str(seconds), TORCHINDUCTOR_CACHE_DIR=str(tmp_path), HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr  # it aborted
    assert done.stdout == "2\n"
    assert "Traceback" not in done.stderr and "uncompiled" not in done.stderr, done.stderr


_LIVES_ON = textwrap.dedent(
    """
    import threading
    from support.tiny_models import tiny_model
    from hf_async_batching import GenerationManager
    from hf_async_batching.runtime.process_exit import process_ends
    from hf_async_batching.devices.parallel import run_in_threads
    def serve():
        threading.main_thread().join()
        print(process_ends(), flush=True)
        run_in_threads([lambda: print("a job", flush=True)])
        with GenerationManager(tiny_model("Llama")) as manager:
            print(len(manager.submit([5], max_new_tokens=2, do_sample=False, eos_token_id=None).result().token_ids))
    threading.Thread(target=serve).start()
    """
)


def test_a_program_may_serve_when_its_main_thread_has_ended() -> None:
    done = run_python(_LIVES_ON)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\na job\n2\n", done.stderr


def test_whom_python_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def thread(daemon: bool = False, alive: bool = True) -> Any:
        return SimpleNamespace(daemon=daemon, is_alive=lambda: alive)

    compiles = threading.Thread(target=lambda: None)
    monkeypatch.setattr(compiles, "is_alive", lambda: True)
    monkeypatch.setattr(process_end, "_watched", [compiles])
    ended = [thread(alive=False), thread(daemon=True), compiles]  # the main thread is still listed
    for threads, ends in [(ended, True), ([thread(), *ended], False), ([], True)]:
        monkeypatch.setattr(threading, "enumerate", lambda threads=threads: threads)
        assert process_end.process_ends() == ends


def test_a_thread_ends_with_the_process_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, done, raised = threading.Event(), threading.Event(), []
    monkeypatch.setattr(process_end, "process_ends", ends.is_set)
    monkeypatch.setattr(process_end, "_LOOK_AGAIN", 0.01)
    monkeypatch.setattr(process_end, "_SAY_AGAIN", 0.05)

    def compile_something() -> None:
        try:
            while len(raised) < 2:  # as a compiler that goes on after the first
                try:
                    while True:
                        time.sleep(0.001)
                except ProcessEndsError as error:
                    raised.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=compile_something)
    thread.start()
    end_with_the_process(thread, done)
    time.sleep(0.1)
    assert not raised, "the process goes on"
    ends.set()
    thread.join(30)
    assert len(raised) == 2


def test_who_is_done_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_end, "process_ends", lambda: True)
    monkeypatch.setattr(process_end, "_LOOK_AGAIN", 0.01)
    done, go, raised = threading.Event(), threading.Event(), []

    def compile_something() -> None:
        try:
            go.wait(30)
            time.sleep(0.2)
        except ProcessEndsError as error:
            raised.append(error)

    done.set()
    thread = threading.Thread(target=compile_something)
    thread.start()
    end_with_the_process(thread, done)
    go.set()
    thread.join(30)
    assert not raised


def test_a_thread_that_does_not_listen_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_end, "process_ends", lambda: True)
    monkeypatch.setattr(process_end, "_LOOK_AGAIN", 0.001)
    monkeypatch.setattr(process_end, "_SAY_AGAIN", 0.001)
    done, held = threading.Event(), threading.Lock()
    held.acquire()
    ended: list[bool] = []

    def hang() -> None:
        try:
            held.acquire()  # in C, where no exception comes up
        except ProcessEndsError:
            pass
        finally:
            done.set()
            ended.append(True)

    thread = threading.Thread(target=hang, name="the compiler")
    thread.start()
    try:
        end_with_the_process(thread, done)
        began = time.monotonic()
        while "the compiler" not in caplog.text and time.monotonic() - began < 30:
            time.sleep(0.01)
        time.sleep(0.05)
        assert caplog.text.count("the compiler") == 1, "once"
        # While it unwinds it is left alone.
        monkeypatch.setattr(process_end, "_SAY_AGAIN", 30.0)
        time.sleep(0.05)
    finally:
        held.release()
        thread.join(30)
    assert ended


def test_it_is_told_again_after_a_while_not_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_end, "process_ends", lambda: True)
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 5

    process_end._watch(threading.Thread(), SimpleNamespace(wait=wait))  # type: ignore[arg-type]
    look, say = process_end._LOOK_AGAIN, process_end._SAY_AGAIN
    assert waits == [look, say, look, say, look]
