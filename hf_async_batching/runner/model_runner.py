"""The device part of one step: carry-over, forward, sampling, update of the row tables.

Decode steps come in buckets, and small steps with prompts are padded to a few sizes, so that `GraphCache` captures
each size once.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch

from hf_async_batching.core.graph_buckets import (
    SPREAD_TOKENS,
    decode_buckets,
    padded_decodes,
    padded_entries,
    padded_tokens,
)
from hf_async_batching.core.plan import Features, Plan
from hf_async_batching.core.step_layout import Padding, Sections
from hf_async_batching.devices.base import Device
from hf_async_batching.kv_cache.state_tables import StateTables
from hf_async_batching.model.forward.step_inputs import StepInputs
from hf_async_batching.runner.cuda_graphs import FORWARD, Captured, GraphCache
from hf_async_batching.runner.prompt_embeddings import PromptEmbeddings
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.runtime.autocast import Autocast
from hf_async_batching.runtime.triton_start import runs_triton
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.sampler import Sampler
from hf_async_batching.sampling.uncaptured import UncapturedOutputs, sample_uncaptured

Forward = Callable[[StepInputs], torch.Tensor]


@runtime_checkable
class Tunable(Protocol):
    """A forward whose kernels have settings to measure."""

    def tune(self, batches: list[int]) -> None:
        """Measure settings for decode steps of these sizes."""


class ModelRunner:
    """Runs the device part of a step.

    Args:
        forward: Computes logits [sampled, vocab] from inputs.
        state: The row tables.
        device: Device that captures graphs.
        max_rows: Rows of the largest decode step.
        largest: The largest step with prompts that is captured; its tokens are 0 if none is.
        spread: Whether prompts are spread over decode steps, so that a warm-up captures all of these steps.
        graphs: Whether steps are captured.
        least_rows: Rows of the smallest decode step.
        autocast: Autocast state of the forward.
        states: The tables of the rows' states; None for models without states.

    Attributes:
        graphs: The captured steps.
        uncaptured: Outputs of the last step besides its tokens; None if its features are captured.
    """

    def __init__(
        self,
        forward: Forward,
        state: RowTables,
        device: Device,
        *,
        max_rows: int,
        largest: Padding,
        spread: bool,
        graphs: bool,
        least_rows: int = 1,
        autocast: Autocast | None = None,
        states: StateTables | None = None,
    ) -> None:
        self._forward = forward
        self._states = states
        self._autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        if autocast is not None and autocast.dtype is not None:
            self._autocast = autocast
        self._sampler = Sampler(runs_triton(state.page_table.device))
        self._state = state
        self.graphs = GraphCache(device, enabled=graphs)
        self._buckets = decode_buckets(max_rows, least_rows)
        self._paddings = padded_tokens(largest)
        self._most_entries = largest.entries
        self._padded_decodes = padded_decodes(max_rows)
        # A prompt alone, and beside few rows: the steps of a server's first requests.
        sizes = [(tokens, decodes) for decodes in self._padded_decodes[:2] for tokens in self._paddings]
        if spread and SPREAD_TOKENS in self._paddings:
            sizes += [(SPREAD_TOKENS, decodes) for decodes in self._padded_decodes]
        self._warmed = list(dict.fromkeys(filter(None, itertools.starmap(self._least_padding, sizes))))
        self._offered: Forward | None = None
        # Inputs and logits of captured forwards.
        self._forwards: dict[int, tuple[StepInputs, torch.Tensor]] = {}
        self._logits: torch.Tensor | None = None
        self.uncaptured: UncapturedOutputs | None = None
        self._step_number = -1
        self._prompt_embeddings = PromptEmbeddings()

    @property
    def buckets(self) -> list[int]:
        """Sizes of decode steps that get a graph; empty if nothing is captured."""
        return self._buckets if self.graphs.enabled else []

    @property
    def paddings(self) -> list[int]:
        """Token counts of steps with prompts that get a graph."""
        return self._paddings if self.graphs.enabled else []

    def bucket_for(self, num_rows: int) -> int:
        """Entries that a decode step of `num_rows` rows is padded to."""
        buckets = self.buckets
        return buckets[bisect.bisect_left(buckets, num_rows)] if buckets else num_rows

    def padding_for(self, plan: Plan, tile_size: int) -> Padding | None:
        """The sizes to which a step with prompts is padded; None for a step that is not padded."""
        if plan.features.eager or not self.paddings or self._prompt_embeddings.concerns(plan):
            return None
        rows = len(plan.decode_rows)
        decodes = self._padded_decodes[bisect.bisect_left(self._padded_decodes, rows)]
        # Padded samples must point to a padded token.
        needed = decodes + plan.num_tokens - rows
        tokens = next((tokens for tokens in self.paddings if tokens > needed), None)
        if tokens is None:
            return None
        entries = max(plan.num_sampled, plan.num_tiles(tile_size)) - rows
        most = min(tokens - decodes, self._most_entries)
        if entries > most:
            return None
        padding = Padding(tokens, padded_entries(entries, most), decodes)
        # Padding a step that is never captured would be wasted work.
        key = Captured(padding, self._sampler.as_run(plan.features))
        return padding if self.graphs.captures_prompts() or key in self.graphs.captured else None

    def _least_padding(self, tokens: int, decodes: int) -> Padding | None:
        """A step with one prompt's end at least; None if so many tokens have no room for it."""
        room = min(self._most_entries, tokens - decodes)
        return Padding(tokens, padded_entries(1, room), decodes) if room > 0 else None

    def offer(self, forward: Forward) -> None:
        """Use another forward from the next step on, and capture again. Any thread may call it."""
        self._offered = forward

    def completed(self, step: int) -> None:
        """Drop objects that no step after `step` can use."""
        self._prompt_embeddings.completed(step)
        self.graphs.completed(step)

    def tune(self) -> None:
        """Measure kernel settings for the buckets; nothing else may run. Steps are then captured again."""
        self._adopt()
        try:
            if isinstance(self._forward, Tunable):
                self._forward.tune(self.buckets)
        finally:
            # Also if measuring failed half-way, so that all ranks capture again.
            self._forget_graphs()

    @torch.inference_mode()
    def warm(self, features: Features) -> None:
        """Run and capture every bucket on the padding row; `decode_rows` is empty afterwards.

        Steps with a prompt alone or beside few rows are captured too, and those of spread prompts.
        """
        self._adopt()
        features = self._sampler.as_run(features)
        self._state.memory.ensure(words=features.memory, seen=features.seen)
        self._state.decode_rows.zero_()
        # Largest first, so that smaller steps fit in the memory that it has taken.
        for bucket in reversed([*self.buckets, *self.buckets]):
            if features.eager:
                self._decode_forward(bucket)
            else:
                self._decode(bucket, features)
        if not features.eager and self.graphs.enabled:
            self._state.padded.zero_()
            for padding in self._warmed:
                if not self.graphs.captures_prompts():
                    break
                self._padded(padding, features)
                self.graphs.capture_next(Captured(padding, features))
                self._padded(padding, features)

    @torch.inference_mode()
    def run(self, plan: Plan, staged: torch.Tensor, sections: Sections) -> None:
        """Enqueue a step's work on the current stream.

        Args:
            plan: The step.
            staged: Its inputs, on the device.
            sections: Positions of the inputs in `staged`.
        """
        self._step_number = plan.step
        self._adopt()
        features = self._sampler.as_run(plan.features)
        self._state.memory.ensure(words=features.memory, seen=features.seen)
        self._state.apply_updates(staged, sections)
        if plan.state_copies:
            assert self._states is not None
            self._states.copy(plan.state_copies)
        self.uncaptured = None
        if plan.chunks:
            embeddings = self._prompt_embeddings.pieces(plan)
            if sections.tokens > plan.num_tokens:
                self._state.keep_padded(staged, sections)
                self._padded(sections.padding, features)
                return
            inputs = self._state.mixed_inputs(staged, sections, len(plan.decode_rows))
            if embeddings:
                inputs = replace(inputs, embeddings=embeddings)
            if features.eager:
                self._sample_uncaptured(plan, inputs, self._run_forward(inputs))
            else:
                self._step(inputs, features)
        elif plan.decode_rows:
            bucket = self.bucket_for(len(plan.decode_rows))
            if features.eager:
                self._sample_uncaptured(plan, *self._decode_forward(bucket))
            else:
                self._decode(bucket, features)

    def _adopt(self) -> None:
        offered, self._offered = self._offered, None
        if offered is not None:
            self._forward = offered
            self._forget_graphs()

    def _forget_graphs(self) -> None:
        self.graphs.forget(self._step_number)
        self._forwards = {}

    def _decode(self, bucket: int, features: Features) -> None:
        self.graphs.run(Captured(bucket, features), lambda: self._step(self._state.decode_inputs(bucket), features))

    def _padded(self, padding: Padding, features: Features) -> None:
        self.graphs.run(Captured(padding, features), lambda: self._step(self._state.padded_inputs(padding), features))

    def _decode_forward(self, bucket: int) -> tuple[StepInputs, torch.Tensor]:
        """Inputs and logits of a decode step whose tokens are chosen outside graphs."""

        def run() -> None:
            inputs = self._state.decode_inputs(bucket)
            self._forwards[bucket] = inputs, self._kept(self._run_forward(inputs))

        replayed = self.graphs.run(Captured(bucket, FORWARD), run)
        return self._forwards[bucket] if replayed else self._forwards.pop(bucket)

    def _kept(self, logits: torch.Tensor) -> torch.Tensor:
        """Copy the logits to one buffer that all graphs share; each graph would otherwise keep its own logits."""
        if not self.graphs.enabled:
            return logits
        shape = (self._buckets[-1], logits.shape[1])
        if self._logits is None or self._logits.shape != shape or self._logits.dtype != logits.dtype:
            self._logits = logits.new_zeros(shape)
        return self._logits[: logits.shape[0]].copy_(logits)

    def _run_forward(self, inputs: StepInputs) -> torch.Tensor:
        with self._autocast():
            return self._forward(inputs)

    def _step(self, inputs: StepInputs, features: Features) -> None:
        self._state.note(inputs, features)
        logits = self._run_forward(inputs)
        if not logits.shape[0]:
            self._state.commit(inputs, logits.new_empty(logits.shape[:-1], dtype=torch.int32), None)
            return
        rows = None
        if features.sampling or features.min_length or features.penalty:
            rows = self._rows(inputs)
        tokens, logprobs = self._sampler(logits, rows, features)
        self._state.commit(inputs, tokens, logprobs)

    def _sample_uncaptured(self, plan: Plan, inputs: StepInputs, logits: torch.Tensor) -> None:
        self._state.note(inputs, plan.features)
        if not logits.shape[0]:
            self._state.commit(inputs, logits.new_empty(logits.shape[:-1], dtype=torch.int32), None)
            return
        rows = replace(self._rows(inputs), bounds=plan.bounds)
        tokens, logprobs, self.uncaptured = sample_uncaptured(self._sampler, logits, rows, plan)
        self._state.commit(inputs, tokens, logprobs)

    def _rows(self, inputs: StepInputs) -> SamplingMetadata:
        state = self._state
        rows = state.sampled_rows(inputs)
        return SamplingMetadata(state.params[rows], state.next_positions(inputs), rows, state.memory)
