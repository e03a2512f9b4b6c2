"""The order of copies, kernels and host reads; every wait between the streams is here, and has a name (`Guard`).

One step, and the next one while it runs::

    host     plan n+1 | stage n+1 |            sleep             | read n | plan n+2 ...
    h2d                 [copy n+1]
    compute  [....... step n .......][updates n+1][carry-over, forward, sample, publish n+1]
    d2h                               [tokens n]

A step's number modulo `SLOTS` selects its staging buffers (one pinned, one on the device) and its output buffer on the
device. Its number modulo the depth selects its result buffer in host memory, which the host reads before it launches
the step that reuses the buffer. See docs/architecture.md for who writes which buffer after which event.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from hf_async_batching.core.plan import Features, Launch, Plan, Result
from hf_async_batching.core.step_layout import Sections
from hf_async_batching.devices.base import Device, Guard, Stream
from hf_async_batching.runner.model_runner import ModelRunner
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.runner.staging import encode
from hf_async_batching.sampling.uncaptured import UncapturedOutputs

SLOTS = 2


class _Prefix:
    """The first elements of a buffer, as a view that is made again only if their number has changed."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = self._view = buffer

    def __call__(self, count: int) -> torch.Tensor:
        if count != len(self._view):
            self._view = self._buffer[:count]
        return self._view


class Pipeline:
    """Enqueues plans and collects results, in order.

    Args:
        device: Device of the streams.
        state: The row tables.
        runner: The device part of a step.
        depth: Steps that may be in flight at once.
        limits: Sizes that no step exceeds.
        tile_size: Query tokens per tile of prefill attention.
        logit_size: Width of the model's logits; used only if a request wants scores or logits.
    """

    def __init__(
        self,
        device: Device,
        state: RowTables,
        runner: ModelRunner,
        *,
        depth: int,
        limits: Sections,
        tile_size: int,
        logit_size: int,
    ) -> None:
        max_samples = limits.samples
        self._device = device
        self._state = state
        self._runner = runner
        self._depth = depth
        self._tile_size = tile_size
        self._host_input = [device.host_buffer(limits.total, torch.int32) for _ in range(SLOTS)]
        self._host_input_arrays = [buffer.numpy() for buffer in self._host_input]
        self._staging = [device.device_buffer(limits.total, torch.int32) for _ in range(SLOTS)]
        self._output = [_Prefix(device.device_buffer(max_samples, torch.int32)) for _ in range(SLOTS)]
        self._output_logprobs = [_Prefix(device.device_buffer(max_samples, torch.float32)) for _ in range(SLOTS)]
        self._result = [_Prefix(device.host_buffer(max_samples, torch.int32)) for _ in range(depth)]
        self._result_logprobs = [_Prefix(device.host_buffer(max_samples, torch.float32)) for _ in range(depth)]
        self._offered: dict[int, torch.Tensor] = {}
        # Scores and logits, one line per position that wants them. Allocated on first use and enlarged on demand.
        self._logit_size = logit_size
        self._wide_output: list[dict[str, torch.Tensor]] = [{} for _ in range(SLOTS)]
        self._wide_result: list[dict[str, torch.Tensor]] = [{} for _ in range(depth)]
        # The last event of each kind per slot: None until a step has used the slot.
        self._h2d_done: list[Any] = [None] * SLOTS
        self._staging_read: list[Any] = [None] * SLOTS
        self._d2h_done: list[Any] = [None] * SLOTS
        self._resident_rows: tuple[int, ...] | None = None
        self._caller_work: deque[Any] = deque()
        # The calling thread's own stream has zeroed the tables and buffers.
        zeroed = device.record(Stream.CALLER)
        device.wait(Stream.H2D, zeroed, Guard.BUFFERS_READY)
        self._caller_work.append(zeroed)

    def order_after_caller(self) -> None:
        """Make every later step run after all work on the calling thread's stream. Any thread may call it."""
        self._caller_work.append(self._device.record(Stream.CALLER))

    def launch(self, plan: Plan, planned_at: float) -> Launch:
        """Enqueue a step and return. `planned_at` is the time when its planning began."""
        device, slot = self._device, plan.step % SLOTS
        events: dict[str, Any] = {}
        sections = self._send(plan, slot, events)
        ring = plan.step % self._depth
        wide = self._make_room(plan, slot, ring) if plan.wanted else ()
        while self._caller_work:
            device.wait(Stream.COMPUTE, self._caller_work.popleft(), Guard.CALLER_WORK)
        device.wait(Stream.COMPUTE, self._d2h_done[slot], Guard.OUTPUT_FREE)
        events["compute_start"] = device.record(Stream.COMPUTE)
        staged = self._staging[slot]
        device.launch(Stream.COMPUTE, lambda: self._compute(plan, staged, sections, slot, wide))
        compute_done = events["compute_done"] = device.record(Stream.COMPUTE)
        if sections.total:
            self._staging_read[slot] = compute_done
        count = plan.num_sampled
        if count:
            device.wait(Stream.D2H, compute_done, Guard.OUTPUT_READY)
            events["d2h_start"] = device.record(Stream.D2H)
            device.copy(Stream.D2H, self._result[ring](count), self._output[slot](count))
            if plan.features.logprobs:
                device.copy(Stream.D2H, self._result_logprobs[ring](count), self._output_logprobs[slot](count))
            for name in wide:
                lines = plan.num_wanted
                device.copy(Stream.D2H, self._wide_result[ring][name][:lines], self._wide_output[slot][name][:lines])
            self._d2h_done[slot] = events["d2h_done"] = device.record(Stream.D2H)
        return Launch(plan, events, planned_at, time.perf_counter())

    def collect(self, launch: Launch) -> Result:
        """Sleep until a step's tokens have arrived, and read them."""
        plan, ring = launch.plan, launch.plan.step % self._depth
        # A step that samples nothing sends nothing back; it ends with its compute.
        done = launch.events.get("d2h_done", launch.events["compute_done"])
        self._device.synchronize(done, Guard.RESULT_READY)
        self._runner.completed(plan.step)
        count = plan.num_sampled
        tokens = self._result[ring](count).tolist()
        logprobs = self._result_logprobs[ring](count).tolist() if plan.features.logprobs else None
        # The offered logits are complete: the tokens have arrived, and they were sent after the step's compute.
        offered = self._offered.pop(plan.step, None)
        if not plan.wanted:
            return Result(plan.step, tokens, logprobs, offered=offered)
        # Copies, because the next step reuses the buffer. Ordinary tensors, because callers may write to them.
        with torch.inference_mode(False):
            scores, logits = (
                [line.clone() for line in self._wide_result[ring][name][: plan.num_wanted]] if wanted else None
                for name, wanted in (("scores", plan.features.scores), ("logits", plan.features.logits))
            )
        return Result(plan.step, tokens, logprobs, scores, logits, offered=offered)

    def warm(self, features: Features) -> None:
        """Run and capture every decode bucket between two steps, on the padding row."""
        while self._caller_work:
            self._device.wait(Stream.COMPUTE, self._caller_work.popleft(), Guard.CALLER_WORK)
        self._device.launch(Stream.COMPUTE, lambda: self._runner.warm(features))
        self._resident_rows = None

    def tune(self) -> None:
        """Measure kernel settings between two steps, when the device has no other work."""
        self.drain()
        self._runner.tune()

    def drain(self) -> None:
        """Wait until the device has no work."""
        for stream in (Stream.H2D, Stream.COMPUTE, Stream.D2H):
            self._device.synchronize(self._device.record(stream), Guard.RESULT_READY)

    def close(self) -> None:
        """Wait for all enqueued work."""
        self._device.close()

    def _send(self, plan: Plan, slot: int, events: dict[str, Any]) -> Sections:
        """Stage what changed and enqueue its copy; a steady decode step has nothing to send."""
        send_rows = not plan.chunks and plan.decode_rows is not self._resident_rows
        if not (send_rows or plan.chunks or plan.new_rows or plan.new_pages or plan.given):
            return Sections()
        device = self._device
        device.synchronize(self._h2d_done[slot], Guard.HOST_INPUT_FREE)
        sections = encode(
            plan,
            self._host_input_arrays[slot],
            bucket=self._runner.bucket_for(len(plan.decode_rows)),
            send_decode_rows=send_rows,
            tile_size=self._tile_size,
            padding=self._runner.padding_for(plan, self._tile_size) if plan.chunks else None,
        )
        if send_rows:
            self._resident_rows = plan.decode_rows
        device.wait(Stream.H2D, self._staging_read[slot], Guard.STAGING_FREE)
        events["h2d_start"] = device.record(Stream.H2D)
        device.copy(Stream.H2D, self._staging[slot][: sections.total], self._host_input[slot][: sections.total])
        self._h2d_done[slot] = events["h2d_done"] = device.record(Stream.H2D)
        device.wait(Stream.COMPUTE, events["h2d_done"], Guard.INPUT_READY)
        return sections

    def _make_room(self, plan: Plan, slot: int, ring: int) -> tuple[str, ...]:
        """Provide buffers for the scores and logits of a step; returns the names of the buffers that it needs."""
        features, device = plan.features, self._device
        names = tuple(name for name, wanted in (("scores", features.scores), ("logits", features.logits)) if wanted)
        lines, grown = plan.num_wanted, False
        for name in names:
            if name not in self._wide_result[ring] or len(self._wide_result[ring][name]) < lines:
                # The step that used it before has been collected.
                buffer = device.host_buffer(lines * self._logit_size, torch.float32)
                self._wide_result[ring][name] = buffer.view(lines, self._logit_size)
            if name not in self._wide_output[slot] or len(self._wide_output[slot][name]) < lines:
                # Memory must not be in use when it is freed.
                device.synchronize(self._d2h_done[slot], Guard.OUTPUT_FREE)
                buffer = device.device_buffer(lines * self._logit_size, torch.float32)
                self._wide_output[slot][name] = buffer.view(lines, self._logit_size)
                grown = True
        if grown:
            self.order_after_caller()  # the caller's stream zeroes them
        return names

    def _compute(self, plan: Plan, staged: torch.Tensor, sections: Sections, slot: int, wide: tuple[str, ...]) -> None:
        """Run a step, and copy its results from the tables, which the next step overwrites, to the slot's buffers."""
        self._runner.run(plan, staged, sections)
        if self._runner.uncaptured is not None:
            self._publish_uncaptured(plan, self._runner.uncaptured, slot, wide)
            self._runner.uncaptured = None  # the logits of a step are large
        count = plan.num_sampled
        if count:
            self._output[slot](count).copy_(self._state.out_tokens[:count])
            if plan.features.logprobs:
                self._output_logprobs[slot](count).copy_(self._state.out_logprobs[:count])

    def _publish_uncaptured(self, plan: Plan, outputs: UncapturedOutputs, slot: int, wide: tuple[str, ...]) -> None:
        if outputs.offered is not None:
            self._offered[plan.step] = outputs.offered
        for name in wide:
            made, line = getattr(outputs, name), 0
            for run in plan.wanted:
                lines = run.stop - run.start
                self._wide_output[slot][name][line : line + lines].copy_(made[run.start : run.stop])
                line += lines
