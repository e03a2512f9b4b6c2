"""From logits to a caller's handle, without an engine: what ends a request, and what comes after its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers.generation import LogitsProcessorList

from hf_async_batching import EngineFailedError
from hf_async_batching.core.request import Request
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.host_decoding.chosen_handles import ChosenHandle, make_handles
from hf_async_batching.host_decoding.token_chooser import TokenChooser

pytestmark = pytest.mark.timeout(30)
TIMEOUT = 20.0


def chooser(act: Callable[[int], object]) -> TokenChooser:
    """Takes the arg-max, after `act` was called with the length of the history."""

    def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        act(input_ids.shape[1])
        return scores

    processors: Any = LogitsProcessorList([processor])
    return TokenChooser(processors, torch.tensor([[4, 5]]), do_sample=False, seeds=[0], lengths=[2])


def one_hot(token: int) -> torch.Tensor:
    logits = torch.zeros(8)
    logits[token] = 1.0
    return logits


class Served:
    """A request whose engine offers the logits of one token after the other."""

    def __init__(self, act: Callable[[int], object] = lambda length: None, **fields: Any) -> None:
        self.cancelled = threading.Event()
        request = Request("a", (4, 5), **{"max_new_tokens": 3, **fields}, chooser=chooser(act))
        self.chosen = ChosenHandle(request, self.cancel, self.choose, (), nullcontext)
        self.tokens = iter(range(1, 8))

    def cancel(self, handle: GenerationHandle) -> None:
        self.cancelled.set()
        handle._finish("cancelled")

    def choose(self, choices: Any) -> None:
        self.offer()

    def offer(self) -> None:
        self.chosen.inner._offer(one_hot(next(self.tokens)))

    def wait(self) -> None:
        self.chosen._thread.join(TIMEOUT)
        assert not self.chosen._thread.is_alive()


def test_tokens_are_chosen_up_to_the_length() -> None:
    served = Served()
    served.offer()
    result = served.chosen.outer.result(TIMEOUT)
    assert (result.token_ids, result.finish_reason) == ([1, 2, 3], "length")
    served.wait()
    assert served.cancelled.is_set(), "the engine's request ends with the caller's"


def test_an_end_of_sequence_token_ends_it() -> None:
    served = Served(eos_token_ids=(2,))
    served.offer()
    result = served.chosen.outer.result(TIMEOUT)
    assert (result.token_ids, result.finish_reason) == ([1, 2], "eos")


def test_a_token_that_is_chosen_after_the_end_is_dropped() -> None:
    """The caller cancels while the processors run: what they come to is seen by no one."""
    inside, go_on = threading.Event(), threading.Event()

    def act(length: int) -> None:
        if length == 3:
            inside.set()
            go_on.wait(TIMEOUT)

    served = Served(act, output_scores=True)
    served.offer()
    assert inside.wait(TIMEOUT)
    outer = served.chosen.outer
    outer.cancel()
    assert outer.result(TIMEOUT).finish_reason == "cancelled"
    go_on.set()
    served.wait()
    result = outer.result(TIMEOUT)
    assert result.token_ids == [1]
    assert result.scores is not None and len(result.scores) == 1


def test_what_a_processor_raises_is_its_callers_and_frees_the_row() -> None:
    error = ValueError("broken")

    def act(length: int) -> None:
        if length == 3:
            raise error

    served = Served(act)
    served.offer()
    with pytest.raises(ValueError, match="broken") as caught:
        served.chosen.outer.result(TIMEOUT)
    assert caught.value is error
    assert served.chosen.outer.token_ids == [1]
    assert served.cancelled.wait(TIMEOUT)


def test_what_ends_the_engines_request_ends_the_callers() -> None:
    served = Served()
    served.chosen.inner._fail(EngineFailedError("the engine failed"))
    with pytest.raises(EngineFailedError, match="the engine failed"):
        served.chosen.outer.result(TIMEOUT)
    served = Served()
    served.chosen.inner._finish("cancelled")
    assert served.chosen.outer.result(TIMEOUT).finish_reason == "cancelled"


def test_only_requests_with_a_chooser_have_two_handles() -> None:
    plain = Request("plain", (1,), 2, output_scores=True)
    chosen = Request("chosen", (1,), 2, chooser=chooser(lambda length: None))
    thread = threading.current_thread()
    inner, outer = make_handles([plain, chosen], lambda handle: None, lambda choices: None, thread, nullcontext)
    assert inner[0] is outer[0] and inner[0].has_scores
    assert inner[1] is not outer[1]
    assert [one.request_id for one in (*inner, *outer)] == ["plain", "chosen"] * 2
    assert all(thread in one._threads for one in (*inner, *outer))
