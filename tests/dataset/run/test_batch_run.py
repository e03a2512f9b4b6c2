"""When the engine fails, is full, or is shared."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from support.character_tokenizer import character_tokenizer
from support.dataset_job import rows_kept
from support.tiny_models import greedy_alone, tiny_model

from hf_async_batching import BatchingConfig, EngineClosedError, EngineFailedError, GenerationManager, generate_dataset
from hf_async_batching.core.request import Request
from hf_async_batching.dataset.rows.row import Completion, PreparedRow, RowBlock, RowResult
from hf_async_batching.dataset.run.batch_run import BatchRun, Failed, _Live
from hf_async_batching.dataset.run.ordering import RowJob
from hf_async_batching.engine.engine import Engine
from hf_async_batching.handle import GenerationHandle

NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
ROWS = Dataset.from_dict({"prompt": [f"text-{chr(40 + i)}" for i in range(40)]})


@pytest.fixture(scope="module")
def expected(model: Any, tokenizer: Any) -> list[list[int]]:
    return [greedy_alone(model, tokenizer(text).input_ids, 6, eos_token_id=None) for text in ROWS["prompt"]]


def config(**changes: Any) -> BatchingConfig:
    return BatchingConfig(**{"max_rows": 4, "page_size": 16, "max_batch_tokens": 32, **changes})


def failing(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    step, count = Engine.step, 0

    def failing_step(self: Engine) -> Any:
        nonlocal count
        count += 1
        if count in steps:
            raise torch.OutOfMemoryError(f"step {count}")
        return step(self)

    monkeypatch.setattr(Engine, "step", failing_step)


def test_an_engine_that_fails_costs_nothing(
    model: Any, tokenizer: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {15, 40})
    with GenerationManager(model, config()) as manager:
        done = generate_dataset(manager, ROWS, tokenizer, **NEW)
    assert done["completion_ids"][:] == expected


def test_one_that_always_fails_ends_the_run(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, expected: Any
) -> None:
    with monkeypatch.context() as patched:
        failing(patched, set(range(30, 10_000)))
        with GenerationManager(model, config()) as manager, pytest.raises(EngineFailedError, match="step"):
            generate_dataset(manager, ROWS, tokenizer, resume_dir=tmp_path / "run", **NEW)
    with GenerationManager(model, config()) as manager:
        done = generate_dataset(manager, ROWS, tokenizer, resume_dir=tmp_path / "run", **NEW)
    assert done["completion_ids"][:] == expected


@pytest.mark.parametrize("max_waiting", [1, 3])
def test_a_small_inbox(model: Any, tokenizer: Any, expected: Any, max_waiting: int) -> None:
    with GenerationManager(model, config(max_waiting=max_waiting)) as manager:
        done = generate_dataset(manager, ROWS, tokenizer, **NEW)
    assert done["completion_ids"][:] == expected


def test_a_manager_that_is_closed_ends_the_run(tokenizer: Any) -> None:
    manager = GenerationManager(tiny_model("Llama"), config())

    def prompt(row: dict[str, Any]) -> str:
        if row["prompt"] == ROWS["prompt"][-1]:
            threading.Thread(target=manager.close).start()
        return str(row["prompt"])

    with pytest.raises(EngineClosedError):
        generate_dataset(manager, ROWS, character_tokenizer(), prompt=prompt, max_new_tokens=400, do_sample=False)


def test_two_runs_share_a_manager(model: Any, tokenizer: Any, expected: Any) -> None:
    results: list[Any] = [None, None]
    with GenerationManager(model, config()) as manager:

        def go(i: int) -> None:
            results[i] = generate_dataset(manager, ROWS, tokenizer, **NEW)["completion_ids"][:]

        threads = [threading.Thread(target=go, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected, expected]


def test_a_dataset_that_raises_ends_the_run(manager: Any, tokenizer: Any) -> None:
    def rows() -> Any:
        yield from ({"prompt": f"{i}"} for i in range(70))
        raise OSError("the network is gone")

    lazy = generate_dataset(manager, rows(), tokenizer, **NEW)
    with pytest.raises(OSError, match="network"):
        list(lazy)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hf_async_batching-dataset")]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["prompt", "rows", "decode"])
def test_what_ends_a_thread_ends_the_run_and_keeps_what_is_made(
    manager: Any, tokenizer: Any, expected: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, kind: Any, where: str
) -> None:
    """Ctrl-C and `sys.exit` in the caller's code that runs in a thread: nothing hangs, and finished rows stay."""
    mended, finished = threading.Event(), threading.Event()
    data: Any = ROWS.to_list()

    def prompt(row: dict[str, Any]) -> str:
        if where == "prompt" and not mended.is_set() and row["prompt"] == ROWS[30]["prompt"]:
            assert finished.wait(30)
            raise kind
        return str(row["prompt"])

    def rows() -> Any:
        for i, row in enumerate(data):
            if where == "rows" and not mended.is_set() and i == 30:
                assert finished.wait(30)
                raise kind
            yield row

    def seen(progress: Any) -> None:
        if progress.rows >= 4:
            finished.set()

    decode = type(tokenizer).batch_decode

    def decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        if where == "decode" and not mended.is_set() and finished.is_set():
            raise kind
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "batch_decode", decoding)
    monkeypatch.setattr("hf_async_batching.dataset.rows.source.CHUNK_ROWS", 10)
    monkeypatch.setattr("hf_async_batching.dataset.run.progress.SECONDS", 0.0)

    def go() -> Any:
        stream = IterableDataset.from_generator(rows)
        return generate_dataset(
            manager, stream, tokenizer, prompt=prompt, callback=seen, resume_dir=tmp_path / "run", **NEW
        )

    with pytest.raises(kind):
        go()
    assert rows_kept(tmp_path / "run") >= 4
    assert not [t for t in threading.enumerate() if t.name in ("hf_async_batching-dataset", "hf_async_batching-write")]
    mended.set()
    assert [row["completion_ids"] for row in go()] == expected


def test_rows_that_are_made_when_a_run_fails_are_kept(manager: Any, tokenizer: Any) -> None:
    """Those too that wait for their texts in that moment, and those of which the leading thread has not heard."""
    rows = iter([RowBlock(0, [{"prompt": "a"}])])
    for decode in (None, lambda ids: ["?" for _ in ids]):
        run = BatchRun(manager, rows, None, None, decode, wanted=lambda chunk: [], window=8, span=64)  # type: ignore[arg-type]
        made = [RowResult(i, 1, [Completion([5], "eos")]) for i in range(3)]
        run._to_decode = made[:2]
        run._decoding = 1
        run._events.put(Failed(RuntimeError("the end")))
        run._events.put(made[2:])
        run._run()
        assert sorted(result.index for result in (run.result(), run.result(), run.result()) if result) == [0, 1, 2]
        with pytest.raises(RuntimeError, match="the end"):
            run.result()
        if decode is not None:
            assert [result.completions[0].text for result in made[:2]] == ["?", "?"]


def test_a_run_without_texts_that_is_stopped_does_not_hang(manager: Any) -> None:
    rows = iter([RowBlock(0, [{"prompt": "a"}])])
    run = BatchRun(manager, rows, None, None, None, wanted=lambda chunk: [], window=8, span=64)  # type: ignore[arg-type]
    run._to_decode = [RowResult(0, 1, [Completion([5], "eos")])]
    run._leader.start()
    assert [result.index for result in run.stop()] == [0]


def test_a_tokenizer_that_loses_a_completion_ends_the_run(manager: Any) -> None:
    decode: Any = lambda ids: ["?"] * (len(ids) - 1)  # noqa: E731
    run = BatchRun(manager, iter([]), None, None, decode, wanted=lambda chunk: [], window=8, span=64)  # type: ignore[arg-type]
    run._decode_rows([RowResult(0, 1, [Completion([5], "eos"), Completion([6], "eos")])])
    failed = run._events.get_nowait()
    assert isinstance(failed, Failed) and isinstance(failed.error, ValueError) and failed.decoding == 1


@pytest.mark.parametrize(
    ("rows", "window", "most"), [(32, 1000, 48), (32, 40, 40), (8, 1000, 16), (64, 1000, 96)], ids=str
)
def test_the_engine_gets_half_a_step_of_rows_in_advance(rows: int, window: int, most: int) -> None:
    manager: Any = SimpleNamespace(assembly=None, config=SimpleNamespace(max_rows=rows))
    run = BatchRun(manager, iter([]), None, None, None, wanted=lambda chunk: [], window=window, span=2000)  # type: ignore[arg-type]
    submitted: list[RowJob] = []

    def submit(jobs: list[RowJob]) -> None:
        submitted.extend(jobs)
        run._jobs.update({job.request.request_id: (job, GenerationHandle("", print)) for job in jobs})

    run._submit = submit  # type: ignore[method-assign]
    for index in range(200):
        run._admission.add([RowJob(PreparedRow(index, (1,)), 0, Request(str(index), (1,), 2))])
    run._feed()
    assert len(submitted) == most
    least = max(1, min(rows, most) // 16)
    for _ in range(least - 1):
        run._jobs.popitem()
        run._feed()
    assert len(submitted) == most, "it waits until a few more can go together"
    run._jobs.popitem()
    run._feed()
    assert len(submitted) == most + least


def test_a_panic_of_a_tokenizer_is_its_rows_own(manager: Any, tokenizer: Any, expected: Any) -> None:
    class Panic(BaseException):
        pass

    def prompt(row: dict[str, Any]) -> str:
        if row["prompt"] == ROWS[3]["prompt"]:
            raise Panic("overflow")
        return str(row["prompt"])

    done = generate_dataset(manager, ROWS.select(range(6)), tokenizer, prompt=prompt, on_error="record", **NEW)
    assert done["error"][3] == "overflow"
    assert done["completion_ids"][:] == [*expected[:3], None, *expected[4:6]]


def test_a_row_that_ended_when_a_run_fails_is_kept(manager: Any) -> None:
    """The leading thread has not heard of its end."""
    rows = iter([RowBlock(0, [{"prompt": "a"}])])
    run = BatchRun(manager, rows, None, None, None, wanted=lambda chunk: [], window=8, span=64)  # type: ignore[arg-type]
    ended = GenerationHandle("a", lambda handle: None)
    ended._push(5, None, 0.0)
    ended._finish("eos")
    row = PreparedRow(0, (1, 2))
    run._live_rows[0] = _Live(row, 1, [None])
    run._jobs["a"] = RowJob(row, 0, None), ended  # type: ignore[arg-type]
    run._events.put(Failed(RuntimeError("the end")))
    run._events.put(ended)
    run._run()
    assert run.result() == RowResult(0, 2, [Completion([5], "eos")])
    with pytest.raises(RuntimeError, match="the end"):
        run.result()
