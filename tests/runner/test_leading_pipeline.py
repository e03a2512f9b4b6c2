"""What rank 0 does, it first tells the other ranks."""

from __future__ import annotations

from typing import Any

import pytest

from hf_async_batching.core.plan import Features, Plan, Result
from hf_async_batching.distributed.rank_group import End, Step, Tune, Warm, checksum
from hf_async_batching.runner.leading_pipeline import LeadingPipeline
from hf_async_batching.runner.pipeline import Pipeline


class Group:
    """Notes what is sent, beside what the pipeline itself does."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.gone = False

    def send(self, message: Any) -> None:
        if self.gone:
            raise RuntimeError("the process group is gone")
        self.seen.append(message)


@pytest.fixture
def group() -> Group:
    return Group()


@pytest.fixture
def pipeline(group: Group, monkeypatch: pytest.MonkeyPatch) -> LeadingPipeline:
    monkeypatch.setattr(Pipeline, "__init__", lambda self: None)

    def noting(name: str) -> Any:
        def method(_: Pipeline, *given: Any) -> Any:
            group.seen.append((name, *given))
            return given[0] if given else None

        return method

    for name in ("launch", "collect", "warm", "tune", "close"):
        monkeypatch.setattr(Pipeline, name, noting(name))
    return LeadingPipeline(group)  # type: ignore[arg-type]


def plan(step: int, rows: tuple[int, ...]) -> Plan:
    return Plan(step, rows, (), (), (), Features(), 0)


def test_rows_that_stay_are_not_sent_again(pipeline: LeadingPipeline, group: Group) -> None:
    rows, others = (1, 2), (1,)
    plans = [plan(0, rows), plan(1, rows), plan(2, others)]
    for one in plans:
        pipeline.launch(one, 0.0)
    sent = [message for message in group.seen if isinstance(message, Step)]
    assert [message.plan.decode_rows for message in sent] == [rows, (), others]
    assert [message.rows_unchanged for message in sent] == [False, True, False]
    assert group.seen[1::2] == [("launch", one, 0.0) for one in plans], "rank 0 launches the plan as it is, afterwards"


def test_a_steps_tokens_are_compared_with_the_next_step(pipeline: LeadingPipeline, group: Group) -> None:
    pipeline.collect(Result(4, [7, 8]))  # type: ignore[arg-type]  # the stand-in returns what it is given
    pipeline.launch(plan(5, (1,)), 0.0)
    pipeline.launch(plan(6, (1,)), 0.0)
    sent = [message for message in group.seen if isinstance(message, Step)]
    assert [message.collected for message in sent] == [{4: checksum([7, 8])}, {}]


def test_warming_and_tuning_are_told_first(pipeline: LeadingPipeline, group: Group) -> None:
    features = Features(sampling=True)
    pipeline.warm(features)
    assert group.seen == [Warm(features), ("warm", features)]
    group.seen.clear()
    pipeline.tune()
    assert group.seen == [Tune(), ("tune",)]


@pytest.mark.parametrize("gone", [False, True])
def test_it_ends_although_the_others_cannot_be_told(pipeline: LeadingPipeline, group: Group, gone: bool) -> None:
    group.gone = gone
    pipeline.close()
    assert group.seen == ([] if gone else [End()]) + [("close",)]
