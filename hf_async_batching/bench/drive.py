"""Two ways to run a workload on our engine: through the manager, as users do, and without the engine's thread."""

from __future__ import annotations

import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedModel

from hf_async_batching.bench.workloads import Workload
from hf_async_batching.config import BatchingConfig
from hf_async_batching.core.plan import Features
from hf_async_batching.core.request import Request
from hf_async_batching.core.timeline import StepRecord
from hf_async_batching.devices.memory import return_memory
from hf_async_batching.engine.background_compile import compile_for
from hf_async_batching.engine.builder import EngineParts, build_engine
from hf_async_batching.handle import GenerationHandle, GenerationResult
from hf_async_batching.manager import GenerationManager
from hf_async_batching.model.view.model_view import make_view


@dataclass(slots=True)
class Served:
    """One pass of a workload.

    Attributes:
        seconds: From the arrival of the first requests to the last token.
        tokens: New tokens by request id.
        queue_seconds: Per request, from its arrival to the first step that computes its prompt.
        first_token_seconds: Per request, from its arrival to its first token.
        records: The steps of this pass.
    """

    seconds: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    queue_seconds: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    records: tuple[StepRecord, ...] = ()


class Driver(Protocol):
    """An engine that a measurement starts, warms up, uses and closes, in this order."""

    def start(self, request: Request) -> None:
        """Start the engine, serve `request` for its only token, and return."""

    def warmup(self) -> None:
        """Compile all kernels and capture all graphs."""

    def serve(self, workload: Workload) -> Served:
        """Serve a workload to its end."""

    @property
    def assembly(self) -> EngineParts:
        """The engine and its parts."""

    def close(self) -> None:
        """Return all memory."""


class ThroughManager:
    """Requests go to a `GenerationManager`, and results come from its handles."""

    def __init__(self, model: PreTrainedModel, config: BatchingConfig) -> None:
        self._manager = GenerationManager(model, config)

    def start(self, request: Request) -> None:
        """Start the engine and return with the first token of `request`."""
        (handle,) = self._manager.submit_requests([request])
        next(iter(handle))
        handle.result()

    def warmup(self) -> None:
        """`GenerationManager.warmup`."""
        self._manager.warmup()

    def serve(self, workload: Workload) -> Served:
        """Serve a workload. All first requests arrive together; a user's next message follows the answer at once."""
        served, before = Served(), _last_step(self.assembly)
        started = time.perf_counter()
        handles = self._manager.submit_requests(list(workload.first))

        def converse(request: Request, handle: GenerationHandle) -> list[GenerationResult]:
            results = [handle.result()]
            while (following := workload.after(request, results[-1].token_ids)) is not None:
                request = following
                results.append(self._manager.submit_requests([request])[0].result())
            return results

        if workload.messages:
            with ThreadPoolExecutor(len(handles), "user") as users:
                answers = list(users.map(converse, workload.first, handles))
        else:
            answers = [[handle.result()] for handle in handles]
        served.seconds = time.perf_counter() - started
        for result in (result for results in answers for result in results):
            metrics = result.metrics
            assert metrics.queue_seconds is not None and metrics.time_to_first_token is not None
            served.tokens[result.request_id] = result.token_ids
            served.queue_seconds.append(metrics.queue_seconds)
            served.first_token_seconds.append(metrics.time_to_first_token)
        served.records = _records_after(self.assembly, before)
        return served

    @property
    def assembly(self) -> EngineParts:
        """The engine and its parts."""
        assembly = self._manager.assembly
        assert assembly is not None
        return assembly

    def close(self) -> None:
        """Close the manager."""
        self._manager.close()


class ThroughEngine:
    """The caller's thread steps the engine, so that plans do not depend on timing."""

    def __init__(self, model: PreTrainedModel, config: BatchingConfig) -> None:
        self._model = model
        self._config = config
        self._assembly: EngineParts | None = None

    def start(self, request: Request) -> None:
        """Start the engine and return with the first token of `request`."""
        self._assembly = build_engine(self._model, self._config)
        self.serve(Workload("start", (request,)))

    @torch.inference_mode()
    def warmup(self) -> None:
        """Compile and capture, as `GenerationManager.warmup` does."""
        if self.assembly.config.settings.compile:
            compile_for(make_view(self._model, None), weakref.ref(self.assembly))
        self.serve(Workload("warm-up", (Request("0", (3,) * 8, 2),)))
        self.assembly.engine.pipeline.warm(Features())

    @torch.inference_mode()
    def serve(self, workload: Workload) -> Served:
        """Serve a workload. All first requests arrive together; a next message joins the step after the answer."""
        engine, served, before = self.assembly.engine, Served(), _last_step(self.assembly)
        arrived: dict[str, float] = {}
        live: dict[str, Request] = {}

        def add(request: Request) -> None:
            arrived[request.request_id] = time.perf_counter()
            live[request.request_id] = request
            served.tokens[request.request_id] = []
            engine.add(request)

        if self.assembly.forward.device.type == "cuda":
            torch.cuda.synchronize(self.assembly.forward.device)
        started = time.perf_counter()
        for request in workload.first:
            add(request)
        while engine.has_work:
            planned = time.perf_counter()
            token_outputs = engine.step()
            now = time.perf_counter()
            for new_row in engine.started:
                served.queue_seconds.append(planned - arrived[new_row.request.request_id])
            for output in token_outputs:
                tokens = served.tokens[output.request_id]
                if output.token is not None:
                    if not tokens:
                        served.first_token_seconds.append(now - arrived[output.request_id])
                    tokens.append(output.token)
                if output.finish_reason is not None:
                    following = workload.after(live.pop(output.request_id), tokens)
                    if following is not None:
                        add(following)
        served.seconds = time.perf_counter() - started
        served.records = _records_after(self.assembly, before)
        return served

    @property
    def assembly(self) -> EngineParts:
        """The engine and its parts."""
        assert self._assembly is not None
        return self._assembly

    def close(self) -> None:
        """Close the engine."""
        if self._assembly is not None:
            device = self._assembly.forward.device
            self._assembly.engine.close()
            self._assembly = None
            return_memory(device)


def _last_step(assembly: EngineParts) -> int:
    records = assembly.engine.records
    return records[-1].step if records else -1


def _records_after(assembly: EngineParts, step: int) -> tuple[StepRecord, ...]:
    return tuple(record for record in assembly.engine.records.copy() if record.step > step)
