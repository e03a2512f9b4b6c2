"""An engine is made for a state of the model: each line of the table in `supervisor`, with engines that do nothing."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model

from hf_async_batching import BatchingConfig, EngineClosedError, ReentrantCallError, UnsupportedArgumentError
from hf_async_batching.distributed.rank_group import Quit, Start
from hf_async_batching.engine import supervisor as supervisor_module
from hf_async_batching.engine.engine_thread import EngineThread
from hf_async_batching.engine.supervisor import EngineSupervisor
from hf_async_batching.runtime.reentrancy import choosing_for

TIMEOUT = 20.0


class IdleEngine:
    """An engine without requests, which notes what it is told."""

    def __init__(self) -> None:
        self.has_work = self.waits_outside = False
        self.depth = 2
        self.told: list[str] = []
        self.pipeline = SimpleNamespace(order_after_caller=lambda: None)

    def let_go(self) -> None:
        pass

    def weights_updated(self) -> None:
        self.told.append("weights updated")

    def close(self) -> None:
        self.told.append("closed")


class Parts(SimpleNamespace):
    __hash__ = object.__hash__


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[IdleEngine]:
    """The engines that were made, the oldest first."""
    engines: list[IdleEngine] = []

    def build_engine(model: Any, config: BatchingConfig, group: Any, hint: Any) -> Any:
        engines.append(IdleEngine())
        return Parts(
            engine=engines[-1],
            forward=SimpleNamespace(device=torch.device("cpu")),
            config=SimpleNamespace(depth=2, settings=SimpleNamespace(compile=False)),
        )

    monkeypatch.setattr(supervisor_module, "build_engine", build_engine)
    return engines


@pytest.fixture
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture
def supervisor(model: Any, built: list[IdleEngine]) -> Iterator[EngineSupervisor]:
    supervisor = EngineSupervisor(lambda: model, BatchingConfig())
    yield supervisor
    supervisor.close(TIMEOUT)


def other_settings(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.1


def test_one_engine_serves_as_long_as_the_model_is_the_same(
    supervisor: EngineSupervisor, built: list[IdleEngine]
) -> None:
    assert supervisor.thread is None and supervisor.parts is None
    first = supervisor.current()
    assert supervisor.current() is first is supervisor.thread
    assert supervisor.parts is first.parts
    assert len(built) == 1


def test_threads_that_come_together_start_one_engine(supervisor: EngineSupervisor, built: list[IdleEngine]) -> None:
    engines: list[EngineThread] = []
    threads = [threading.Thread(target=lambda: engines.append(supervisor.current())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(engines) == 8 and len(set(engines)) == 1
    assert len(built) == 1


def test_other_values_of_the_same_tensors_are_told_once(
    supervisor: EngineSupervisor, model: Any, built: list[IdleEngine]
) -> None:
    first = supervisor.current()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    told = threading.Event()
    built[0].weights_updated = lambda: (built[0].told.append("weights updated"), told.set())  # type: ignore[method-assign, assignment]
    assert supervisor.current() is first
    assert told.wait(TIMEOUT)
    assert supervisor.current() is first
    supervisor.current().warm([])  # a turn of the engine's thread later
    assert built[0].told == ["weights updated"]


@pytest.mark.parametrize("change", ["settings", "autocast", "model_changed"])
def test_another_state_ends_the_engine_before_a_new_one_starts(
    supervisor: EngineSupervisor, model: Any, built: list[IdleEngine], change: str
) -> None:
    first = supervisor.current()
    if change == "settings":
        other_settings(model)
    elif change == "model_changed":
        supervisor.model_changed()
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        second = supervisor.current()
        assert second is not first
        assert first.memory_free.is_set() and not first.accepting, "never two caches at once"
        assert built[0].told == ["closed"]
        assert supervisor.current() is second
    assert len(built) == 2


def test_live_requests_end_as_they_began_unless_their_weights_memory_is_gone(
    supervisor: EngineSupervisor, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[str] = []
    drain, stop = EngineThread.drain, EngineThread.stop
    monkeypatch.setattr(EngineThread, "drain", lambda self: (ways.append("drain"), drain(self)))
    monkeypatch.setattr(
        EngineThread, "stop", lambda self, timeout, reason: (ways.append(reason), stop(self, timeout, reason))
    )
    supervisor.current()
    other_settings(model)
    supervisor.current()
    model.to(torch.float64)
    supervisor.current()
    assert list(dict.fromkeys(ways)) == ["drain", "the model's weights were moved"]
    monkeypatch.undo()


def test_a_request_waits_for_an_engine_that_is_ending(supervisor: EngineSupervisor, built: list[IdleEngine]) -> None:
    first = supervisor.current()
    may_end = threading.Event()
    built[0].let_go = lambda: may_end.wait(TIMEOUT)  # type: ignore[method-assign, assignment]
    first.drain()
    got: list[EngineThread] = []
    waiting = threading.Thread(target=lambda: got.append(supervisor.current()))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and len(built) == 1
    may_end.set()
    waiting.join(TIMEOUT)
    assert got and got[0] is not first
    assert len(built) == 2


def test_an_engine_that_failed_or_idled_is_forgotten(supervisor: EngineSupervisor, built: list[IdleEngine]) -> None:
    first = supervisor.current()
    first.stop(TIMEOUT)
    first.thread.join(TIMEOUT)
    assert supervisor.thread is None and supervisor.parts is None
    assert supervisor.current() is not first


@pytest.mark.parametrize("where", ["engine's thread", "processor"])
def test_a_thread_that_the_old_engine_waits_for_gets_an_error(
    supervisor: EngineSupervisor, model: Any, built: list[IdleEngine], where: str
) -> None:
    first = supervisor.current()
    other_settings(model)
    caught: list[BaseException] = []

    def request() -> None:
        try:
            supervisor.current()
        except BaseException as error:
            caught.append(error)

    if where == "processor":
        with choosing_for((first.thread,)):
            request()
    else:
        done = threading.Event()
        built[0].weights_updated = lambda: (request(), done.set())  # type: ignore[method-assign, assignment]
        supervisor.weights_updated()
        assert done.wait(TIMEOUT)
    assert isinstance(caught[0], ReentrantCallError)
    assert "submit the request elsewhere" in str(caught[0])
    assert first.accepting, "the engine serves others still"


def test_a_failed_start_leaves_nothing_and_the_next_request_tries_again(
    supervisor: EngineSupervisor, built: list[IdleEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(supervisor_module, "build_engine", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            supervisor.current()
    assert supervisor.thread is None
    supervisor.current()
    assert len(built) == 1


def test_a_depth_is_kept_for_engines_to_come(supervisor: EngineSupervisor, built: list[IdleEngine]) -> None:
    supervisor.set_depth(1)
    supervisor.current()
    assert built[0].depth == 1
    supervisor.set_depth(None)
    assert built[0].depth == 2
    with pytest.raises(ValueError, match="from 1 to 2, got 3"):
        supervisor.set_depth(3)
    with pytest.raises(ValueError, match="from 1 to 2, got 0"):
        supervisor.set_depth(0)


def test_a_closed_supervisor_serves_no_more(supervisor: EngineSupervisor, built: list[IdleEngine]) -> None:
    supervisor.current()
    assert not supervisor.closed
    supervisor.close(TIMEOUT)
    supervisor.close(TIMEOUT)
    assert supervisor.closed and built[0].told == ["closed"]
    with pytest.raises(EngineClosedError, match="the manager is closed"):
        supervisor.current()


def test_a_model_that_was_collected_is_served_no_more(built: list[IdleEngine]) -> None:
    supervisor = EngineSupervisor(lambda: None, BatchingConfig())
    with pytest.raises(EngineClosedError):
        supervisor.current()


def test_the_engine_goes_with_the_last_reference(model: Any, built: list[IdleEngine]) -> None:
    supervisor = EngineSupervisor(lambda: model, BatchingConfig(idle_timeout=None))
    engine = supervisor.current()
    gone = weakref.ref(supervisor)
    del supervisor
    gc.collect()
    assert gone() is None
    assert engine.memory_free.wait(TIMEOUT)


def test_what_is_open_is_closed_at_exit(supervisor: EngineSupervisor, built: list[IdleEngine]) -> None:
    supervisor.current()
    others = set(supervisor_module._open) - {supervisor}
    for other in others:
        supervisor_module._open.discard(other)
    try:
        supervisor_module._close_at_exit()
    finally:
        supervisor_module._open.update(others)
    assert built[0].told == ["closed"]
    assert supervisor not in supervisor_module._open


def test_a_child_begins_without_an_engine(supervisor: EngineSupervisor, built: list[IdleEngine]) -> None:
    parent = supervisor.current()
    supervisor.renew()
    assert supervisor.thread is None
    assert supervisor.current() is not parent
    assert parent.accepting, "the parent's is left as it is"
    parent.stop(TIMEOUT)


def test_ranks_are_told_of_starts_and_of_the_end(model: Any, built: list[IdleEngine]) -> None:
    sent: list[Any] = []
    group: Any = SimpleNamespace(leads=True, send=sent.append)
    supervisor = EngineSupervisor(lambda: model, BatchingConfig(), group)
    supervisor.current()
    other_settings(model)
    assert supervisor.current() is supervisor.current(), "layers of a spread model are not looked at"
    with pytest.raises(UnsupportedArgumentError, match="ranks"):
        supervisor.follow()
    supervisor.close(TIMEOUT)
    supervisor.close(TIMEOUT)
    assert [type(one) for one in sent] == [Start, Quit]
    follower = EngineSupervisor(lambda: model, BatchingConfig(), SimpleNamespace(leads=False))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedArgumentError, match="rank 0"):
        follower.current()
