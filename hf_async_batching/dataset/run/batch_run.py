"""Serves rows with a reader, tokenizing threads, the engine, a decoding thread, and one leading thread.

::

    reader ─▶ tokenizing ─▶ admission ─▶ engine ─▶ decoding ─▶ results
       ▲                                                          │
       └─────────────── window: rows that are not finished ◀──────┘

All state belongs to the leading thread; the others send it events through one queue. The window bounds memory: the
reader waits until rows have left the window, and a row leaves it when the caller has taken the row.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from hf_async_batching.dataset.rows.prompts import PromptMaker
from hf_async_batching.dataset.rows.row import Completion, PreparedRow, RowBlock, RowResult
from hf_async_batching.dataset.run.ordering import RowJob, RowOrdering
from hf_async_batching.dataset.run.row_requests import RowRequests
from hf_async_batching.dataset.run.window import RowWindow
from hf_async_batching.errors import (
    EngineClosedError,
    EngineFailedError,
    ForkedProcessError,
    HfAsyncBatchingError,
    QueueFullError,
)
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.manager import GenerationManager
from hf_async_batching.runtime.forking import forks

# The run ends at this many failures of the engine. Before that, lost completions are submitted again.
MAX_ENGINE_FAILURES = 3

_DECODE_BATCH = 32
_QUEUE_FULL_SECONDS = 0.05

Decode = Callable[[list[list[int]]], list[str]]


class Failed(NamedTuple):
    """The run cannot continue; `decoding` is 1 if decoding a batch of rows has failed."""

    error: BaseException
    decoding: int = 0


class _Prepared(NamedTuple):
    rows: list[PreparedRow]


class _ReadAll(NamedTuple):
    chunks: int
    error: Exception | None


@dataclass(slots=True)
class _Live:
    """A row whose completions are in the engine or wait for it."""

    row: PreparedRow
    missing: int
    completions: list[Completion | None]
    handles: dict[int, GenerationHandle] = field(default_factory=dict)


class BatchRun:
    """Serves rows until there are no more.

    Args:
        manager: Serves the rows.
        chunks: The rows, in order.
        prompts: Makes prompts from rows.
        requests: Makes requests from prompts.
        decode: Turns the token ids of several completions into texts; None if no text is wanted.
        wanted: Returns the indices of the rows of a chunk that are to be served; called in the reader's thread.
        window: Number of rows that may be unfinished at once.
        span: Largest distance between the oldest unfinished row and the newest one.
        threads: Number of threads that tokenize.
    """

    def __init__(
        self,
        manager: GenerationManager,
        chunks: Iterator[RowBlock],
        prompts: PromptMaker,
        requests: RowRequests,
        decode: Decode | None,
        *,
        wanted: Callable[[RowBlock], Sequence[int]],
        window: int,
        span: int,
        threads: int | None = None,
    ) -> None:
        self._forks = forks()
        self._manager = manager
        self._chunks = chunks
        self._prompts = prompts
        self._requests = requests
        self._decode = decode
        self._wanted = wanted
        self._window = RowWindow(window, span)
        self._window_rows = window
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._results: SimpleQueue[RowResult | Failed | None] = SimpleQueue()
        self._admission = RowOrdering(block=max(1, window // 2), step_tokens=2048)
        self._live_rows: dict[int, _Live] = {}
        self._jobs: dict[str, tuple[RowJob, GenerationHandle]] = {}
        self._to_decode: list[RowResult] = []
        self._decoding = 0
        self._prepared_chunks = 0
        self._all_chunks: int | None = None
        self._read_error: Exception | None = None
        self._engine_failures: list[BaseException | None] = []
        self._stopped = threading.Event()
        threads = threads or min(4, os.cpu_count() or 1)
        self._tokenizing = ThreadPoolExecutor(threads, "hf_async_batching-tokenize")
        self._detokenizing = ThreadPoolExecutor(1, "hf_async_batching-decode")
        self._reader = threading.Thread(target=self._read, name="hf_async_batching-read", daemon=True)
        self._leader = threading.Thread(target=self._run, name="hf_async_batching-dataset", daemon=True)

    # -- for the caller -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start reading and serving."""
        self._reader.start()
        self._leader.start()

    def result(self, timeout: float | None = None) -> RowResult | None:
        """Return the next finished row, in arbitrary order; None after the last one.

        Raises:
            queue.Empty: No row was finished within `timeout` seconds.
            ForkedProcessError: The run was started before this process was forked.
            Exception: The error that ended the run.
        """
        if self._forks != forks():
            raise ForkedProcessError(
                "this run over a dataset was started before this process was forked, and it continues only in the "
                "parent: call generate_dataset again in this process"
            )
        result = self._results.get(timeout=timeout)
        if isinstance(result, Failed):
            raise result.error
        return result

    def release(self, index: int) -> None:
        """Take a row out of the window when the caller has used it, so that another one may be read."""
        if self._forks == forks():
            self._window.leave(index)

    def stop(self) -> list[RowResult]:
        """End the run now. Returns the finished rows that were not taken yet.

        Does nothing in a forked process, because threads of the parent may have held the run's locks at the fork.
        """
        if self._forks != forks():
            return []
        self._stopped.set()
        self._window.close()
        self._events.put(None)
        if self._leader.ident is not None:
            self._leader.join()
        return [result for result in _waiting(self._results) if isinstance(result, RowResult)]

    # -- other threads --------------------------------------------------------------------------------------------

    def _read(self) -> None:
        count = 0
        try:
            while True:
                try:
                    chunk = next(self._chunks, None)
                except HfAsyncBatchingError:
                    raise
                except Exception as error:  # from the dataset's own code; earlier rows are served
                    self._events.put(_ReadAll(count, error))
                    return
                if chunk is None:
                    self._events.put(_ReadAll(count, None))
                    return
                wanted = list(self._wanted(chunk))
                if not self._window.enter(wanted):
                    return
                count += 1
                self._tokenizing.submit(self._prepare, chunk, wanted)
        except BaseException as error:
            self._events.put(Failed(error))

    def _prepare(self, chunk: RowBlock, wanted: list[int]) -> None:
        try:
            self._events.put(_Prepared([] if self._stopped.is_set() else self._prompts(chunk, wanted)))
        except BaseException as error:
            self._events.put(Failed(error))

    def _decode_rows(self, rows: list[RowResult]) -> None:
        try:
            assert self._decode is not None
            completions = [completion for row in rows for completion in row.completions]
            texts = self._decode([completion.token_ids for completion in completions])
            for completion, text in zip(completions, texts, strict=True):
                completion.text = text
            self._events.put(rows)
        except BaseException as error:
            self._events.put(Failed(error, decoding=1))

    # -- the leading thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._finished():
                self._take_events()
                if self._stopped.is_set():
                    self._decode_the_rest()
                    break
                self._feed()
                self._send_to_decode()
            self._results.put(None if self._read_error is None else Failed(self._read_error))
        except BaseException as error:
            self._stopped.set()
            self._window.close()
            with contextlib.suppress(Exception):
                self._take_what_is_made()
                self._decode_the_rest()
            self._results.put(Failed(error))
        finally:
            for _, handle in self._jobs.values():
                handle.cancel()
            self._tokenizing.shutdown(wait=False, cancel_futures=True)
            self._detokenizing.shutdown(wait=False, cancel_futures=True)

    def _finished(self) -> bool:
        everything_prepared = self._all_chunks is not None and self._prepared_chunks == self._all_chunks
        return everything_prepared and not (self._live_rows or self._to_decode or self._decoding)

    def _take_events(self) -> None:
        """Wait for events, and handle all of them."""
        self._take(self._events.get())
        for event in _waiting(self._events):
            self._take(event)

    def _take(self, event: Any) -> None:
        if isinstance(event, GenerationHandle):
            self._take_handle(event)
        elif isinstance(event, _Prepared):
            self._prepared_chunks += 1
            for row in event.rows:
                self._admit(row)
        elif isinstance(event, _ReadAll):
            self._all_chunks, self._read_error = event
        elif isinstance(event, Failed):
            self._decoding -= event.decoding
            raise event.error
        elif isinstance(event, list):
            self._decoding -= 1
            for result in event:
                self._results.put(result)

    def _admit(self, row: PreparedRow) -> None:
        jobs: list[RowJob] = []
        if row.error is None:
            try:
                jobs = self._requests.jobs(row)
            except EngineClosedError:
                raise
            except Exception as error:
                row.error = str(error)
        if row.error is not None:
            self._results.put(RowResult(row.index, len(row.prompt) or None, error=row.error))
            return
        self._live_rows[row.index] = _Live(row, len(jobs), [None] * len(jobs))
        self._admission.add(jobs)

    def _feed(self) -> None:
        """Submit requests in batches until the engine has a full step and some waiting requests to choose from."""
        rows = self._engine_rows()
        # A chunk of rows may be larger than the window, but the engine gets no more rows than the window holds.
        most = min(rows + max(8, rows // 2), self._window_rows)
        room = most - len(self._jobs)
        if room < max(1, min(rows, most) // 16) or not self._admission:
            return
        self._submit(self._admission.take(room))

    def _engine_rows(self) -> int:
        assembly = self._manager.assembly
        if assembly is not None:
            self._admission.step_tokens = assembly.config.max_batch_tokens
            return assembly.config.max_rows
        return self._manager.config.max_rows or (256 if self._manager.model.device.type == "cuda" else 32)

    def _submit(self, jobs: list[RowJob]) -> None:
        # Another completion may have failed the row already.
        jobs = [job for job in jobs if job.row.index in self._live_rows]
        if not jobs or self._stopped.is_set():
            return
        beside = [job for job in jobs if job.arguments is not None]
        if beside and len(jobs) > 1:
            for job in beside:
                self._submit([job])
            self._submit([job for job in jobs if job.arguments is None])
            return
        try:
            if beside:
                handles = [self._submit_beside(beside[0])]
            else:
                handles = self._manager.submit_requests([job.request for job in jobs])
        except QueueFullError:
            # Other callers use the manager too, or its limit is smaller than the engine's step.
            if len(jobs) == 1:
                time.sleep(_QUEUE_FULL_SECONDS)
                self._admission.add_again(jobs[0])
                self._events.put(())
            else:
                self._submit(jobs[: len(jobs) // 2])
                self._submit(jobs[len(jobs) // 2 :])
            return
        except EngineClosedError:
            raise
        except Exception as error:
            # The manager takes all requests or none, so they are tried one by one to find the bad one.
            if len(jobs) > 1:
                for job in jobs:
                    self._submit([job])
            else:
                self._fail_row(jobs[0].row, error)
            return
        for job, handle in zip(jobs, handles, strict=True):
            self._jobs[handle.request_id] = job, handle
            self._live_rows[job.row.index].handles[job.completion] = handle
            handle.add_done_callback(self._events.put)

    def _submit_beside(self, job: RowJob) -> GenerationHandle:
        assert job.arguments is not None
        request = job.request
        return self._manager.submit(list(request.prompt), request_id=request.request_id, **job.arguments)

    def _take_handle(self, handle: GenerationHandle) -> None:
        job, _ = self._jobs.pop(handle.request_id)
        live = self._live_rows.get(job.row.index)
        if live is None:
            return
        try:
            result = handle.result()
        except (EngineFailedError, EngineClosedError) as error:
            self._lost(job, error)
            return
        except BaseException as error:  # raised by a processor or a criterion
            self._fail_row(job.row, error)
            return
        live.completions[job.completion] = Completion(result.token_ids, result.finish_reason, result.logprobs)
        live.missing -= 1
        if not live.missing:
            del self._live_rows[job.row.index]
            completions = [completion for completion in live.completions if completion is not None]
            self._to_decode.append(RowResult(job.row.index, len(job.row.prompt), completions))

    def _lost(self, job: RowJob, error: EngineFailedError | EngineClosedError) -> None:
        """Submit a completion again that was lost with its engine; the next request starts a fresh engine."""
        if self._manager.closed or self._stopped.is_set():
            raise error
        if not any(error.__cause__ is cause for cause in self._engine_failures):
            self._engine_failures.append(error.__cause__)
        if len(self._engine_failures) >= MAX_ENGINE_FAILURES:
            raise error
        self._admission.add_again(job._replace(request=self._requests.again(job.request)))

    def _fail_row(self, row: PreparedRow, error: BaseException) -> None:
        live = self._live_rows.pop(row.index, None)
        if live is None:
            return
        for handle in live.handles.values():
            handle.cancel()
        self._results.put(RowResult(row.index, len(row.prompt), error=str(error) or type(error).__name__))

    def _send_to_decode(self) -> None:
        """Send finished completions to the decoding thread when it is idle, or when there are many."""
        if not self._to_decode:
            return
        if self._decode is None:
            for result in self._to_decode:
                self._results.put(result)
            self._to_decode = []
            self._events.put(())
            return
        if len(self._to_decode) >= _DECODE_BATCH or not self._decoding:
            rows, self._to_decode = self._to_decode, []
            self._decoding += 1
            self._detokenizing.submit(self._decode_rows, rows)

    def _take_what_is_made(self) -> None:
        """After a failure, take the rows that were finished before the leading thread noticed it."""
        for event in _waiting(self._events):
            if isinstance(event, Failed):
                self._decoding -= event.decoding
            elif isinstance(event, (GenerationHandle, list)):
                with contextlib.suppress(HfAsyncBatchingError):
                    self._take(event)

    def _decode_the_rest(self) -> None:
        """Decode the completions that the engine finished before the run was stopped."""
        if self._to_decode:
            rows, self._to_decode = self._to_decode, []
            self._decoding += 1
            if self._decode is None:
                self._events.put(rows)
            else:
                self._detokenizing.submit(self._decode_rows, rows)
        while self._decoding:
            event = self._events.get()
            if isinstance(event, list):
                self._take(event)
            elif isinstance(event, Failed):  # the run ends anyway
                self._decoding -= event.decoding


def _waiting(queue: SimpleQueue[Any]) -> Iterator[Any]:
    """Take the entries of a queue until it is empty."""
    while True:
        try:
            entry = queue.get_nowait()
        except Empty:
            return
        yield entry


def make_decode(tokenizer: Any, skip_special_tokens: bool) -> Decode:
    """Make a decoder with its own tokenizer, for one thread."""
    return partial(copy.deepcopy(tokenizer).batch_decode, skip_special_tokens=skip_special_tokens)
