"""The soak: a short one goes well, and each thing that it looks for is found."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from typing import Any

import pytest
import torch

from benchmarks.soak import loads, verdict
from benchmarks.soak.command import LOADS, main
from benchmarks.soak.job import SoakJob
from benchmarks.soak.steady_lock import SteadyLock
from benchmarks.soak.subjects import FAMILIES, Subject, make_tokenizer, missing
from benchmarks.soak.tally import Tally
from benchmarks.soak.verdict import judge
from benchmarks.soak.watch import MIB, Held, growth, held, known_objects, slope
from hf_async_batching.model.small.tiny_configs import VOCAB


@pytest.mark.timeout(300)
def test_a_short_soak_goes_well(capsys: pytest.CaptureFixture[str]) -> None:
    families = ",".join(name for name in ("llama", "convolutions", "experts") if missing(name) is None)
    level = logging.getLogger("hf_async_batching").level
    status = main(
        ["--minutes", "0.1", "--families", families, "--clients", "6", "--every", "5", "--change-every", "0.5"]
    )
    out = capsys.readouterr().out
    assert status == 0, out
    assert logging.getLogger("hf_async_batching").level == level
    assert "verdict: all is well" in out
    assert "weights changed" in out
    assert all(word in out for word in ("0.1 min: RSS", "descriptors", "rows", "pages", "tokens/s"))


def test_what_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.soak import call_loads, command, subjects

    monkeypatch.setattr(call_loads.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setitem(subjects.FAMILIES, "hybrid", "NoSuchForCausalLM")
    parsed = command._parser().parse_args(["--families", "llama,hybrid,adapters"])
    chosen, found = command._what(parsed)
    out = capsys.readouterr().out
    assert "left out: datasets" in out
    assert "left out: hybrid, transformers" in out
    assert "left out: adapters, peft is not installed" in out
    assert call_loads.dataset not in chosen
    assert [subject.name for subject in found] == ["llama"]
    assert main(["--families", "nothing"]) == 2


_known: frozenset[int] = frozenset()


@pytest.fixture(autouse=True)
def known() -> None:
    """What other tests in the process hold is none of a soak's."""
    global _known
    _known = known_objects()


@pytest.fixture
def job() -> Any:
    subject = Subject("llama", torch.device("cpu"), torch.float32)
    made = SoakJob(subject, random.Random(0), Tally(), 1.0, make_tokenizer())
    made.load = "greedy"
    yield made
    subject.manager.close()


def _judged(job: SoakJob, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "subjects": [job.subject],
        "tally": job.tally,
        "samples": [held()],
        "stuck": [],
        "before": held(),
        "threads_before": set(threading.enumerate()),
        "objects_before": _known,
        "bound": 1.0,
    }
    return "\n".join(judge(**{**arguments, **changes}).problems)


def test_a_wrong_token_is_found(job: SoakJob) -> None:
    loads.greedy(job)
    assert _judged(job) == ""
    job.subject.new_manager()
    prompt = job.prompt()
    tokens = job.submit(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None).result().token_ids
    job.compare(prompt, tokens, max_new_tokens=8)
    assert not job.tally.wrong
    job.compare(prompt, [*tokens[:5], (tokens[5] + 1) % VOCAB, *tokens[6:]], max_new_tokens=8)
    job.compare(prompt, tokens[:7], max_new_tokens=8)
    problems = _judged(job)
    assert "token 5 is" in problems
    assert "7 tokens, not 8" in problems


def test_a_wrong_token_is_found_in_16_bit() -> None:
    subject = Subject("llama", torch.device("cpu"), torch.bfloat16)
    job = SoakJob(subject, random.Random(0), Tally(), 1.0, make_tokenizer())
    prompt = job.prompt()
    tokens = job.submit(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None).result().token_ids
    job.compare_greedy(prompt, tokens, 8)
    assert not job.tally.wrong
    # One token that is not near the largest logit, at least, is among these.
    job.compare_greedy(prompt, [(token + 1) % VOCAB for token in tokens], 8)
    assert "WRONG" in _judged(job)


def test_what_is_left_behind_is_found(job: SoakJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "_QUIET_SECONDS", 0.1)
    loads.greedy(job)
    before, threads_before = held(), set(threading.enumerate())
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left over")
    thread.start()
    read, write = os.pipe()
    handle = job.submit([5, 6], max_new_tokens=1)
    handle.result()
    assembly: Any = job.subject.manager.assembly
    (row,) = assembly.engine.scheduler.rows.take(1)
    problems = _judged(job, before=before, threads_before=threads_before, stuck=["soak client 3 (greedy)"])
    stop.set()
    thread.join()
    os.close(read)
    os.close(write)
    assert row
    for found in (
        "threads are left: left over",
        "2 descriptors",
        "GenerationHandle (held in local handle of test_what_is_left_behind_is_found, which runs)",
        "'rows_in_use': 1",
        "client 3",
    ):
        assert found in problems, problems


def test_an_engine_that_fails_is_found(job: SoakJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_async_batching.errors import EngineClosedError, EngineFailedError

    assert loads.outcome_of(EngineClosedError("closed"))[0] == "closed"
    assert loads.outcome_of(EngineFailedError("a step"))[0] == "failed"
    outcome = loads.outcome_of(ValueError("a step"))
    job.tally.add("greedy", *outcome)
    assert "failed: greedy: ValueError: a step" in _judged(job)


def test_memory_that_grows_is_found() -> None:
    def samples(per_minute: float, minutes: float, cuda: float = 0.0) -> list[Held]:
        count = int(minutes * 60)
        return [
            Held(
                at=second,
                rss=int((500 + per_minute * second / 60 + (200 if second % 50 == 0 else 0)) * MIB),
                allocated=int(cuda * second / 60 * MIB),
                reserved=int(bool(cuda)),
                threads=1,
                os_threads=1,
                descriptors=5,
            )
            for second in range(count)
        ]

    assert all(found.flat for found in growth(samples(0.0, 15), 2.0))
    assert all(found.flat for found in growth(samples(1.9, 15), 2.0))
    assert [found.flat for found in growth(samples(5.0, 15), 2.0)] == [False]
    assert [found.flat for found in growth(samples(0.0, 15, cuda=9.0), 2.0)] == [True, False]
    assert all(found.flat for found in growth(samples(30.0, 1), 2.0))  # too short to say
    assert slope([(0.0, 1.0)]) == 0.0
    assert slope([(float(i), 3.0 * i) for i in range(1000)]) == pytest.approx(3.0)


def test_nothing_changes_while_answers_are_compared() -> None:
    lock, seen = SteadyLock(), []

    def write() -> None:
        with lock.alone():
            seen.append("changed")

    def read() -> None:
        with lock.steady():
            seen.append("read")

    with lock.steady():
        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(0.05)
        reader = threading.Thread(target=read)  # comes later than the writer, and waits for it
        reader.start()
        time.sleep(0.05)
        assert seen == []
    writer.join(10)
    reader.join(10)
    assert seen == ["changed", "read"]


def test_weights_move_and_stay_near(job: SoakJob) -> None:
    parameter = next(job.subject.model.parameters())
    before = parameter.detach().clone()
    for _ in range(5):
        job.subject.step_weights()
    assert not torch.equal(parameter, before)
    assert torch.allclose(parameter, before, rtol=0.2, atol=1e-6)


def test_every_load_can_be_compared(job: SoakJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each load by itself, with each outcome compared: what passes unseen in a soak of seconds fails here."""
    # What is logged here holds the handles of callbacks that raise.
    monkeypatch.setattr(logging.getLogger("hf_async_batching"), "disabled", True)
    monkeypatch.setattr(logging.getLogger("hf_async_batching.handle"), "disabled", True)
    for load in LOADS:
        for _ in range(3):
            job.load = load.__name__
            load(job)
    assert _judged(job) == ""
    assert job.tally.by_load().keys() == {load.__name__ for load in LOADS}
    assert {"llama", "gemma", "hybrid", "experts", "adapters"} <= FAMILIES.keys()
