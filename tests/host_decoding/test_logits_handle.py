"""Handles that bring logits: what ends a wait for them."""

from __future__ import annotations

import threading

import pytest
import torch

from hf_async_batching import EngineClosedError, EngineFailedError, ReentrantCallError
from hf_async_batching.host_decoding.logits_handle import LogitsHandle

pytestmark = pytest.mark.timeout(30)


def make(**options: object) -> LogitsHandle:
    return LogitsHandle("a", lambda handle: handle._finish("cancelled"), lambda choices: None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("when", ["before the wait", "during the wait"])
def test_an_error_of_the_engine_ends_the_wait_as_itself(when: str) -> None:
    handle, error = make(), EngineFailedError("the engine failed")
    failing = threading.Timer(0.05, handle._fail, (error,))
    if when == "before the wait":
        handle._fail(error)
    else:
        failing.start()
    with pytest.raises(EngineFailedError, match="the engine failed") as caught:
        handle.next_logits()
    assert caught.value is error
    assert handle._watchers == 0


def test_a_cancelled_request_says_so() -> None:
    handle = make()
    handle.cancel()
    with pytest.raises(EngineClosedError, match="request a was cancelled while its tokens were being chosen"):
        handle.next_logits()


def test_logits_are_taken_once_and_the_first_ones_start_the_chooser() -> None:
    started: list[int] = []
    handle = make(on_first=lambda: started.append(1))
    first, second = torch.ones(3), torch.zeros(3)
    handle._offer(first)
    assert handle.next_logits() is first
    later = threading.Timer(0.05, handle._offer, (second,))
    later.start()
    assert handle.next_logits() is second
    assert started == [1]


def test_a_chooser_that_cannot_start_ends_its_request() -> None:
    def no_thread() -> None:
        raise RuntimeError("can't start new thread")

    handle = make(on_first=no_thread)
    handle._offer(torch.ones(3))
    assert handle.done
    handle = LogitsHandle("a", lambda handle: None, lambda choices: None, on_first=no_thread)
    handle._offer(torch.ones(3))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        handle.result(1)


def test_the_engines_own_thread_does_not_wait_for_itself() -> None:
    handle = make(threads=(threading.current_thread(),))
    with pytest.raises(ReentrantCallError, match="a call with logits processors"):
        handle.next_logits()
