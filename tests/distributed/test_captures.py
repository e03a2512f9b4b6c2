"""All ranks capture a step, or none does: what they launch has the same sizes, from graphs or not, on each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.fake_graphs import RankDevice
from support.tiny_models import tiny_model
from support.toy_engine import ToyEngine, run_random_schedule, verify

from hf_async_batching import BatchingConfig
from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.core.plan import Features
from hf_async_batching.distributed.agreed_captures import with_agreed_captures
from hf_async_batching.engine import builder
from hf_async_batching.runner.cuda_graphs import MAX_FAILED_CAPTURES

Fails = Callable[[int], bool]


class ThreadGroup:
    """Two ranks that are threads of this process."""

    def __init__(self) -> None:
        self._values: list[int] = []
        self._least = 0
        self._arrived = threading.Barrier(2, self._compare, timeout=60)
        self._lock = threading.Lock()

    def _compare(self) -> None:
        self._least, self._values = min(self._values), []

    def least(self, value: int) -> int:
        with self._lock:
            self._values.append(value)
        self._arrived.wait()
        return self._least


class OneRank:
    """The only rank of a group."""

    leads = False

    def __init__(self) -> None:
        self.asked: list[int] = []

    def least(self, value: int) -> int:
        self.asked.append(value)
        return value


def never(number: int) -> bool:
    return False


def always(number: int) -> bool:
    return True


@pytest.mark.parametrize(
    "fails",
    [(never, never), (never, lambda number: number == 1), (lambda number: number % 2 == 0, never), (never, always)],
    ids=["no capture fails", "one, on rank 1", "every other, on rank 0", "all, on rank 1"],
)
def test_ranks_launch_the_same_wherever_a_capture_fails(fails: tuple[Fails, Fails]) -> None:
    """Rows of a decode step are padded while steps are captured: a rank that stopped alone would launch others."""
    group: Any = ThreadGroup()
    devices = [RankDevice(fails[rank]) for rank in range(2)]

    def run(rank: int) -> tuple[list[tuple[int, bool]], ToyEngine]:
        device = with_agreed_captures(devices[rank], group)
        engine = ToyEngine(2, seed=5, device=device, max_rows=7, num_pages=24, max_batch_tokens=16)
        launched, forward = [], engine.runner._forward

        def note(inputs: Any) -> torch.Tensor:
            launched.append((len(inputs.token_ids.flatten()), devices[rank].replaying))
            return forward(inputs)

        engine.runner._forward = note
        verify(engine, run_random_schedule(engine, 5, num_requests=12))
        return launched, engine

    with ThreadPoolExecutor(2) as ranks:
        (launched, one), (also_launched, other) = ranks.map(run, range(2))
    assert launched == also_launched
    assert one.runner.graphs.captured.keys() == other.runner.graphs.captured.keys()
    assert one.runner.buckets == other.runner.buckets
    assert devices[0].captures == devices[1].captures > MAX_FAILED_CAPTURES
    if fails[1] is always:
        assert not one.runner.graphs.captured and not one.runner.buckets
    else:
        assert any(replayed for _, replayed in launched)


@pytest.mark.parametrize("cuda_graphs", [None, True, False])
def test_steps_are_captured_unless_that_is_switched_off(
    cuda_graphs: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, group = RankDevice(), OneRank()
    monkeypatch.setattr(builder, "make_device", lambda torch_device: device)
    monkeypatch.setattr(TorchBackend, "reads_back", False)
    config = BatchingConfig(max_rows=3, max_batch_tokens=8, num_pages=8, cuda_graphs=cuda_graphs).for_ranks()
    made = builder.build_engine(tiny_model("Llama"), config, group)  # type: ignore[arg-type]
    agreed = len(group.asked)  # on the memory
    made.engine.pipeline.warm(Features())
    captured = [] if cuda_graphs is False else [1, 2, 3]
    assert sorted(key.size for key in made.runner.graphs.captured) == captured
    assert group.asked[agreed:] == [1] * len(captured), "each capture is agreed on"
    made.engine.close()
