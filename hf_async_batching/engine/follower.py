"""The work of a rank other than 0: it launches the steps that rank 0 launches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch

from hf_async_batching.core.plan import Launch
from hf_async_batching.devices.memory import return_memory
from hf_async_batching.distributed.rank_group import Quit, RankGroup, Start, Step, Tune, Warm, checksum
from hf_async_batching.engine.builder import EngineParts
from hf_async_batching.errors import EngineFailedError


class Follower:
    """Runs one engine after another, as rank 0 requests.

    Args:
        group: The ranks.
        build_engine: Builds an engine at the same time as rank 0.
    """

    def __init__(self, group: RankGroup, build_engine: Callable[[], EngineParts]) -> None:
        self._group = group
        self._build_engine = build_engine

    def follow(self) -> None:
        """Follow rank 0 until it closes its manager.

        Raises:
            EngineFailedError: This rank has sampled other tokens than rank 0.
        """
        while True:
            message = self._group.receive()
            if isinstance(message, Quit):
                return
            if isinstance(message, Start):
                parts = self._build_engine()
                device = parts.forward.device
                try:
                    _FollowedEngine(self._group, parts).run()
                finally:
                    parts.engine.pipeline.close()
                    del parts
                    return_memory(device)


class _FollowedEngine:
    def __init__(self, group: RankGroup, parts: EngineParts) -> None:
        self._group = group
        self._pipeline = parts.engine.pipeline
        self._depth = parts.config.depth
        self._in_flight: deque[Launch] = deque()
        self._checksums: dict[int, int] = {}
        self._rows: tuple[int, ...] = ()

    @torch.inference_mode()
    def run(self) -> None:
        """Launch steps until rank 0 closes its engine."""
        while True:
            message = self._group.receive()
            if isinstance(message, Step):
                self._step(message)
            elif isinstance(message, Warm):
                self._pipeline.warm(message.features)
            elif isinstance(message, Tune):
                self._pipeline.tune()
            else:
                return

    def _step(self, message: Step) -> None:
        for step, expected in message.collected.items():
            while step not in self._checksums:
                self._collect()
            if self._checksums.pop(step) != expected:
                raise EngineFailedError(
                    f"rank {self._group.rank} has sampled other tokens than rank 0 in step {step}: the model's logits "
                    "differ between ranks"
                )
        plan = message.plan
        if message.rows_unchanged:
            # Keep the same object, so that unchanged rows are not copied to the device again.
            plan = replace(plan, decode_rows=self._rows)
        self._rows = plan.decode_rows
        self._in_flight.append(self._pipeline.launch(plan, time.perf_counter()))
        if len(self._in_flight) >= self._depth:
            self._collect()

    def _collect(self) -> None:
        launch = self._in_flight.popleft()
        self._checksums[launch.plan.step] = checksum(self._pipeline.collect(launch).tokens)
