"""What a step sends back to the host beside its tokens, on a device that takes every liberty."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support.toy_engine import VOCAB, ToyEngine, ToyForward

from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.devices.base import Stream


class Surer(ToyForward):
    """The same tokens, each position more certain of its own than the last one."""

    def __call__(self, inputs: Any) -> torch.Tensor:
        positions = inputs.position_ids if inputs.sample_index is None else inputs.position_ids[inputs.sample_index]
        return super().__call__(inputs) * (1 + positions[:, None]) / 8


def logprob(length: int) -> float:
    """The log-probability of the token that follows `length` others."""
    logits = torch.zeros(VOCAB)
    logits[0] = length / 8
    return float(logits.log_softmax(0)[0])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_log_probabilities_arrive_with_their_tokens(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps of changing size, beside a row that wants none."""
    monkeypatch.setattr("support.toy_engine.ToyForward", Surer)
    for seed in range(6):
        engine = ToyEngine(depth, seed)
        wants = {"a": True, "b": False, "c": True}
        for i, name in enumerate(wants):
            sampling = SamplingParams(logprobs=wants[name])
            engine.engine.add(Request(name, tuple(range(1, 4 + i)), 3 + 2 * i, sampling=sampling))
        got: dict[str, list[float | None]] = {name: [] for name in wants}
        while engine.engine.has_work:
            for output in engine.engine.step():
                got[output.request_id].append(output.logprob)
        for name, first, count in (("a", 3, 3), ("b", 4, 5), ("c", 5, 7)):
            right = [logprob(first + i) for i in range(count)]
            if not wants[name]:  # beside the others its own arrive too, and its handle drops them
                right = [want if have is not None else None for have, want in zip(got[name], right, strict=True)]
            assert got[name] == pytest.approx(right), (seed, name)


def test_steps_without_log_probabilities_send_none(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine(2, 0)
    copies: list[torch.dtype] = []
    copy = engine.device.copy

    def noted(stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        copies.extend([destination.dtype] * (stream is Stream.D2H))
        copy(stream, destination, source)

    monkeypatch.setattr(engine.device, "copy", noted)
    for name, logprobs in (("a", False), ("b", True)):
        copies.clear()
        engine.engine.add(Request(name, (1, 2), 3, sampling=SamplingParams(logprobs=logprobs)))
        while engine.engine.has_work:
            assert all((output.logprob is not None) == logprobs for output in engine.engine.step())
        assert copies == [torch.int32, torch.float32][: 1 + logprobs] * 3


@pytest.mark.parametrize("close", [False, True])
def test_the_end_waits_for_all_work(close: bool) -> None:
    engine, done = ToyEngine(2, 0), list[Stream]()
    engine.device._eagerness = 0.0  # nothing runs before it is waited for
    streams = [Stream.H2D, Stream.COMPUTE, Stream.D2H]
    for stream in streams:
        engine.device.launch(stream, partial(done.append, stream))
    assert not done
    if close:
        engine.engine.pipeline.close()
    else:
        engine.engine.pipeline.drain()
    assert sorted(done, key=streams.index) == streams
