"""The manager: threads, event loops, streams, bad input, limits, endings."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
import textwrap
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.engine_threads import engine_threads
from support.forked_python import run_python
from support.pace import held, slowed
from support.tiny_models import EOS, VOCAB, greedy_alone, ragged_prompts, tiny_model
from support.tiny_tokenizer import tiny_tokenizer

from hf_async_batching import (
    BatchingConfig,
    EngineClosedError,
    EngineFailedError,
    GenerationManager,
    QueueFullError,
    RequestTooLongError,
    UnsupportedArgumentError,
    UnsupportedModelError,
)
from hf_async_batching.core.plan import Features
from hf_async_batching.core.request import Request
from hf_async_batching.coverage.families import tiny_model as make_family
from hf_async_batching.engine.engine_thread import EngineThread
from hf_async_batching.runtime.size_text import size_text

PROMPTS = ragged_prompts(8, 30, seed=5)
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


def make(model: Any, **settings: Any) -> GenerationManager:
    return GenerationManager(
        model, BatchingConfig(**{"page_size": 16, "max_batch_tokens": 64, "max_rows": 8, "debug": True, **settings})
    )


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@pytest.mark.parametrize(("admission", "order"), [("fcfs", [0, 1, 2]), ("longest_first", [1, 2, 0])])
def test_the_order_in_which_requests_start(model: Any, admission: Any, order: list[int]) -> None:
    with make(model, max_rows=1, admission=admission) as manager:
        prompts = [(4, 5), (6, 7, 8), (9,)]
        requests = [
            Request(str(i), prompt, new) for i, (prompt, new) in enumerate(zip(prompts, (2, 9, 5), strict=True))
        ]
        results = [handle.result() for handle in manager.submit_requests(requests)]
    assert sorted(range(3), key=lambda i: results[i].metrics.queue_seconds) == order


def test_results_metrics_and_logprobs(model: Any) -> None:
    with make(model) as manager:
        result = manager.submit(torch.tensor(PROMPTS[1]), max_new_tokens=6, logprobs=True, **GREEDY).result(60)
        plain = manager.submit(PROMPTS[1], max_new_tokens=6, **GREEDY).result(60)
    assert result.token_ids == plain.token_ids == greedy_alone(model, PROMPTS[1], 6, eos_token_id=None)
    assert result.finish_reason == "length"
    assert plain.logprobs is None
    ids = torch.tensor([PROMPTS[1] + result.token_ids])
    with torch.no_grad():
        logprobs = model(ids).logits[0, len(PROMPTS[1]) - 1 : -1].log_softmax(-1)
    expected = [row[token].item() for row, token in zip(logprobs, result.token_ids, strict=True)]
    assert result.logprobs == pytest.approx(expected, abs=1e-4)
    metrics = result.metrics
    assert metrics.queue_seconds is not None
    assert metrics.time_to_first_token is not None
    assert 0 <= metrics.queue_seconds <= metrics.time_to_first_token <= metrics.total_seconds
    assert metrics.tokens_per_second is not None
    assert metrics.tokens_per_second > 0


def test_eos_is_part_of_the_output_and_ends_it(model: Any) -> None:
    full = greedy_alone(model, PROMPTS[2], 20, eos_token_id=None)
    stop = full[5]
    with make(model, depth=3) as manager:
        result = manager.submit(PROMPTS[2], max_new_tokens=20, do_sample=False, eos_token_id=stop).result(60)
    assert result.finish_reason == "eos"
    assert result.token_ids == full[: full.index(stop) + 1]


def test_lengths_follow_generate(model: Any) -> None:
    with make(model) as manager:
        assert len(manager.submit(PROMPTS[1], **GREEDY).result(60).token_ids) == 20, "generate's default"
        by_total = manager.submit(PROMPTS[1], max_length=len(PROMPTS[1]) + 3, **GREEDY)
        assert len(by_total.result(60).token_ids) == 3
        with pytest.raises(ValueError, match="max_length"):
            manager.submit(PROMPTS[1], max_length=len(PROMPTS[1]), **GREEDY)


def test_iteration_yields_tokens_as_they_come(model: Any) -> None:
    with make(model) as manager:
        with slowed(manager):
            handle = manager.submit(PROMPTS[3], max_new_tokens=200, **GREEDY)
            iterator = iter(handle)
            first = [next(iterator) for _ in range(3)]
            assert not handle.done, "tokens must arrive before the end"
        rest = list(iterator)
        assert first + rest == handle.result().token_ids == list(handle)


def test_async_iteration_and_many_at_once(model: Any) -> None:
    async def collect(handle: Any) -> list[int]:
        return [token async for token in handle]

    async def main(manager: GenerationManager) -> list[list[int]]:
        handles = [manager.submit(prompt, max_new_tokens=9, **GREEDY) for prompt in PROMPTS]
        return await asyncio.gather(*[collect(handle) for handle in handles])

    with make(model) as manager:
        manager.warmup()
        got = asyncio.run(main(manager))
    assert got == [greedy_alone(model, prompt, 9, eos_token_id=None) for prompt in PROMPTS]


@pytest.mark.parametrize("consumer", ["thread", "event loop"])
def test_a_stuck_consumer_holds_up_nobody(model: Any, consumer: str) -> None:
    """Its own request ends behind its back, and another one's tokens flow from first to last."""
    release, stuck = threading.Event(), threading.Event()
    got: list[int] = []

    def take(token: int) -> None:
        got.append(token)
        stuck.set()
        assert release.wait(60)

    def in_thread(handle: Any) -> None:
        for token in handle:
            take(token)

    async def in_loop(handle: Any) -> None:
        async for token in handle:
            take(token)  # blocks the loop, as a handler that computes does

    with make(model) as manager:
        slow = manager.submit(PROMPTS[3], max_new_tokens=40, **GREEDY)
        target = in_thread if consumer == "thread" else lambda handle: asyncio.run(in_loop(handle))
        thread = threading.Thread(target=target, args=(slow,), daemon=True)
        thread.start()
        assert stuck.wait(60)
        other = manager.submit(PROMPTS[4], max_new_tokens=60, **GREEDY)
        assert list(other) == greedy_alone(model, PROMPTS[4], 60, eos_token_id=None)
        assert len(slow.result(60).token_ids) == 40
        assert len(got) == 1
        release.set()
        thread.join(60)
        assert got == slow.token_ids


def test_cancel_returns_what_there_is_and_frees_everything(model: Any) -> None:
    with make(model, depth=2) as manager:
        with slowed(manager):
            handle = manager.submit(PROMPTS[3], max_new_tokens=400, **GREEDY)
            other = manager.submit(PROMPTS[4], max_new_tokens=30, **GREEDY)
            for count, _ in enumerate(handle):
                if count == 4:
                    handle.cancel()
        result = handle.result(60)
        assert result.finish_reason == "cancelled"
        assert 5 <= len(result.token_ids) < 400
        full = greedy_alone(model, PROMPTS[3], len(result.token_ids), eos_token_id=None)
        assert result.token_ids == full
        assert other.result(60).token_ids == greedy_alone(model, PROMPTS[4], 30, eos_token_id=None)
        handle.cancel()
        wait_until(lambda: manager.stats().pages_in_use == manager.stats().rows_in_use == 0)


def test_cancel_while_waiting(model: Any) -> None:
    with make(model, max_rows=1) as manager:
        with held(manager):
            running = manager.submit(PROMPTS[3], max_new_tokens=100, **GREEDY)
            waiting = manager.submit(PROMPTS[4], max_new_tokens=100, **GREEDY)
            waiting.cancel()
        assert waiting.result(60).finish_reason == "cancelled"
        assert waiting.result().token_ids == []
        assert waiting.result().metrics.time_to_first_token is None
        running.cancel()


BAD = [
    ({"input_ids": []}, ValueError, "empty"),
    ({"input_ids": [5, VOCAB]}, ValueError, f"token id {VOCAB}"),
    ({"input_ids": [-1]}, ValueError, "token id -1"),
    ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, ValueError, "submit each row"),
    ({"input_ids": torch.ones(1, 1, 3, dtype=torch.long)}, ValueError, "1-D"),
    ({"input_ids": torch.ones(3)}, ValueError, "1-D integer"),
    ({"input_ids": "text"}, ValueError, r"`tokenizer`.*tokenizer=\.\.\. to GenerationManager"),
    ({"input_ids": {"input_ids": [5]}}, ValueError, "its entry `input_ids`"),
    ({"input_ids": [{"role": "user", "content": "Hi"}]}, ValueError, "apply_chat_template"),
    ({"input_ids": [1.5]}, ValueError, "ints"),
    ({"input_ids": [5] * 600}, RequestTooLongError, "shorten the prompt"),
    ({"input_ids": [5] * 300, "max_new_tokens": 300}, RequestTooLongError, "max_new_tokens"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    ({"max_new_tokens": 4, "min_new_tokens": 5}, ValueError, "min_new_tokens"),
    ({"temperature": math.nan, "do_sample": True}, ValueError, "temperature"),
    ({"temperature": -1.0, "do_sample": True}, ValueError, "temperature"),
    ({"top_p": 1.5, "do_sample": True}, ValueError, "top_p"),
    ({"seed": -3, "do_sample": True}, ValueError, "seed"),
    ({"num_beams": 3}, UnsupportedArgumentError, "num_beams"),
    ({"num_return_sequences": 2, "do_sample": True}, UnsupportedArgumentError, "num_return_sequences"),
    ({"stop_strings": ["x"]}, ValueError, "tokenizer"),
    ({"attention_mask": torch.ones(1, 3)}, TypeError, "attention_mask"),
    ({"no_such_field": 1}, TypeError, "no_such_field"),
    ({"max_new_token": 1}, TypeError, r"did you mean `max_new_tokens`\?"),
    ({"logprob": True}, TypeError, r"did you mean `logprobs`\?"),
]


def test_bad_input_reaches_its_caller_alone(model: Any) -> None:
    with make(model, depth=2) as manager:
        good = [manager.submit(prompt, max_new_tokens=60, **GREEDY) for prompt in PROMPTS]
        for arguments, error, match in BAD:
            with pytest.raises(error, match=match):
                manager.submit(**{"input_ids": [5, 6], "max_new_tokens": 3, **arguments})
        twin = manager.submit([5, 6], max_new_tokens=100, request_id="twin", **GREEDY)
        with pytest.raises(ValueError, match="'twin' is in use"):
            manager.submit([5, 6], max_new_tokens=3, request_id="twin", **GREEDY)
        with held(manager):
            doomed = manager.submit([5, 6], max_new_tokens=300, **GREEDY)
            doomed.cancel()
        assert doomed.result(60).finish_reason == "cancelled"
        assert [handle.result(60).token_ids for handle in good] == [
            greedy_alone(model, prompt, 60, eos_token_id=None) for prompt in PROMPTS
        ]
        assert len(twin.result(60).token_ids) == 100
    for closed_call in (lambda: manager.submit([5], max_new_tokens=1), manager.warmup):
        with pytest.raises(EngineClosedError, match="closed"):
            closed_call()


def test_more_end_of_sequence_tokens_than_the_device_knows(model: Any) -> None:
    """The host ends the request by any of them; a minimum length, which the device enforces, is transformers' own."""
    full = greedy_alone(model, PROMPTS[2], 20, eos_token_id=None)
    stop = full[5]
    eos = [*[token for token in range(VOCAB) if token not in full][:16], stop]
    with make(model, depth=3) as manager:
        result = manager.submit(PROMPTS[2], max_new_tokens=20, do_sample=False, eos_token_id=eos).result(60)
        assert result.token_ids == full[: full.index(stop) + 1]
        assert result.finish_reason == "eos"
        by_hand = Request("by hand", tuple(PROMPTS[2]), 20, 3, tuple(eos))
        with pytest.raises(UnsupportedArgumentError, match="more than 16 end-of-sequence tokens"):
            manager.submit_request(by_hand)
        served = manager.submit(PROMPTS[2], max_new_tokens=20, min_new_tokens=8, do_sample=False, eos_token_id=eos)
        expected = greedy_alone(model, PROMPTS[2], 20, min_new_tokens=8, eos_token_id=eos, pad_token_id=0)
        assert served.result(60).token_ids == expected


def test_longer_than_the_whole_cache(model: Any) -> None:
    with make(model, num_pages=3) as manager:
        with pytest.raises(RequestTooLongError, match="whole KV cache of 48 tokens"):
            manager.submit([5] * 40, max_new_tokens=9, **GREEDY)
        assert len(manager.submit([5] * 40, max_new_tokens=8, **GREEDY).result(60).token_ids) == 8


def test_shortage_of_pages_changes_no_token(model: Any) -> None:
    with make(model, num_pages=8, depth=2) as manager:
        with held(manager):
            handles = [manager.submit(prompt, max_new_tokens=50, **GREEDY) for prompt in PROMPTS]
        got = [handle.result(120).token_ids for handle in handles]
        assert manager.stats().preemptions > 0
    assert got == [greedy_alone(model, prompt, 50, eos_token_id=None) for prompt in PROMPTS]


def test_a_warm_up_captures_for_the_requests_that_it_is_shown(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[list[Features]] = []
    monkeypatch.setattr(EngineThread, "warm", lambda self, features, tune=False: warmed.append(features))
    with make(model) as manager:
        manager.warmup()
        greedy = manager.make_request([1], do_sample=False)
        drawn = manager.make_request([1, 2], do_sample=True, temperature=0.7, top_k=0, top_p=0.9)
        penalized = manager.make_request([3], do_sample=False, repetition_penalty=1.2)
        manager.warmup(request for request in (greedy, drawn, penalized, drawn))
        steps = manager.stats().steps
    assert warmed[0] == [Features()]
    assert warmed[1][0] == Features() and len(warmed[1]) == 3, "each once"
    assert warmed[1][1].sampling and not warmed[1][1].penalty
    assert warmed[1][2].penalty and not warmed[1][2].sampling
    assert steps < 8, "examples are not run"


def threads_that_order(manager: GenerationManager) -> list[str]:
    """The threads, by name, that order later steps after what they have enqueued; it grows from now on."""
    assert manager.assembly is not None
    pipeline, calls = manager.assembly.engine.pipeline, []
    ordered = pipeline.order_after_caller

    def order_after_caller() -> None:
        calls.append(threading.current_thread().name)
        ordered()

    pipeline.order_after_caller = order_after_caller  # type: ignore[method-assign]
    return calls


def test_steps_run_after_what_the_caller_has_enqueued(model: Any) -> None:
    with make(model) as manager:
        manager.warmup()
        calls = threads_that_order(manager)
        manager.submit([5], max_new_tokens=1, **GREEDY).result(30)
        assert calls == [threading.current_thread().name], "each submission marks its caller's stream, in its thread"


def test_full_inbox(model: Any) -> None:
    with make(model, max_rows=1, max_waiting=2) as manager:
        with slowed(manager, 0.02):
            handles = [manager.submit([5], max_new_tokens=300, **GREEDY)]
            wait_until(lambda: manager.stats().running == 1)
            handles += [manager.submit([5], max_new_tokens=2, **GREEDY) for _ in range(2)]
            with pytest.raises(QueueFullError, match="max_waiting=2"):
                manager.submit([5], max_new_tokens=2, **GREEDY)
            handles[0].cancel()
        assert all(len(handle.result(60).token_ids) == 2 for handle in handles[1:])


def test_result_timeout(model: Any) -> None:
    with make(model) as manager, held(manager):
        handle = manager.submit([5], max_new_tokens=400, **GREEDY)
        with pytest.raises(TimeoutError, match="goes on"):
            handle.result(timeout=0.001)
        handle.cancel()


def test_close_fails_the_live_with_their_tokens_kept(model: Any) -> None:
    manager = make(model)
    with slowed(manager):
        handle = manager.submit(PROMPTS[3], max_new_tokens=400, **GREEDY)
        wait_until(lambda: len(handle.token_ids) > 3)
        manager.close()
    with pytest.raises(EngineClosedError, match="closed while"):
        handle.result(60)
    with pytest.raises(EngineClosedError):
        list(handle)
    kept = handle.token_ids
    assert kept == greedy_alone(model, PROMPTS[3], len(kept), eos_token_id=None)
    manager.close()


def test_engine_failure_reaches_everyone_and_the_next_call_starts_afresh(model: Any, caplog: Any) -> None:
    with make(model) as manager:
        with slowed(manager):
            handles = [manager.submit(prompt, max_new_tokens=300, **GREEDY) for prompt in PROMPTS[:3]]
            wait_until(lambda: all(handle.token_ids for handle in handles))
            assembly = manager.assembly
            assert assembly is not None
            assembly.forward.bind(None, None)  # type: ignore[arg-type]
        for handle in handles:
            with pytest.raises(EngineFailedError, match="the engine failed") as caught:
                handle.result(60)
            assert caught.value.__cause__ is not None
            assert handle.token_ids
        cache = weakref.ref(assembly.cache)
        del assembly, caught
        got = manager.submit(PROMPTS[1], max_new_tokens=5, **GREEDY).result(60).token_ids
        assert got == greedy_alone(model, PROMPTS[1], 5, eos_token_id=None)
        gc.collect()
        assert cache() is None, "the failed engine's pages are still held"


def test_idle_engine_stops_and_starts_again(model: Any) -> None:
    with make(model, idle_timeout=0.2) as manager:
        first = manager.submit(PROMPTS[1], max_new_tokens=5, **GREEDY).result(60).token_ids
        assembly = manager.assembly
        cache = weakref.ref(assembly.cache) if assembly is not None else None
        del assembly
        wait_until(lambda: manager.assembly is None)
        # The thread may hold it for a moment longer.
        wait_until(lambda: cache is None or gc.collect() < 0 or cache() is None)
        assert manager.submit(PROMPTS[1], max_new_tokens=5, **GREEDY).result(60).token_ids == first


def test_a_collected_model_takes_its_shared_manager_along() -> None:
    import hf_async_batching

    model = tiny_model("Llama")
    hf_async_batching.generate(model, torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
    manager = hf_async_batching.get_manager(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None, "the shared manager keeps the model alive"
    wait_until(lambda: manager.assembly is None)


def test_new_weights_tensors_are_noticed(model: Any) -> None:
    changed = tiny_model("Llama")
    with make(changed) as manager:
        manager.submit(PROMPTS[1], max_new_tokens=3, **GREEDY).result(60)
        changed.to(torch.float64)
        got = manager.submit(PROMPTS[1], max_new_tokens=8, **GREEDY).result(60).token_ids
        assert got == greedy_alone(changed, PROMPTS[1], 8, eos_token_id=None)
        with torch.no_grad():
            changed.lm_head.weight.copy_(changed.lm_head.weight.flip(0))
        got = manager.submit(PROMPTS[1], max_new_tokens=8, **GREEDY).result(60).token_ids
        assert got == greedy_alone(changed, PROMPTS[1], 8, eos_token_id=None)


# Two full pages and a bit.
LONG = ragged_prompts(2, 40, seed=8)[-1]


def optimizer_step(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.05).step()


def load_others(model: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    state = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)


def rotary_buffers(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


@pytest.mark.parametrize("change", [optimizer_step, load_others, rotary_buffers])
def test_pages_of_old_weights_are_not_found(change: Any) -> None:
    changed = tiny_model("Llama")
    with make(changed) as manager:
        for cached in (0, 32):
            old = manager.submit(LONG, max_new_tokens=8, **GREEDY).result(60)
            assert old.metrics.cached_prompt_tokens == cached
        assembly = manager.assembly
        change(changed)
        fresh = greedy_alone(changed, LONG, 8, eos_token_id=None)
        assert fresh != old.token_ids
        for cached in (0, 32):
            new = manager.submit(LONG, max_new_tokens=8, **GREEDY).result(60)
            assert (new.token_ids, new.metrics.cached_prompt_tokens) == (fresh, cached)
        assert manager.assembly is assembly, "the engine goes on"


@pytest.mark.parametrize("inference", [False, True])
def test_changes_that_torch_does_not_count_have_to_be_said(inference: bool) -> None:
    with torch.inference_mode(inference):
        changed = tiny_model("Llama")
    with make(changed) as manager:
        manager.weights_updated()
        assert manager.assembly is None, "nothing to tell, and nothing is started for it"
        manager.submit(LONG, max_new_tokens=8, **GREEDY).result(60)
        with torch.inference_mode(inference):
            generator = torch.Generator().manual_seed(4)
            for parameter in changed.parameters():
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        fresh = greedy_alone(changed, LONG, 8, eos_token_id=None)
        stale = manager.submit(LONG, max_new_tokens=8, **GREEDY).result(60)
        assert stale.metrics.cached_prompt_tokens == 32
        assert stale.token_ids != fresh
        manager.weights_updated()
        assert manager.submit(LONG, max_new_tokens=8, **GREEDY).result(60).token_ids == fresh


def test_live_requests_go_on_and_leave_nothing_of_old_weights_behind() -> None:
    changed = tiny_model("Llama")
    with make(changed) as manager:
        live = manager.submit(LONG, max_new_tokens=400, **GREEDY)
        wait_until(lambda: len(live.token_ids) > 20)
        with torch.no_grad():
            changed.model.layers[0].self_attn.v_proj.weight.mul_(-0.5)
        manager.weights_updated()
        wait_until(lambda: len(live.token_ids) > 60)
        live.cancel()
        tokens = live.result(20).token_ids
        for prompt in (LONG, LONG + tokens[:50]):
            got = manager.submit(prompt, max_new_tokens=8, **GREEDY).result(60).token_ids
            assert got == greedy_alone(changed, prompt, 8, eos_token_id=None)


def test_saying_it_frees_pages_at_once_and_orders_later_steps_after_the_change(model: Any) -> None:
    with make(model) as manager:
        manager.submit(LONG, max_new_tokens=8, **GREEDY).result(60)
        assert manager.stats().prefix_pages == 2
        calls = threads_that_order(manager)
        manager.weights_updated()
        assert calls == [threading.current_thread().name]
        wait_until(lambda: manager.stats().prefix_pages == 0)
        assert manager.stats().prefix_query_tokens == len(LONG)


def test_timeline_and_trace(model: Any, tmp_path: Path) -> None:
    with make(model, timeline_steps=16) as manager:
        assert manager.timeline().steps == ()
        manager.submit(PROMPTS[1], max_new_tokens=40, **GREEDY).result(60)
        timeline = manager.timeline()
        stats = manager.stats()
    assert len(timeline.steps) == 16
    assert stats.steps >= 40
    assert 0 < timeline.busy_fraction <= 1
    assert 0 < timeline.host_ms_per_step < timeline.ms_per_step
    timeline.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {
        "host",
        "h2d",
        "compute",
        "d2h",
    }


def test_the_depth_changes_while_requests_run_and_no_token_with_it(model: Any) -> None:
    with make(model, depth=2) as manager:
        manager.set_depth(1)  # before there is an engine
        handles = [manager.submit(prompt, max_new_tokens=40, **GREEDY) for prompt in PROMPTS]
        assert manager.stats().depth == 1
        for i, _ in enumerate(handles[0]):
            manager.set_depth(1 + i % 2)
        tokens = [handle.result(60).token_ids for handle in handles]
        with pytest.raises(ValueError, match="from 1 to 2, got 3"):
            manager.set_depth(3)
        manager.set_depth(None)
        stats = manager.stats()
    assert (stats.depth, stats.finished) == (2, len(PROMPTS))
    assert tokens == [greedy_alone(model, prompt, 40, eos_token_id=None) for prompt in PROMPTS]


def test_reading_from_time_to_time_wakes_nobody(model: Any) -> None:
    with make(model, max_rows=1) as manager:
        with slowed(manager, 0.05):
            first = manager.submit(PROMPTS[0], max_new_tokens=60, **GREEDY)
            second = manager.submit(PROMPTS[1], max_new_tokens=30, **GREEDY)
            wait_until(lambda: first.tokens_from(0))
            assert first.started
            assert not second.started, "there is one row only"
        seen: list[int] = []
        while not second.done:
            seen += second.tokens_from(len(seen))
            time.sleep(0.002)
        seen += second.tokens_from(len(seen))
        assert second.started
        assert seen == second.result().token_ids
        steps = manager.timeline().steps
        assert manager.timeline(after=steps[-3].step).steps == steps[-2:]


def test_unserved_models_are_refused_by_name() -> None:
    import transformers

    musicgen = make_family("MusicgenForCausalLM")
    with pytest.raises(UnsupportedModelError, match="MusicgenForCausalLM is not served: it has no embedding"):
        GenerationManager(musicgen)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration"):
        GenerationManager(t5)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        GenerationManager(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_interpreter_exit_never_hangs() -> None:
    code = textwrap.dedent(
        """
        import torch
        from support.tiny_models import tiny_model
        from hf_async_batching import GenerationManager, generate
        model = tiny_model("Llama")
        generate(model, torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
        manager = GenerationManager(model)
        handle = manager.submit([5], max_new_tokens=400, do_sample=False, eos_token_id=None)
        next(iter(handle))
        print("leaving")
        """
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "leaving\n"


def test_concurrent_submitters_start_one_engine(model: Any) -> None:
    before = engine_threads()
    with make(model) as manager:
        results: list[Any] = []

        def call(prompt: list[int]) -> None:
            results.append((prompt, manager.submit(prompt, max_new_tokens=10, **GREEDY).result(60).token_ids))

        threads = [threading.Thread(target=call, args=(prompt,)) for prompt in PROMPTS * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (engine,) = engine_threads() - before
    assert len(results) == 24
    for prompt, tokens in results[:8]:
        assert tokens == greedy_alone(model, prompt, 10, eos_token_id=None)
    engine.join(60)
    assert not engine.is_alive()


def test_config_eos_of_the_model_is_used(model: Any) -> None:
    assert model.generation_config.eos_token_id == EOS
    with make(model) as manager:
        handle = manager.submit(PROMPTS[1], max_new_tokens=5, do_sample=False)
        assert handle.result(60).token_ids == greedy_alone(model, PROMPTS[1], 5)


def test_texts_in_and_out_with_a_tokenizer_given_once(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("helloworld").input_ids
    config = BatchingConfig(page_size=16, max_rows=8)
    with GenerationManager(model, config, tokenizer=tokenizer) as manager:
        expected = manager.submit(ids, max_new_tokens=12, **GREEDY).result(60).token_ids
        assert expected == greedy_alone(model, ids, 12, eos_token_id=None)
        forms = ["helloworld", torch.tensor([ids]), np.array(ids, "u2"), np.array([ids])]
        handles = [manager.submit(form, max_new_tokens=12, **GREEDY) for form in forms]
        assert [handle.result(60).token_ids for handle in handles] == [expected] * len(forms)
        assert manager.make_request("helloworld", max_new_tokens=1).prompt == tuple(ids)
        assert "".join(handles[0].text()) == tokenizer.decode(expected)
        stop = tokenizer.decode(expected[3])
        stopped = manager.submit("helloworld", max_new_tokens=12, stop_strings=stop, **GREEDY)
        assert stopped.result(60).finish_reason == "stop"
        assert "".join(stopped.text()) == tokenizer.decode(stopped.token_ids)
    with make(model) as manager:
        handle = manager.submit("helloworld", max_new_tokens=12, tokenizer=tokenizer, **GREEDY)
        assert handle.result(60).token_ids == expected
        with pytest.raises(ValueError, match="`tokenizer`"):
            manager.submit("helloworld", max_new_tokens=12)


@pytest.mark.parametrize("stop_strings", [None, "zzzzzz"])
def test_a_task_that_is_cancelled_ends_its_request(model: Any, stop_strings: Any) -> None:
    async def main(manager: GenerationManager) -> None:
        handle = manager.submit(PROMPTS[3], max_new_tokens=400, cancel_on_abandon=True, **arguments)
        other = manager.submit(PROMPTS[4], max_new_tokens=30, **GREEDY)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle, 0.05)
        assert (await handle).finish_reason == "cancelled"
        assert (await other).token_ids == greedy_alone(model, PROMPTS[4], 30, eos_token_id=None)

    arguments = {**GREEDY, "stop_strings": stop_strings, "tokenizer": tiny_tokenizer()}
    with make(model) as manager:
        manager.warmup()
        with slowed(manager, 0.02):
            asyncio.run(main(manager))


def test_repr_says_the_state_and_figures() -> None:
    model = tiny_model("Llama")
    manager = make(model, num_pages=40)
    name = type(model).__name__
    assert repr(manager) == f"GenerationManager({name}, engine not running)"
    with manager:
        manager.submit([5, 6], max_new_tokens=2, **GREEDY).result(60)
        wait_until(lambda: manager.stats().rows_in_use == 0)
        pattern = (
            rf"GenerationManager\({name}, 0 running, 0 waiting, [\d,]+ tok/s, 0 of 40 pages, KV cache [\d.]+ [KM]iB\)"
        )
        assert re.fullmatch(pattern, repr(manager)), repr(manager)
        figures = repr(manager.stats())
        assert "running=0" in figures and "pages_total=40" in figures
        assert not re.search(r"\d\.\d{5}", figures), "rounded"
        assert repr(manager.timeline()).startswith("Timeline(CPU, ")
    assert repr(manager) == "GenerationManager(closed)"


def test_dir_shows_what_a_person_may_use(model: Any) -> None:
    with make(model) as manager:
        shown = {name for name in dir(manager) if not name.startswith("_")}
    assert shown == {
        *("submit", "submit_requests", "make_request", "bind", "warmup", "stats", "timeline", "config", "model"),
        *("close", "closed", "set_depth", "weights_updated", "model_changed", "follow"),
    }


def test_a_second_engine_of_a_model_is_told_once(caplog: Any) -> None:
    model = tiny_model("Llama")

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if "a second engine" in record.getMessage()]

    with caplog.at_level("WARNING"), make(model, num_pages=40) as first, make(model, num_pages=40) as second:
        first.submit([5], max_new_tokens=1, **GREEDY).result(60)
        assert told() == [], "a manager that serves nothing has no engine"
        second.submit([5], max_new_tokens=1, **GREEDY).result(60)
        (message,) = told()
        size = size_text(first.stats().cache_bytes)
        assert f"its KV cache takes {size} beside the other's {size}" in message
        assert "custom_generate=manager.bind()" in message
        with make(model, num_pages=40) as third:
            third.submit([5], max_new_tokens=1, **GREEDY).result(60)
        assert len(told()) == 1
        with make(tiny_model("Llama"), num_pages=40) as other:
            other.submit([5], max_new_tokens=1, **GREEDY).result(60)
        assert len(told()) == 1, "another model"
