"""`submit` with stopping criteria: nothing beyond the stop is seen, nobody waits for a criterion."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.criteria import Raises, RowWise
from support.pace import held, slowed
from support.tiny_models import EOS, greedy_alone, ragged_prompts
from support.tiny_tokenizer import tiny_tokenizer
from transformers.generation import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.core.request import Request
from hf_async_batching.errors import ReentrantCallError
from hf_async_batching.handle import GenerationHandle, wake
from hf_async_batching.runtime.reentrancy import serve_in_this_thread, waiting_for
from hf_async_batching.stopping.criteria_relay import CriteriaThread, _CriteriaRelay

CONFIG = BatchingConfig(page_size=16, max_batch_tokens=64, debug=True)
PROMPTS = ragged_prompts(5, 30, seed=3)
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


def idle(manager: Any) -> None:
    deadline = time.monotonic() + 60
    while manager.stats().rows_in_use:
        assert time.monotonic() < deadline, "rows go on"
        time.sleep(0.01)


def stop_at(expected: list[int], at: int) -> set[int]:
    """The token at which a greedy completion stops for the first time at or before `at`."""
    return {expected[at]}


def cut(expected: list[int], tokens: set[int]) -> list[int]:
    end = next(i for i, token in enumerate(expected) if token in tokens)
    return expected[: end + 1]


def test_stop_strings_end_requests_where_generate_ends_them(model: Any, manager: Any, tokenizer: Any) -> None:
    handles, expected = [], []
    for prompt in PROMPTS:
        text = tokenizer.decode(greedy_alone(model, prompt, 40, eos_token_id=None))
        strings = [text[21:24], "zzzzzz"]
        arguments = {"max_new_tokens": 40, "stop_strings": strings, "tokenizer": tokenizer}
        expected.append(greedy_alone(model, prompt, eos_token_id=None, **arguments))
        handles.append(manager.submit(prompt, **GREEDY, **arguments))
    assert [handle.result(60).token_ids for handle in handles] == expected
    assert all(len(tokens) < 40 for tokens in expected)
    assert {handle.result().finish_reason for handle in handles} == {"stop"}
    metrics = handles[0].result().metrics
    assert metrics.queue_seconds is not None and metrics.time_to_first_token is not None
    idle(manager)


@pytest.mark.parametrize("way", ["iterator", "async"])
def test_readers_see_nothing_beyond_the_stop(model: Any, manager: Any, way: str) -> None:
    full = greedy_alone(model, PROMPTS[1], 40, eos_token_id=None)
    tokens = stop_at(full, 11)
    for own in (StopStringCriteria(tiny_tokenizer(), "zzzz"), RowWise(tokens)):
        handle = manager.submit(
            torch.tensor(PROMPTS[1]), max_new_tokens=40, stopping_criteria=[own, RowWise(tokens)], **GREEDY
        )
        if way == "iterator":
            seen = list(handle)
        else:

            async def read(handle: Any = handle) -> list[int]:
                return [token async for token in handle]

            seen = asyncio.run(read())
        assert seen == cut(full, tokens) == handle.token_ids == handle.result(60).token_ids
        assert handle.result().finish_reason == "stop"
        assert handle.done


def test_a_criterion_is_called_once_for_each_token(model: Any, manager: Any) -> None:
    prompt = PROMPTS[2]
    plain, ours = RowWise(set()), RowWise(set())
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, max_new_tokens=9, stopping_criteria=StoppingCriteriaList([plain]), **GREEDY, pad_token_id=0
    )
    handle = manager.submit(torch.tensor(prompt), max_new_tokens=9, stopping_criteria=[ours], **GREEDY)
    result = handle.result(60)
    assert result.token_ids == out[0, len(prompt) :].tolist()
    assert result.finish_reason == "length"
    assert ours.calls == plain.calls


def test_scores_of_what_was_shown(model: Any, manager: Any) -> None:
    full = greedy_alone(model, PROMPTS[1], 40, eos_token_id=None)
    tokens = stop_at(full, 7)
    seen: list[int] = []

    class Counts(RowWise):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(len(scores))
            assert scores[-1][0].argmax() == input_ids[0, -1]
            return super().__call__(input_ids, None)

    result = manager.submit(
        PROMPTS[1],
        max_new_tokens=40,
        stopping_criteria=[Counts(tokens)],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **GREEDY,
    ).result(60)
    assert result.token_ids == cut(full, tokens)
    assert len(result.scores) == len(result.logits) == len(result.token_ids) == len(seen)
    assert seen == list(range(1, len(seen) + 1))
    assert [int(scores.argmax()) for scores in result.scores] == result.token_ids


def test_reasons(model: Any, manager: Any) -> None:
    full = greedy_alone(model, PROMPTS[1], 40, eos_token_id=None)
    ends = stop_at(full, 7)
    both = manager.submit(
        PROMPTS[1], max_new_tokens=40, do_sample=False, eos_token_id=[*ends, EOS], stopping_criteria=[RowWise(ends)]
    )
    assert (both.result(60).token_ids, both.result().finish_reason) == (cut(full, ends), "eos")
    eos = manager.submit(
        PROMPTS[1], max_new_tokens=40, do_sample=False, eos_token_id=[*ends, EOS], max_time=1e9, logprobs=True
    )
    assert (eos.result(60).token_ids, eos.result().finish_reason) == (cut(full, ends), "eos")
    assert len(eos.result().logprobs) == len(eos.token_ids)
    length = manager.submit(PROMPTS[1], max_new_tokens=5, max_time=1e9, **GREEDY)
    assert (length.result(60).token_ids, length.result().finish_reason) == (full[:5], "length")
    mine = manager.submit(
        PROMPTS[1], max_new_tokens=5, max_time=1e9, stopping_criteria=[MaxTimeCriteria(0.0)], **GREEDY
    )
    assert (mine.result(60).token_ids, mine.result().finish_reason) == (full[:1], "stop"), "the caller's own counts"


def test_time_is_up_without_anybody_reading(manager: Any) -> None:
    handle = manager.submit([5, 6, 7], max_new_tokens=500, max_time=0.2, **GREEDY)
    deadline = time.monotonic() + 30
    while not handle.done:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert handle.result().finish_reason in ("stop", "length")


def test_a_criterion_that_raises_reaches_its_caller_alone(model: Any, manager: Any) -> None:
    innocent = manager.submit(PROMPTS[1], max_new_tokens=60, max_time=1e9, **GREEDY)
    guilty = manager.submit(PROMPTS[2], max_new_tokens=400, stopping_criteria=[Raises(4)], **GREEDY)
    with pytest.raises(ZeroDivisionError, match="own mistake"):
        guilty.result(60)
    assert guilty.token_ids == greedy_alone(model, PROMPTS[2], 3, eos_token_id=None), "what passed is kept"
    with pytest.raises(ZeroDivisionError):
        list(guilty)
    assert innocent.result(60).token_ids == greedy_alone(model, PROMPTS[1], 60, eos_token_id=None)
    idle(manager)


class Stuck(StoppingCriteria):
    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.entered.set()
        assert self.release.wait(60)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_stuck_criterion_holds_up_nobody_and_can_be_cancelled(model: Any, manager: Any, tokenizer: Any) -> None:
    stuck = Stuck()
    handle = manager.submit(PROMPTS[1], max_new_tokens=50, stopping_criteria=[stuck], **GREEDY)
    assert stuck.entered.wait(60)
    others = [
        manager.submit(prompt, max_new_tokens=20, stop_strings="zzzz", tokenizer=tokenizer, **GREEDY)
        for prompt in PROMPTS
    ]
    for prompt, other in zip(PROMPTS, others, strict=True):
        assert other.result(60).token_ids == greedy_alone(model, prompt, 20, eos_token_id=None)
    assert handle.token_ids == [] and not handle.done
    handle.cancel()
    result = handle.result(20)
    assert (result.token_ids, result.finish_reason) == ([], "cancelled")
    idle(manager)
    stuck.release.set()


def test_cancelling_keeps_what_was_shown(model: Any, manager: Any) -> None:
    with slowed(manager):
        handle = manager.submit(PROMPTS[1], max_new_tokens=480, max_time=1e9, **GREEDY)
        reader = iter(handle)
        first = [next(reader) for _ in range(3)]
        handle.cancel()
        result = handle.result(60)
    assert result.finish_reason == "cancelled"
    assert result.token_ids[:3] == first
    assert result.token_ids == greedy_alone(model, PROMPTS[1], len(result.token_ids), eos_token_id=None)
    idle(manager)


def test_closing_fails_the_handle(model: Any) -> None:
    with GenerationManager(model, CONFIG) as manager, slowed(manager):
        handles = [
            manager.submit(PROMPTS[1], max_new_tokens=480, max_time=1e9, **GREEDY),
            manager.submit(PROMPTS[1], max_new_tokens=480, stopping_criteria=[RowWise(set())], **GREEDY),
        ]
        for handle in handles:
            next(iter(handle))
    for handle in handles:
        with pytest.raises(RuntimeError, match="closed"):
            handle.result(20)


def test_threads_go_when_nobody_needs_them(model: Any) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "criteria" in thread.name]

    manager = GenerationManager(model, CONFIG)
    for _ in range(3):
        with held(manager):
            handles = [manager.submit(prompt, max_new_tokens=20, max_time=1e9, **GREEDY) for prompt in PROMPTS]
            handles += [
                manager.submit(prompt, max_new_tokens=20, stopping_criteria=[RowWise({5})], **GREEDY)
                for prompt in PROMPTS
            ]
        assert threads().count("hf_async_batching criteria") <= 1
        for handle in handles:
            handle.result(60)
        deadline = time.monotonic() + 60
        while threads():
            assert time.monotonic() < deadline, threads()
            time.sleep(0.01)
    # A manager that nobody holds finishes what it has.
    last = manager.submit(PROMPTS[0], max_new_tokens=30, max_time=1e9, **GREEDY)
    del manager
    gc.collect()
    assert len(last.result(60).token_ids) == 30


def test_mistakes_are_told_before_anything_is_queued(manager: Any, tokenizer: Any) -> None:
    steps = manager.stats().steps
    with pytest.raises(ValueError, match="`stop_strings` needs the model's tokenizer"):
        manager.submit([5], stop_strings="a", max_new_tokens=3)
    for bad in ([], [""], [5], ""):
        with pytest.raises(ValueError, match="`stop_strings`"):
            manager.submit([5], stop_strings=bad, tokenizer=tokenizer, max_new_tokens=3)
    time.sleep(0.05)
    assert manager.stats().steps == steps


# -- without an engine: a test fills the inner handle ----------------------------------------------------------------


def relayed(inner: GenerationHandle, *criteria: Any, threads: CriteriaThread | None = None) -> GenerationHandle:
    request = Request(inner.request_id, (5, 6), 9)
    return (threads or CriteriaThread()).relay(
        inner, request, StoppingCriteriaList(criteria), torch.device("cpu"), [5, 6]
    )


def push(inner: GenerationHandle, token: int) -> None:
    inner._push(token, None, time.perf_counter())
    wake((inner,))


@pytest.mark.parametrize("criterion", [RowWise(set()), MaxTimeCriteria(1e9)], ids=["own thread", "shared thread"])
def test_an_error_of_the_engine_ends_the_callers_handle(criterion: Any) -> None:
    inner = GenerationHandle("a", lambda _: None)
    outer = relayed(inner, criterion)
    assert all(thread.daemon for thread in outer._threads), "the process may end without it"
    push(inner, 7)
    inner._fail(RuntimeError("the engine's own mistake"))
    with pytest.raises(RuntimeError, match="engine's own mistake"):
        outer.result(20)
    assert outer.token_ids == [7]


@pytest.mark.parametrize("error", [True, False], ids=["error", "stop"])
def test_an_end_and_a_cancel_at_the_same_time_are_one_end(error: bool) -> None:
    """The criterion comes to its end while the caller's cancel is on its way to the engine."""
    cancelled: list[GenerationHandle] = []
    ended: list[GenerationHandle] = []

    def cancel(handle: GenerationHandle) -> None:
        cancelled.append(handle)
        if len(cancelled) == 1:
            push(handle, 7)
            deadline = time.monotonic() + 20
            while not outer.done and time.monotonic() < deadline:
                time.sleep(0.001)

    inner = GenerationHandle("a", cancel)
    outer = relayed(inner, Raises(1) if error else RowWise({7}))
    outer.add_done_callback(ended.append)
    outer.cancel()
    if error:
        with pytest.raises(ZeroDivisionError):
            outer.result(0)
    else:
        assert (outer.result(0).token_ids, outer.result(0).finish_reason) == ([7], "stop")
    assert ended == [outer]
    assert cancelled == [inner, inner], "the one who ended it told the engine, too"


def test_what_was_cancelled_ends_no_second_time() -> None:
    """The engine's handle ends after the caller's."""
    inner, ended = GenerationHandle("a", lambda _: None), list[GenerationHandle]()
    outer = relayed(inner, RowWise(set()))
    outer.add_done_callback(ended.append)
    outer.cancel()
    push(inner, 7)
    inner._finish("length")
    outer._threads[0].join(20)
    assert (outer.result(0).token_ids, outer.result(0).finish_reason) == ([], "cancelled")
    assert ended == [outer]


def test_a_forked_process_counts_its_own_requests() -> None:
    threads = CriteriaThread()
    threads._live = 3  # of the parent
    threads.renew()
    inner = GenerationHandle("a", lambda _: None)
    outer = relayed(inner, MaxTimeCriteria(1e9), threads=threads)
    inner._finish("length")
    assert outer.result(20).finish_reason == "length"
    outer._threads[0].join(20)
    assert not outer._threads[0].is_alive(), "no request needs it"


def test_a_forked_process_has_a_thread_of_its_own() -> None:
    threads = CriteriaThread()
    parents = GenerationHandle("a", lambda _: None)
    outer = relayed(parents, MaxTimeCriteria(1e9), threads=threads)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            inner = GenerationHandle("b", lambda _: None)
            of_child = relayed(inner, MaxTimeCriteria(1e9), threads=threads)
            inner._finish("length")
            code = int(of_child.result(5).finish_reason != "length")
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    parents._finish("length")
    assert outer.result(20).finish_reason == "length"


def test_the_thread_of_criteria_is_one_that_serves(manager: Any, tokenizer: Any) -> None:
    """A done-callback in it that waits for a thread which waits for it gets an error, or both would wait for ever."""
    outcome: list[Any] = []
    ended = threading.Event()

    def serve(own: threading.Thread) -> None:
        serve_in_this_thread()
        with waiting_for((own,), "result()"):
            waits.set()
            ended.wait(60)

    def back(handle: Any) -> None:
        other = threading.Thread(target=serve, args=(threading.current_thread(),), daemon=True)
        other.start()
        waits.wait(60)
        try:
            with waiting_for((other,), "result()"):
                outcome.append("waited")
        except ReentrantCallError as error:
            outcome.append(error)
        ended.set()

    waits = threading.Event()
    with held(manager):
        given = {"max_new_tokens": 3, "stop_strings": ["zzzzzz"], "tokenizer": tokenizer, **GREEDY}
        manager.submit(PROMPTS[0], **given).add_done_callback(back)
    assert ended.wait(60)
    assert isinstance(outcome[0], ReentrantCallError)


def test_a_forked_process_ends_nothing_that_its_parent_goes_on_with() -> None:
    class Part:
        pass

    part: Any = Part()
    seen = weakref.ref(part)
    relays = CriteriaThread()
    relays._serving = part, part
    del part
    relays.renew()
    gc.collect()
    assert relays._serving is None and seen() is not None


def test_nothing_is_passed_on_once_the_caller_has_left() -> None:
    """The caller may leave while a criterion runs."""
    relay: Any = None

    class Leaves:
        def step(self, tokens: list[int]) -> list[bool]:
            relay._over = True
            return [False]

    inner: Any = SimpleNamespace(_threads=(), _logprobs=None)
    stops: Any = SimpleNamespace(eos=())
    checker: Any = Leaves()
    relay = _CriteriaRelay(inner, Request("one", (5,), 3), checker, stops)
    assert relay._take(7) is True
    assert relay._count == 0 and relay.outer._tokens == []
    assert relay._take(8) is True


def test_what_is_known_when_a_request_starts_is_passed_on_once() -> None:
    class GoesOn:
        def step(self, tokens: list[int]) -> list[bool]:
            return [False]

    inner: Any = SimpleNamespace(_threads=(), _logprobs=None, _started=1.5, _cached=7, made=lambda name: None)
    stops: Any = SimpleNamespace(eos=())
    checker: Any = GoesOn()
    relay = _CriteriaRelay(inner, Request("one", (5,), 3), checker, stops)
    assert relay._take(7) is False
    assert (relay.outer._started, relay.outer._cached) == (1.5, 7)
    inner._started, inner._cached = 2.5, 9
    assert relay._take(8) is False
    assert (relay.outer._started, relay.outer._cached) == (1.5, 7)
    assert list(relay.outer._tokens) == [7, 8]
