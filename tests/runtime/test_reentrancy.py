"""A caller's code in an engine's own thread: what would wait for that thread is served otherwise, or gets an error."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pace import slowed
from support.tiny_models import greedy_alone, tiny_model
from transformers.generation import LogitsProcessorList

import hf_async_batching
from hf_async_batching import (
    BatchingConfig,
    EngineClosedError,
    GenerationManager,
    ReentrantCallError,
    generate_dataset,
)
from hf_async_batching.runtime.reentrancy import serve_in_this_thread, waiting_for

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT, OTHER = [5, 6, 7], [8, 9]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture
def manager(model: Any) -> Any:
    with GenerationManager(model, BatchingConfig(page_size=16, max_batch_tokens=64, debug=True)) as manager:
        manager.warmup()
        yield manager


class LookAhead:
    """Makes the token less likely that the model would say by itself."""

    def __init__(self, model: Any, say: Callable[..., torch.Tensor]) -> None:
        self.model, self.say = model, say

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.say(ids)[0, -1]] -= 5
        return scores


@pytest.mark.parametrize("way", ["in place", "direct"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_plug_inside_a_processor_of_the_same_engine(
    model: Any, manager: Any, way: str, shared: bool, caplog: Any
) -> None:
    given = {"custom_generate": hf_async_batching.generate if shared else manager.bind()}
    one: dict[str, Any] = {"max_new_tokens": 1, **GREEDY}

    def nested(ids: torch.Tensor) -> Any:
        if way == "in place":
            return model.generate(ids, **one, **given)
        return hf_async_batching.generate(model, ids, **one, **({} if shared else {"manager": manager}))

    call = {"max_new_tokens": 5, **GREEDY}
    plain = LookAhead(model, lambda ids: model.generate(ids, **one))
    expected = model.generate(torch.tensor([PROMPT]), **call, logits_processor=LogitsProcessorList([plain]))
    with caplog.at_level(logging.WARNING):
        innocent = manager.submit(OTHER, max_new_tokens=30, **GREEDY)
        got = model.generate(
            torch.tensor([PROMPT]), **call, **given, logits_processor=LogitsProcessorList([LookAhead(model, nested)])
        )
    hf_async_batching.get_manager(model).close()
    assert torch.equal(got, expected)
    assert innocent.result(60).token_ids == greedy_alone(model, OTHER, 30, eos_token_id=None, pad_token_id=0)
    others = [record.getMessage() for record in caplog.records]
    assert not [said for said in others if not (shared and said.startswith("a second engine"))]


@pytest.mark.parametrize("batch", [False, True])
def test_a_processor_that_needs_another_engine_gets_an_error(model: Any, manager: Any, batch: bool) -> None:
    """The engine would wait for the processor's own request before it ends. The drop-in goes to plain `generate`."""

    def submits(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            model.generate(ids, max_new_tokens=1, custom_generate=manager.bind(), **GREEDY)
            manager.submit(PROMPT, max_new_tokens=1)
        return scores

    call = {"max_new_tokens": 3, **GREEDY, "logits_processor": LogitsProcessorList([submits])}
    ask = model.generate if batch else manager.submit
    how: dict[str, Any] = {"custom_generate": manager.bind()} if batch else {}
    with pytest.raises(ReentrantCallError, match="another engine"):
        ask(torch.tensor([PROMPT] if batch else PROMPT), **call, **how).result(60)


WAITS: dict[str, Callable[[Any, Any], Any]] = {
    "result": lambda manager, other: other.result(30),
    "iteration": lambda manager, other: list(other),
    "warmup": lambda manager, other: manager.warmup(),
    "dataset": lambda manager, other: generate_dataset(manager, [{"prompt": [5, 6]}], max_new_tokens=3),
}
FROM_A_PROCESSOR = {**WAITS, "submit": lambda manager, other: manager.submit(PROMPT, max_new_tokens=1)}


def check_all_goes_on(manager: Any, model: Any, innocent: Any) -> None:
    assert innocent.result(60).token_ids == greedy_alone(model, OTHER, 60, eos_token_id=None, pad_token_id=0)
    after = manager.submit(PROMPT, max_new_tokens=3, **GREEDY)
    assert after.result(60).token_ids == greedy_alone(model, PROMPT, 3, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("wait", FROM_A_PROCESSOR)
def test_a_processor_may_use_its_engine(model: Any, manager: Any, wait: str) -> None:
    """It runs in a thread of its own."""
    with slowed(manager, 0.001):
        innocent = manager.submit(OTHER, max_new_tokens=60, **GREEDY)

        def waits(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            FROM_A_PROCESSOR[wait](manager, innocent)
            return scores

        handle = manager.submit(PROMPT, max_new_tokens=3, logits_processor=[waits], **GREEDY)
        assert len(handle.result(60).token_ids) == 3
    check_all_goes_on(manager, model, innocent)


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize("wait", WAITS)
def test_a_callback_that_waits_for_its_engine_gets_an_error(model: Any, manager: Any, wait: str, judged: bool) -> None:
    """In the engine's thread, and in that of the criteria."""
    caught: list[BaseException] = []
    called = threading.Event()
    timed = {"max_time": 1000.0} if judged else {}
    with slowed(manager, 0.005):
        innocent = manager.submit(OTHER, max_new_tokens=60, **GREEDY, **timed)

        def callback(handle: Any) -> None:
            try:
                WAITS[wait](manager, innocent)
            except ReentrantCallError as error:
                caught.append(error)
            finally:
                called.set()

        manager.submit(PROMPT, max_new_tokens=3, **GREEDY, **timed).add_done_callback(callback)
        assert called.wait(60)
    if not judged or wait in ("result", "iteration"):
        assert len(caught) == 1
    check_all_goes_on(manager, model, innocent)


def test_a_callback_may_submit_and_look(model: Any, manager: Any) -> None:
    """Each request is submitted at the end of the one before."""
    tokens: list[list[int]] = []
    modes: set[bool] = set()
    over = threading.Event()

    def callback(handle: Any) -> None:
        modes.add(torch.is_inference_mode_enabled())
        tokens.append(handle.result().token_ids)
        if len(tokens) == 5:
            over.set()
        else:
            manager.submit(PROMPT, max_new_tokens=4, **GREEDY).add_done_callback(callback)

    manager.submit(PROMPT, max_new_tokens=4, **GREEDY).add_done_callback(callback)
    assert over.wait(60)
    assert tokens == [greedy_alone(model, PROMPT, 4, eos_token_id=None, pad_token_id=0)] * 5
    assert modes == {False}


def test_a_callback_may_close_the_manager(model: Any) -> None:
    manager = GenerationManager(model, BatchingConfig(page_size=16))
    closed = threading.Event()
    with contextlib.suppress(EngineClosedError):
        handle = manager.submit(PROMPT, max_new_tokens=4, **GREEDY)
        handle.add_done_callback(lambda _: (manager.close(), closed.set()))
    assert closed.wait(60)
    manager.close()
    with pytest.raises(EngineClosedError):
        manager.submit(PROMPT)


def test_a_callback_that_needs_another_engine_gets_an_error(model: Any) -> None:
    """The engine's thread would have to end first. Others that wait for the new one do not stop its callbacks."""
    changed = tiny_model("Llama")
    with GenerationManager(changed, BatchingConfig(page_size=16)) as manager:
        caught: list[BaseException] = []
        called = threading.Event()

        def callback(handle: Any) -> None:
            try:
                manager.submit(PROMPT, max_new_tokens=1)
            except ReentrantCallError as error:
                caught.append(error)
            called.set()

        with slowed(manager):
            first = manager.submit(OTHER, max_new_tokens=20, **GREEDY)
            first.add_done_callback(callback)
            changed.model.rotary_emb.inv_freq = changed.model.rotary_emb.inv_freq * 0.37
            # Waits for the end of the engine that the callback runs in.
            after = manager.submit(PROMPT, max_new_tokens=5, **GREEDY)
            assert called.wait(60)
        assert len(caught) == 1
        assert after.result(60).token_ids == greedy_alone(changed, PROMPT, 5, eos_token_id=None, pad_token_id=0)


def test_two_engines_that_wait_for_each_other() -> None:
    """The second one to wait gets the error."""
    both, outcomes = threading.Barrier(2, timeout=60), []
    threads: list[threading.Thread] = []
    ended = [threading.Event(), threading.Event()]

    def run(own: int) -> None:
        serve_in_this_thread()
        both.wait()
        try:
            with waiting_for((threads[1 - own],), "result()"):
                ended[1 - own].wait(60)
            outcomes.append("ended")
        except ReentrantCallError:
            outcomes.append("error")
        ended[own].set()

    threads += [threading.Thread(target=run, args=(own,), daemon=True) for own in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes == ["error", "ended"]


def test_a_thread_that_serves_may_wait_for_others_again_and_again() -> None:
    def run() -> None:
        serve_in_this_thread()
        other = threading.Thread()
        for _ in range(3):
            with waiting_for((other,), "result()"), waiting_for((other,), "result()"):
                pass
        done.set()

    done = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done.is_set()
