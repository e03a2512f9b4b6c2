"""Handles the Dataset tab: reads a table, completes it, stops, resumes, and hands out the result."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from datasets import Dataset

from hf_async_batching.dataset.run.progress import DatasetProgress

from ..serving.backend import Backend
from ..serving.errors import LineFullError
from ..serving.line import Line
from ..serving.pools import DATASETS, TABLES, BusyError
from ..serving.problems import explain
from ..serving.serving import Serving
from ..serving.settings import Settings
from ..serving.visitor import owner_of, visitor_of
from .completion import column_names, complete_table, rows_of_a_table
from .finished import FinishedRows
from .table import (
    BUILT_IN,
    FORMATS,
    MAX_BYTES,
    MAX_ROWS,
    TableError,
    built_in,
    likely_column,
    read_table,
    text_columns,
    write_table,
)

_LOOK_SECONDS = 0.25
_KEPT_JOBS = 64
# Bytes of all tables in memory and of all job folders. Above this, the jobs that ended first are removed.
_KEPT_BYTES = 512 << 20
# A longer run is stopped and gives its place to others; the visitor can resume it.
RUN_SECONDS = 1800.0
# Equal to the threads of `pools.DATASETS`: an owner never takes the last thread.
_RUNNING, _WAITING = 3, 8
_SHOWN_PROMPTS = 3
# Rows of the live table, the newest first, and characters of a cell.
_SHOWN_ROWS, _SHOWN_CHARACTERS = 40, 240
# The job's id, progress, Run, Stop, Resume, download, rows.
Page = tuple[Any, Any, Any, Any, Any, Any, Any]


def _make_folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="hf_async_batching-", ignore_cleanup_errors=True)


@dataclass
class TableJob:
    """A table, and the run that completes it.

    Attributes:
        name: Cannot be guessed. The browser that started the job keeps it, and finds the job again after a reload.
    """

    table: Dataset
    column: str
    settings: Settings
    kind: str
    name: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    temporary: TemporaryDirectory[str] = field(default_factory=_make_folder)
    stopped: bool = False
    running: bool = False
    progress: DatasetProgress | None = None
    result: Dataset | None = None
    file: Path | None = None
    error: str = ""
    place: int = 0
    folder_bytes: int = 0
    finished: FinishedRows = field(init=False)

    def __post_init__(self) -> None:
        names = column_names(self.table)
        names = {"text": names["text"], "finish_reason": names["finish_reason"], "error": names["error"]}
        self.finished = FinishedRows(self.folder / "done", names)

    @property
    def folder(self) -> Path:
        """Folder of the rows; removed with the job."""
        return Path(self.temporary.name)

    @property
    def bytes(self) -> int:
        """Bytes that the job takes in memory and on disk."""
        tables = [table for table in (self.table, self.result) if table is not None]
        return sum(int(table.data.nbytes) for table in tables) + self.folder_bytes

    def wanted(self, progress: DatasetProgress) -> bool:
        """Note the progress and the new rows."""
        self.progress = progress
        self.finished.read()
        return not self.stopped


class DatasetRuns:
    """The jobs of all visitors. The oldest jobs are dropped, and their folders removed."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._jobs: dict[str, TableJob] = {}
        self._by_visitor: dict[str, TableJob] = {}
        self._line = Line(_RUNNING, _WAITING, running_each=_RUNNING - 1, waiting_each=_WAITING // 2)

    async def run(self, job: TableJob, visitor: str, owner: str = "") -> AsyncIterator[TableJob]:
        """Complete the remaining rows of a job's table; yield the job a few times a second.

        A few tables run at a time, and the others wait in line (`TableJob.place`). The job stops when this generator
        is closed (a closed tab), and after `RUN_SECONDS`. Finished rows are kept.

        Raises:
            TableError: The job runs or waits already, or the visitor has another one.
            LineFullError: Too many wait already.
            BackendFailedError: There is no model.
        """
        if job.running:
            raise TableError("This table is being completed already.")
        if visitor in self._by_visitor:
            raise TableError("Another table of yours is being completed: stop it first.")
        serving = await self._backend.ready()
        try:
            ticket = self._line.join(owner)
        except LineFullError:
            if job.name not in self._jobs:
                job.temporary.cleanup()
            raise
        with ticket:
            self._keep(job)
            job.stopped, job.error, job.running = False, "", True
            self._by_visitor[visitor] = job
            task: asyncio.Task[None] | None = None
            try:
                while (place := ticket.place) and not job.stopped:
                    job.place = place
                    yield job
                    await asyncio.sleep(_LOOK_SECONDS)
                job.place = 0
                if not job.stopped:
                    task = asyncio.create_task(self._complete(job, serving, owner))
                    expires = time.monotonic() + RUN_SECONDS
                    while not task.done():
                        yield job
                        await asyncio.wait((task,), timeout=_LOOK_SECONDS)
                        if time.monotonic() > expires and not job.stopped:
                            job.stopped = True
                            job.error = f"stopped after {RUN_SECONDS / 60:.0f} minutes, so that others can run"
                    await task
            except Exception as error:  # shown on the page; finished rows are kept
                job.error = explain(error).plain()
            finally:
                job.stopped, job.place = True, 0
                job.running = task is not None and not task.done()
                if self._by_visitor.get(visitor) is job:
                    del self._by_visitor[visitor]
        yield job

    async def _complete(self, job: TableJob, serving: Serving, owner: str) -> None:
        """Complete a job in its own thread. A ticket of the line has a thread, unless a stopped run still holds it."""
        serving.roster.reserve(job.name, owner or job.name, rows_of_a_table(serving))
        try:
            while True:
                try:
                    await DATASETS.run(_work, serving, job)
                    return
                except BusyError:  # a run that was stopped just now still holds its thread
                    if job.stopped:
                        return
                    await asyncio.sleep(_LOOK_SECONDS)
        finally:
            serving.roster.release(job.name)
            job.running = False

    def stop(self, visitor: str) -> None:
        """Stop this visitor's job, if one runs; finished rows are kept."""
        job = self._by_visitor.get(visitor)
        if job is not None:
            job.stopped = True

    def find(self, name: Any) -> TableJob | None:
        """Return a job by its name."""
        return self._jobs.get(name) if isinstance(name, str) else None

    def _keep(self, job: TableJob) -> None:
        """Remember a job. Above the bounds on number and size, drop the oldest jobs that do not run."""
        self._jobs.pop(job.name, None)
        self._jobs[job.name] = job
        size = sum(other.bytes for other in self._jobs.values())
        for name, other in list(self._jobs.items()):
            if len(self._jobs) <= _KEPT_JOBS and size <= _KEPT_BYTES:
                return
            if other.running or other is job:
                continue
            size -= other.bytes
            del self._jobs[name]
            other.temporary.cleanup()

    # -- the page's events ----------------------------------------------------------------------------------------

    async def on_table(self, source: str, file: str | None, request: gr.Request) -> tuple[Any, str]:
        """Show a table's columns and its first rows."""
        try:
            table, more = await TABLES.run_for(owner_of(request), _open, source, file)
            columns = text_columns(table)
            if not columns:
                raise TableError("No column of this table holds text.")
        except (TableError, BusyError) as error:
            return gr.update(choices=[], value=None), problem_html(str(error))
        column = likely_column(table)
        return gr.update(choices=columns, value=column), table_html(table, column, more)

    async def on_column(self, source: str, file: str | None, column: str | None, request: gr.Request) -> str:
        """Show the first prompts of another column."""
        try:
            table, more = await TABLES.run_for(owner_of(request), _open, source, file)
        except (TableError, BusyError) as error:
            return problem_html(str(error))
        return table_html(table, column, more) if column in table.column_names else problem_html("Choose a column.")

    async def on_run(
        self,
        source: str,
        file: str | None,
        column: str | None,
        system: str,
        max_new_tokens: float,
        greedy: bool,
        kind: str,
        request: gr.Request,
    ) -> AsyncIterator[Page]:
        """Complete a table from its first row."""
        try:
            table, _ = await TABLES.run_for(owner_of(request), _open, source, file)
            if column not in text_columns(table):
                raise TableError("Choose a column that holds text.")
        except (TableError, BusyError) as error:
            yield _page(problem_html(str(error)), running=False)
            return
        settings = Settings.within_bounds(system=system, max_new_tokens=max_new_tokens, greedy=greedy)
        job = TableJob(table, str(column), settings, kind if isinstance(kind, str) and kind in FORMATS else FORMATS[0])
        async for page in self._pages(job, request):
            yield page

    async def on_resume(self, name: Any, request: gr.Request) -> AsyncIterator[Page]:
        """Continue a stopped job."""
        job = self.find(name)
        if job is None:
            yield _page(problem_html("The server does not know this run any more. Start it anew."), running=False)
            return
        async for page in self._pages(job, request):
            yield page

    async def on_stop(self, request: gr.Request) -> None:
        """Stop; finished rows are kept."""
        self.stop(visitor_of(request))

    async def on_load(self, name: Any) -> Page:
        """After a reload, offer to continue the job that the reload stopped."""
        job = self.find(name)
        if job is None or job.progress is None:
            return _page(None)
        return _page(progress_html(job), running=False, job=job)

    async def _pages(self, job: TableJob, request: gr.Request) -> AsyncIterator[Page]:
        page = _page(None)
        try:
            async for _ in self.run(job, visitor_of(request), owner_of(request)):
                page = _page(progress_html(job), name=job.name, running=True, job=job)
                yield page
            page = _page(progress_html(job), name=job.name, running=False, job=job)
        except Exception as error:
            told = str(error) if isinstance(error, TableError) else explain(error).plain()
            page = _page(problem_html(told), running=False)
        yield page


def _work(serving: Serving, job: TableJob) -> None:
    try:
        result = complete_table(serving, job.table, job.column, job.settings, job.folder, job.wanted)
        job.finished.read()
        if result is not None:
            job.file = write_table(result, job.folder, job.kind)
            job.result = result
        elif job.finished.rows:
            job.file = write_table(job.finished.table(job.table), job.folder, job.kind)
    finally:
        job.folder_bytes = sum(path.stat().st_size for path in job.folder.rglob("*") if path.is_file())


def progress_html(job: TableJob) -> str:
    """Return a job's progress and remaining time as HTML."""
    progress = job.progress
    if job.place:
        return f'<p role="status">Other tables come first: place {job.place} in line …</p>'
    if progress is None:
        return '<p role="status">Starting …</p>'
    parts = [f"{progress.rows:,} of {progress.total:,} rows", f"{progress.tokens_per_second:,.1f} tokens/s"]
    left = progress.remaining_seconds
    if job.result is not None:
        parts.append(f"done in {_clock(progress.seconds)}")
    elif job.running and not job.stopped:
        parts.append(f"{_clock(left)} left" if left is not None else "estimating …")
    else:
        parts.append("stopped")
    if progress.failed:
        parts.append(f"{progress.failed:,} failed; their rows say why")
    if job.error:
        parts.append(job.error)
    percent = 100 * progress.rows / progress.total if progress.total else 100
    return (
        f'<p role="status">{escape(" · ".join(parts))}</p><div class="hfab"><div class="meter" role="progressbar" '
        f'aria-label="Finished rows" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent:.0f}">'
        f'<span style="width:{percent:.1f}%"></span></div></div>'
    )


def rows_html(job: TableJob) -> str:
    """Return the finished rows as a table, the newest first."""
    rows = sorted(job.finished.rows.items(), reverse=True)[:_SHOWN_ROWS]
    if not rows:
        return ""
    prompts = job.table.select([index for index, _ in rows])[job.column]

    def cell(text: str | None) -> str:
        text = text or ""
        return escape(text[:_SHOWN_CHARACTERS] + ("…" if len(text) > _SHOWN_CHARACTERS else ""))

    body = "".join(
        f"<tr><th scope=row>{index + 1}</th><td>{cell(prompt)}</td>"
        + (f'<td class="problem">{cell(row.error)}</td></tr>' if row.error else f"<td>{cell(row.text)}</td></tr>")
        for (index, row), prompt in zip(rows, prompts, strict=True)
    )
    more = len(job.finished.rows) - len(rows)
    note = f"<p>and {more:,} rows before these, in the download</p>" if more else ""
    return (
        '<div class="hfab rows" tabindex="0" role="region" aria-label="Finished rows"><table><thead><tr>'
        f"<th scope=col>Row</th><th scope=col>Prompt</th><th scope=col>Completion</th></tr></thead>"
        f"<tbody>{body}</tbody></table>{note}</div>"
    )


def problem_html(text: str) -> str:
    """Return an error as HTML."""
    return f'<p role="alert" class="problem">{escape(text)}</p>'


def table_html(table: Dataset, column: str | None, more: bool) -> str:
    """Return a table's size and first prompts as HTML."""
    size = f"The first {MAX_ROWS:,} rows are used." if more else f"{len(table):,} rows."
    first = [str(prompt or "")[:120] for prompt in table[:_SHOWN_PROMPTS][column]] if column else []
    items = "".join(f"<li>{escape(prompt)}</li>" for prompt in first)
    bounds = f"CSV, JSONL and Parquet files are read up to {MAX_BYTES >> 20} MB and {MAX_ROWS:,} rows."
    heading = f"The first prompts, from the column <b>{escape(str(column))}</b>:" if first else ""
    return f'<p role="status">{size} {bounds}</p><p>{heading}</p><ul class="first">{items}</ul>'


def _open(source: str, file: str | None) -> tuple[Dataset, bool]:
    if file:
        return read_table(Path(file))
    if not isinstance(source, str) or source not in BUILT_IN:
        raise TableError("Upload a CSV, JSONL or Parquet file, or choose the built-in table.")
    return built_in(source), False


def _page(
    progress: str | None,
    *,
    name: str | None = None,
    running: bool | None = None,
    job: TableJob | None = None,
) -> Page:
    same = gr.skip()
    if running is None:
        return same, same if progress is None else progress, same, same, same, same, same
    file = job.file if job is not None and not running else None
    whole = job is not None and job.result is not None
    return (
        same if name is None else name,
        same if progress is None else progress,
        gr.update(visible=not running),
        gr.update(visible=running),
        gr.update(visible=job is not None and not whole and not running),
        gr.update(
            visible=file is not None,
            value=str(file) if file is not None else None,
            label="Download" if whole else "Download what is done",
        ),
        same if job is None else rows_html(job),
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
