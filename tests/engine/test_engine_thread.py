"""An engine's thread keeps nothing of requests that have ended: neither while it waits nor once it has stopped."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.errors import EngineClosedError, InvalidProbabilitiesError
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.host_decoding.logits_handle import LogitsHandle

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


class Calls(LogitsProcessor):
    """Does something at one of its calls; looks at all rows, so that a batch is a group."""

    def __init__(self, act: Callable[[], object], at: int = 2) -> None:
        self.act = act
        self.at = at
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.act()
        return scores + input_ids.sum()


class Stops(StoppingCriteria):
    """Closes the manager."""

    def __init__(self, manager: GenerationManager) -> None:
        self.manager = manager

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.manager.close()
        return torch.zeros(1, dtype=torch.bool)


def _raise() -> None:
    raise ValueError("a processor fails")


def _group(manager: GenerationManager, act: Callable[[], object]) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [4, 5, 6]])
    manager.model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=hf_async_batching.generate,
        manager=manager,
        logits_processor=LogitsProcessorList([Calls(act)]),
        max_new_tokens=8,
        **GREEDY,
    )


def closed_while_a_group_chooses(manager: GenerationManager) -> None:
    _group(manager, manager.close)


def closed_while_a_request_chooses(manager: GenerationManager) -> None:
    manager.submit([5, 6], logits_processor=[Calls(manager.close)], max_new_tokens=8, **GREEDY).result(60)


def closed_while_a_criterion_is_asked(manager: GenerationManager) -> None:
    criteria = StoppingCriteriaList([Stops(manager)])
    manager.submit([5, 6], stopping_criteria=criteria, max_new_tokens=200, **GREEDY).result(60)


def a_group_whose_processor_raises(manager: GenerationManager) -> None:
    _group(manager, _raise)


def a_processor_that_refers_to_the_manager(manager: GenerationManager) -> None:
    handle = manager.submit([5], logits_processor=[Calls(manager.stats, 1)], max_new_tokens=1, **GREEDY)
    handle.result(60)


def nothing_to_draw_from(manager: GenerationManager) -> None:
    every = [[token] for token in range(manager.model.config.vocab_size)]
    manager.submit([5, 6], do_sample=True, max_new_tokens=8, eos_token_id=None, bad_words_ids=every).result(60)


def scores_that_are_kept(manager: GenerationManager) -> None:
    given: dict[str, Any] = {"output_scores": True, "return_dict_in_generate": True, **GREEDY}
    manager.submit([5, 6], max_new_tokens=3, **given).result(60)


@pytest.mark.parametrize(
    "way",
    [
        closed_while_a_group_chooses,
        closed_while_a_request_chooses,
        closed_while_a_criterion_is_asked,
        a_group_whose_processor_raises,
        a_processor_that_refers_to_the_manager,
        nothing_to_draw_from,
        scores_that_are_kept,
    ],
)
def test_a_manager_goes_with_its_last_request(model: Any, way: Callable[[GenerationManager], None]) -> None:
    """The error of a request holds its caller's frames, and these the manager: it must not be held in turn."""
    kinds = (GenerationHandle, LogitsHandle)
    before = {id(one) for one in gc.get_objects() if type(one) in kinds}

    def serve() -> weakref.ref[GenerationManager]:
        manager = GenerationManager(model, BatchingConfig(page_size=16, num_pages=64, idle_timeout=None))
        with contextlib.suppress(EngineClosedError, InvalidProbabilitiesError, ValueError):
            way(manager)
        return weakref.ref(manager)

    manager = serve()
    deadline = time.monotonic() + 30
    while True:
        gc.collect()
        left = [type(one).__name__ for one in gc.get_objects() if type(one) in kinds and id(one) not in before]
        if manager() is None and not left:
            return
        assert time.monotonic() < deadline, f"left: {left}, the manager is {'there' if manager() else 'gone'}"
        time.sleep(0.05)


@pytest.mark.parametrize("when", ["before the end", "after the end"])
@pytest.mark.parametrize("order", ["cancel", "choose"])
def test_a_worker_that_stops_keeps_no_orders(model: Any, order: str, when: str) -> None:
    manager = GenerationManager(model, BatchingConfig(page_size=16, num_pages=64))
    handle = manager.submit([5, 6], max_new_tokens=200, **GREEDY)
    next(iter(handle))
    worker, assembly = manager._engines.thread, manager.assembly
    assert worker is not None
    assert assembly is not None
    engine, inside, goes_on = assembly.engine, threading.Event(), threading.Event()
    step = engine.step

    def waits() -> Any:
        inside.set()
        goes_on.wait(60)
        return step()

    engine.step = waits  # type: ignore[method-assign]
    assert inside.wait(60)
    worker.stop(timeout=0)
    if when == "after the end":
        goes_on.set()
        assert worker.memory_free.wait(60)
    if order == "cancel":
        worker.cancel(handle)
    else:
        worker.choose([(handle, 7)])
    goes_on.set()
    manager.close()
    with pytest.raises(EngineClosedError):
        handle.result(60)
    assert not worker._has_orders()
