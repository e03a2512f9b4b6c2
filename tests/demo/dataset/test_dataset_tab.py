"""Tables: read with bounds, completed row by row, stopped and gone on with."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from support.demo import wait_until_idle
from support.pace import slowed

from demo.dataset.completion import complete_table, rows_of_a_table
from demo.dataset.handlers import DatasetRuns, TableJob, problem_html, progress_html, rows_html, table_html
from demo.dataset.table import BUILT_IN, MAX_ROWS, TableError, built_in, read_table, text_columns, write_table
from demo.serving.backend import Backend
from demo.serving.errors import LineFullError
from demo.serving.serving import Serving
from demo.serving.settings import Settings
from hf_async_batching.dataset.run.progress import DatasetProgress

GREEDY = Settings(max_new_tokens=8, greedy=True)
ROWS = [{"n": i, "ask": f"Question {i}, please?", "note": None if i % 2 else "x"} for i in range(40)]
VISITOR: Any = SimpleNamespace(session_hash="visitor")


def write(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / name
    if name.endswith(".csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.ndjson", "a.PARQUET".lower()])
def test_the_three_kinds_are_read(tmp_path: Path, name: str) -> None:
    table, more = read_table(write(tmp_path, name))
    assert table["ask"][:2] == ["Question 0, please?", "Question 1, please?"]
    assert len(table) == 40
    assert not more
    assert "ask" in text_columns(table)
    assert name == "a.csv" or "n" not in text_columns(table)


def test_what_is_too_much_is_left_out_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"prompt": str(i)} for i in range(MAX_ROWS + 5)]
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        table, more = read_table(write(tmp_path, name, many))
        assert (len(table), more) == (MAX_ROWS, True)
    path = write(tmp_path, "b.jsonl")
    monkeypatch.setattr("demo.dataset.table.MAX_BYTES", 100)
    with pytest.raises(TableError, match="MB are read"):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "hello", "CSV, JSONL or Parquet"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: more cells"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read"),
        ("a.jsonl", "[1, 2]\n", "line 1: one JSON object"),
        ("a.jsonl", '{"a": 1\n', "cannot be read"),
        ("a.jsonl", '{"a": 1}\n{"a": {"b": 2}}\n', "cannot be read"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.csv", ",".join(map(str, range(100))) + "\n" + "," * 99 + "\n", "more than 64 columns"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TableError, match=words):
        read_table(path)


def test_the_built_in_table_has_prompts() -> None:
    (name,) = BUILT_IN
    table = built_in(name)
    assert len(table) == 40
    assert "prompt" in text_columns(table)
    assert len(set(table["prompt"])) == 40


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_result_can_be_read_again(tmp_path: Path, kind: str) -> None:
    table = Dataset.from_list([{"prompt": "Grüße,\n<b>", "n": 1}])
    again, _ = read_table(write_table(table, tmp_path, kind))
    assert again[0]["prompt"] == "Grüße,\n<b>"


def test_every_row_is_completed_in_its_place(serving: Serving, tmp_path: Path) -> None:
    table = Dataset.from_list([*ROWS, {"n": 40, "ask": "x" * 30_000, "note": None}])
    seen: list[DatasetProgress] = []
    done = complete_table(serving, table, "ask", GREEDY, tmp_path, lambda progress: not seen.append(progress))
    assert done is not None
    assert done.column_names[:3] == ["n", "ask", "note"]
    assert done["n"] == list(range(41))
    assert all(done["completion"][:40])
    assert set(done["finish_reason"][:40]) <= {"length", "eos"}
    assert done["error"][:40] == [None] * 40
    assert done["completion"][40] is None
    assert "exceed the limit" in done["error"][40]
    assert (seen[-1].rows, seen[-1].total, seen[-1].failed, seen[-1].resumed) == (41, 41, 1, 0)
    assert seen[-1].remaining_seconds == 0
    wait_until_idle(serving)


def test_a_stopped_run_goes_on_where_it_was(serving: Serving, tmp_path: Path) -> None:
    table = Dataset.from_list(ROWS)
    folder = tmp_path / "parts"
    folder.mkdir()
    parts = 0
    slow = Settings(max_new_tokens=40, greedy=True)
    whole = complete_table(serving, table, "ask", slow, tmp_path, lambda _: True)
    while (done := complete_table(serving, table, "ask", slow, folder, lambda p: p.rows < p.resumed + 9)) is None:
        wait_until_idle(serving)
        parts += 1
        assert parts < 10
    assert parts >= 1
    assert whole is not None
    assert done.to_list() == whole.to_list()


def test_the_tab_runs_stops_resumes_and_hands_out(serving: Serving, tmp_path: Path) -> None:
    runs = DatasetRuns(Backend(serving))
    path = write(tmp_path, "a.jsonl", [{"ask": f"{i}?"} for i in range(20)])
    knobs = ("", str(path), "ask", "", 60, True, "csv")
    names: list[str] = []

    async def run_and_stop() -> None:
        async for page in runs.on_run(*knobs, request=VISITOR):
            name, progress, *_ = page
            names.append(name)
            if "of 20 rows" in str(progress):
                await runs.on_stop(VISITOR)
        assert "stopped" in page[1]
        assert (page[2]["visible"], page[3]["visible"], page[4]["visible"]) == (True, False, True)
        job = runs.find(names[-1])
        assert job is not None
        assert page[5]["visible"] == bool(job.finished.rows), "what is done can be had"

    async def resume() -> None:
        job = runs.find(names[-1])
        assert job is not None
        again = await runs.on_load(job.name)
        assert again[4]["visible"], "a reload offers to go on"
        page = [page async for page in runs.on_resume(job.name, VISITOR)][-1]
        assert "20 of 20 rows" in page[1]
        assert "done in" in page[1]
        assert (page[4]["visible"], page[5]["visible"]) == (False, True)
        with Path(page[5]["value"]).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["ask"] for row in rows] == [f"{i}?" for i in range(20)]
        assert all(row["completion"] for row in rows)

    with slowed(serving.manager):
        asyncio.run(run_and_stop())
    asyncio.run(resume())
    wait_until_idle(serving)


def test_a_closed_tab_stops_the_run(serving: Serving) -> None:
    runs = DatasetRuns(Backend(serving))
    job = TableJob(Dataset.from_list(ROWS), "ask", Settings(max_new_tokens=900, greedy=True), "csv")

    async def run() -> None:
        states = runs.run(job, "visitor")
        async for _ in states:
            if serving.manager.stats().running:
                break
        await states.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())
    wait_until_idle(serving)
    assert job.result is None


def test_problems_are_told_in_the_tab(serving: Serving, tmp_path: Path) -> None:
    runs = DatasetRuns(Backend(serving))

    async def last(pages: Any) -> Any:
        async for page in pages:
            result = page
        return result

    broken = write(tmp_path, "a.jsonl")
    broken.write_text("<script>")
    column, about = asyncio.run(runs.on_table("", str(broken), VISITOR))
    assert column["choices"] == []
    assert 'role="alert"' in about
    page = asyncio.run(last(runs.on_run("", str(write(tmp_path, "b.jsonl")), "n", "", 8, True, "csv", VISITOR)))
    assert "Choose a column that holds text" in page[1]
    page = asyncio.run(last(runs.on_resume("unknown", VISITOR)))
    assert "does not know this run" in page[1]
    assert "<script>" not in problem_html("<script>")
    assert "<script>" not in table_html(Dataset.from_list([{"a": "<script>"}]), "a", False)


def test_a_table_takes_a_part_of_the_rows(serving: Serving, tmp_path: Path) -> None:
    table = Dataset.from_list([{"ask": f"{i}?"} for i in range(12)])
    most = []

    def look(_: DatasetProgress) -> bool:
        stats = serving.manager.stats()
        most.append(stats.running + stats.waiting)
        return True

    with slowed(serving.manager):
        done = complete_table(serving, table, "ask", Settings(max_new_tokens=20, greedy=True), tmp_path, look)
    assert done is not None
    assert 1 <= max(most) <= rows_of_a_table(serving) == 2


def test_tables_wait_in_line_and_a_run_expires(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.dataset.handlers.RUN_SECONDS", 2.0)
    runs, long = DatasetRuns(Backend(serving)), Settings(max_new_tokens=900, greedy=True)
    jobs = [TableJob(Dataset.from_list(ROWS), "ask", long, "jsonl") for _ in range(7)]
    places: dict[int, list[int]] = {}

    async def run(number: int) -> None:
        async for job in runs.run(jobs[number], f"visitor-{number}", "owner"):
            places.setdefault(number, []).append(job.place)

    async def everyone() -> None:
        started = [asyncio.create_task(run(number)) for number in range(6)]
        await asyncio.sleep(0.1)
        with pytest.raises(LineFullError, match="from your address"):
            await run(6)
        other = TableJob(Dataset.from_list(ROWS[:1]), "ask", GREEDY, "jsonl")
        seen = [job.place async for job in runs.run(other, "another", "other")]
        assert not any(seen), "one owner leaves a place to others"
        assert other.result is not None
        for number in range(2, 6):
            runs.stop(f"visitor-{number}")
        await asyncio.gather(*started)

    asyncio.run(everyone())
    assert [max(seen) for _, seen in sorted(places.items())] == [0, 0, 1, 2, 3, 4]
    assert "so that others can run" in jobs[0].error
    assert all(not job.running for job in jobs)
    assert not jobs[6].folder.exists()
    wait_until_idle(serving)


def test_jobs_are_forgotten_by_what_they_take(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.dataset.handlers._KEPT_BYTES", 1_600_000)
    runs = DatasetRuns(Backend(serving))
    jobs = [TableJob(Dataset.from_list([{"ask": "x" * 400_000}]), "ask", GREEDY, "csv") for _ in range(6)]
    for job in jobs:
        job.folder_bytes = 100_000
        runs._keep(job)
    assert [runs.find(job.name) is not None for job in jobs] == [False, False, False, True, True, True]
    assert [job.folder.exists() for job in jobs] == [False, False, False, True, True, True]


def test_a_stopped_table_shows_and_gives_out_what_is_done(serving: Serving) -> None:
    runs = DatasetRuns(Backend(serving))
    rows = [{"ask": f"<b>{i}</b>", "completion": "mine"} for i in range(60)]
    job = TableJob(Dataset.from_list(rows), "ask", GREEDY, "jsonl")

    async def run() -> None:
        with slowed(serving.manager, 0.02):
            async for _ in runs.run(job, "visitor"):
                if len(job.finished.rows) >= 4:
                    runs.stop("visitor")

    asyncio.run(run())
    assert job.result is None
    assert 4 <= len(job.finished.rows) < 60
    assert "stopped" in progress_html(job)
    assert job.file is not None
    done = [json.loads(line) for line in job.file.read_text().splitlines()]
    assert len(done) == len(job.finished.rows)
    assert all(row["completion"] == "mine" and row["completion_"] for row in done), "a visitor's column stays"
    shown = rows_html(job)
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown

    async def resume() -> None:
        async for _ in runs.run(job, "visitor"):
            pass

    asyncio.run(resume())
    assert len(job.finished.rows) == 60
    assert "done in" in progress_html(job)
    assert "stopped" not in progress_html(job)
    assert "and 20 rows before these" in rows_html(job)
    wait_until_idle(serving)


def test_a_stop_after_the_last_row_leaves_nothing(serving: Serving, tmp_path: Path) -> None:
    table = Dataset.from_list(ROWS[:4])
    assert complete_table(serving, table, "ask", GREEDY, tmp_path, lambda progress: progress.rows < 4) is not None
