"""What happens on the device in one step: carry-over, forward, sampling, update of the row tables.

Decode steps come in buckets, so that each can be captured once as a CUDA graph. A bucket is run as it is the first
time it is needed (which also compiles its kernels) and captured the second time.

So do steps with prompts or drafts that have few tokens, after some uses: launching their kernels one by one would take
the host longer than the device needs. With `step_sizes.MOST_PADDED` tokens or more it does not, and these are run as
they are.
"""

from __future__ import annotations

import bisect
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from hf_async_batching.core.graph_buckets import (
    SPREAD_TOKENS,
    decode_buckets,
    padded_decodes,
    padded_entries,
    padded_tokens,
)
from hf_async_batching.core.plan import Features, Plan
from hf_async_batching.core.step_layout import NO_PADDING, Padding, Sections
from hf_async_batching.devices import Device, Graph
from hf_async_batching.devices.base import Kernel
from hf_async_batching.model.forward.step_inputs import StepInputs
from hf_async_batching.runner.prompt_embeddings import PromptEmbeddings
from hf_async_batching.runner.row_tables import DeviceState
from hf_async_batching.runtime.autocast import Autocast
from hf_async_batching.runtime.triton_start import runs_triton
from hf_async_batching.sampling import SampledRows, Sampler
from hf_async_batching.sampling.uncaptured import RareOutputs, sample_rare

logger = logging.getLogger(__name__)

# A capture can fail for a passing reason: another thread synchronized the device, or memory was short.
MAX_FAILED_CAPTURES = 3

# In place of features, for the graph of a forward alone.
FORWARD = None

# What graphs of steps with prompts there are at most, and up to which memory of all graphs, in bytes.
MOST_PADDED_GRAPHS = 96
_MOST_GRAPH_BYTES = 1 << 30

# So often a step is run before it is captured. That takes as long as some uncaptured steps do; a decode step comes
# again at once, while one with prompts may be the last of its size.
DECODE_USES, PADDED_USES = 1, 4

Forward = Callable[[StepInputs], torch.Tensor]


class Captured(NamedTuple):
    """What a graph was captured of: rows of a decode step, or the sizes of another; what is done with the logits."""

    size: int | Padding
    features: Features | None


@runtime_checkable
class Tunable(Protocol):
    """A forward whose kernels have settings to measure."""

    def tune(self, batches: list[int]) -> None:
        """Measure for decode steps of these sizes."""


class Runner:
    """Runs the device part of a step.

    Args:
        forward: Inputs to logits [sampled, vocab].
        state: The row tables.
        device: Where graphs are captured.
        max_rows: The largest decode step.
        largest: The largest step with prompts that is captured; of no tokens where none is.
        spread: Whether prompts are spread over decode steps, so that these steps are captured in advance.
        graphs: Whether steps are captured.
        autocast: What the forward runs under.

    Attributes:
        buckets: Sizes of decode steps that get a graph; empty where nothing is captured.
        paddings: Tokens of steps with prompts that get one.
        captured: Graphs by what they were captured of; of steps with rare features the forward alone, under `FORWARD`.
        rare: What the step that ran last brings beyond tokens; None where its features are not rare.
    """

    def __init__(
        self,
        forward: Forward,
        state: DeviceState,
        device: Device,
        *,
        max_rows: int,
        largest: Padding = NO_PADDING,
        spread: bool = False,
        graphs: bool,
        autocast: Autocast | None = None,
    ) -> None:
        self._forward = forward
        self._autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        if autocast is not None and autocast.dtype is not None:
            self._autocast = autocast
        self._sampler = Sampler(runs_triton(state.page_table.device))
        self._state = state
        self._device = device
        self.buckets = decode_buckets(max_rows) if graphs else []
        self.paddings = padded_tokens(largest) if graphs else []
        self._most_entries = largest.entries
        self._padded_decodes = padded_decodes(max_rows)
        self._spread: list[Padding] = []
        if spread and SPREAD_TOKENS in self.paddings:
            for decodes in self._padded_decodes:
                room = min(self._most_entries, SPREAD_TOKENS - decodes)
                self._spread += [Padding(SPREAD_TOKENS, padded_entries(1, room), decodes)] if room > 0 else []
        self._uses: Counter[Captured] = Counter()
        # One after the other, of decode steps and of those with prompts.
        self._failed_captures = [0, 0]
        self.captured: dict[Captured, Graph] = {}
        self._offered: Forward | None = None
        # Inputs and logits of captured forwards.
        self._forwards: dict[int, tuple[StepInputs, torch.Tensor]] = {}
        self._logits: torch.Tensor | None = None
        self.rare: RareOutputs | None = None
        self._step_number = -1
        self._prompt_embeddings = PromptEmbeddings()
        # Graphs that were replaced, and the last step that may have replayed them.
        self._replaced: list[tuple[int, list[Graph]]] = []

    def bucket_for(self, num_rows: int) -> int:
        """Entries that a decode step of `num_rows` rows is padded to."""
        if not self.buckets:
            return num_rows
        return self.buckets[bisect.bisect_left(self.buckets, num_rows)]

    def padding_for(self, plan: Plan, tile_size: int) -> Padding | None:
        """What a step with prompts is padded to; None for one that is run as it is."""
        if plan.features.eager or not self.paddings or self._prompt_embeddings.concerns(plan):
            return None
        rows = len(plan.decode_rows)
        decodes = self._padded_decodes[bisect.bisect_left(self._padded_decodes, rows)]
        # The padded samples need a padded token to point to.
        needed = decodes + plan.num_tokens - rows
        tokens = next((tokens for tokens in self.paddings if tokens > needed), None)
        if tokens is None:
            return None
        entries = max(plan.num_sampled, plan.num_tiles(tile_size)) - rows
        most = min(tokens - decodes, self._most_entries)
        if entries > most:
            return None
        padding = Padding(tokens, padded_entries(entries, most), decodes)
        # What will never be captured is not padded for nothing.
        key = Captured(padding, self._sampler.as_run(plan.features))
        return padding if self._may_capture_more() or key in self.captured else None

    def _may_capture_more(self) -> bool:
        """Whether there is room for graphs of further steps with prompts, and they can be captured."""
        count = sum(isinstance(key.size, Padding) for key in self.captured)
        return (
            self._failed_captures[True] < MAX_FAILED_CAPTURES
            and count < MOST_PADDED_GRAPHS
            and self._device.graph_bytes() < _MOST_GRAPH_BYTES
        )

    def offer(self, forward: Forward) -> None:
        """Use another forward from the next step on, and capture anew. From any thread."""
        self._offered = forward

    def completed(self, step: int) -> None:
        """Let go of what no step after `step` can touch."""
        self._prompt_embeddings.completed(step)
        if self._replaced:
            self._replaced = [replaced for replaced in self._replaced if replaced[0] > step]

    def tune(self) -> None:
        """Measure kernel settings for the buckets; nothing may run on the device. Captured steps are captured anew."""
        self._adopt()
        try:
            if isinstance(self._forward, Tunable):
                self._forward.tune(self.buckets)
        finally:
            # Also where measuring failed half-way: of several ranks all capture anew.
            self._forget_graphs()

    @torch.inference_mode()
    def warm(self, features: Features) -> None:
        """Run and capture every bucket on the padding row, and where prompts are spread the steps with them that come
        up most; `decode_rows` is empty afterwards.
        """
        self._adopt()
        features = self._sampler.as_run(features)
        self._state.memory.ensure(words=features.memory, seen=features.seen)
        self._state.decode_rows.zero_()
        # The largest first: the smaller ones then fit into the memory that it has taken.
        for bucket in reversed([*self.buckets, *self.buckets]):
            if features.eager:
                self._decode_forward(bucket)
            else:
                self._decode(bucket, features)
        if not features.eager:
            self._state.padded.zero_()
            for padding in self._spread:
                if not self._may_capture_more():
                    break
                self._padded(padding, features)
                # The first run has compiled what it needs.
                self._uses[Captured(padding, features)] = PADDED_USES
                self._padded(padding, features)

    @torch.inference_mode()
    def run(self, plan: Plan, staged: torch.Tensor, sections: Sections) -> None:
        """Enqueue a step's work on the current stream.

        Args:
            plan: The step.
            staged: Its inputs, on the device.
            sections: Where they lie in `staged`.
        """
        self._step_number = plan.step
        self._adopt()
        features = self._sampler.as_run(plan.features)
        self._state.memory.ensure(words=features.memory, seen=features.seen)
        self._state.apply_updates(staged, sections)
        self.rare = None
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
                self._sample_rare(plan, inputs, self._run_forward(inputs))
            else:
                self._step(inputs, features)
        elif plan.decode_rows:
            bucket = self.bucket_for(len(plan.decode_rows))
            if features.eager:
                self._sample_rare(plan, *self._decode_forward(bucket))
            else:
                self._decode(bucket, features)

    def _adopt(self) -> None:
        offered, self._offered = self._offered, None
        if offered is not None:
            self._forward = offered
            self._forget_graphs()

    def _forget_graphs(self) -> None:
        """Capture anew, after runs that compile what the new steps need."""
        self._replaced.append((self._step_number, list(self.captured.values())))
        self.captured, self._forwards = {}, {}
        self._uses.clear()

    def _decode(self, bucket: int, features: Features) -> None:
        self._replay(Captured(bucket, features), lambda: self._step(self._state.decode_inputs(bucket), features))

    def _padded(self, padding: Padding, features: Features) -> None:
        self._replay(Captured(padding, features), lambda: self._step(self._state.padded_inputs(padding), features))

    def _replay(self, key: Captured, work: Kernel) -> None:
        graph = self._graph(key, work)
        if graph is None:
            work()
        else:
            graph.replay()

    def _decode_forward(self, bucket: int) -> tuple[StepInputs, torch.Tensor]:
        """Inputs and logits of a decode step whose tokens are chosen outside of graphs."""

        def run() -> None:
            inputs = self._state.decode_inputs(bucket)
            self._forwards[bucket] = inputs, self._kept(self._run_forward(inputs))

        graph = self._graph(Captured(bucket, FORWARD), run)
        if graph is None:
            run()
            return self._forwards.pop(bucket)
        graph.replay()
        return self._forwards[bucket]

    def _kept(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits in memory of their own, where a graph could be captured: one for all graphs, which would each hold
        theirs otherwise.
        """
        if not self.buckets:
            return logits
        shape = (self.buckets[-1], logits.shape[1])
        if self._logits is None or self._logits.shape != shape or self._logits.dtype != logits.dtype:
            self._logits = logits.new_zeros(shape)
        return self._logits[: logits.shape[0]].copy_(logits)

    def _graph(self, key: Captured, work: Kernel) -> Graph | None:
        """The graph of a step, captured once it was asked for often enough; None where there is none."""
        graph = self.captured.get(key)
        if graph is None and self._is_due(key):
            graph = self._capture(key, work)
        if graph is None:
            self._uses[key] += 1
        return graph

    def _is_due(self, key: Captured) -> bool:
        if isinstance(key.size, Padding):
            return self._uses[key] >= PADDED_USES and self._may_capture_more()
        return bool(self.buckets) and self._uses[key] >= DECODE_USES

    def _capture(self, key: Captured, work: Kernel) -> Graph | None:
        padded = isinstance(key.size, Padding)
        steps = "steps with prompts" if padded else "decode steps"
        try:
            graph = self._device.capture(work)
        except RuntimeError as error:
            # Some forwards read tensors back, as mixtures of experts do in dtypes without a grouped product.
            self._failed_captures[padded] += 1
            if self._failed_captures[padded] == MAX_FAILED_CAPTURES:
                logger.warning("%s cannot be captured as CUDA graphs and run without: %s", steps, error)
                if not padded:
                    self.buckets, self.paddings, self._spread = [], [], []
            if padded:
                del self._uses[key]  # tried again after as many uses
            logger.debug("a capture failed", exc_info=True)
            return None
        self._failed_captures[padded] = 0
        self.captured[key] = graph
        logger.info("captured %s of size %s, %s", steps, key.size, key.features or "forward alone")
        return graph

    def _run_forward(self, inputs: StepInputs) -> torch.Tensor:
        with self._autocast():
            return self._forward(inputs)

    def _step(self, inputs: StepInputs, features: Features) -> None:
        self._state.note(inputs, features)
        logits = self._run_forward(inputs)
        if not logits.shape[0]:
            self._state.commit(inputs, logits.new_empty(0, dtype=torch.int32), None)
            return
        rows = None
        if features.sampling or features.min_length or features.penalty:
            rows = self._rows(inputs)
        tokens, logprobs = self._sampler(logits, rows, features)
        self._state.commit(inputs, tokens, logprobs)

    def _sample_rare(self, plan: Plan, inputs: StepInputs, logits: torch.Tensor) -> None:
        self._state.note(inputs, plan.features)
        if not logits.shape[0]:
            self._state.commit(inputs, logits.new_empty(0, dtype=torch.int32), None)
            return
        rows = replace(self._rows(inputs), bounds=plan.bounds)
        tokens, logprobs, self.rare = sample_rare(self._sampler, logits, rows, plan)
        self._state.commit(inputs, tokens, logprobs)

    def _rows(self, inputs: StepInputs) -> SampledRows:
        state = self._state
        rows = state.sampled_rows(inputs)
        return SampledRows(state.params[rows], state.next_positions(inputs), rows, state.memory)
