"""What happens on the device in one step: carry-over, forward, sampling, update of the row tables.

Decode steps come in buckets, so that each can be captured once as a CUDA graph. A bucket is run as it is the first
time it is needed (which also compiles its kernels) and captured the second time. So do steps with drafts, whose few
tokens would otherwise cost a small model more to launch than they save. Other steps with prompts are run as they are.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from hf_async_batching.autocast import Autocast
from hf_async_batching.device_state import DeviceState, StepInputs
from hf_async_batching.devices import Device, Graph
from hf_async_batching.devices.base import Kernel
from hf_async_batching.plan import Features, Plan
from hf_async_batching.prompt_embeddings import PromptEmbeddings
from hf_async_batching.sampling import SampledRows, Sampler
from hf_async_batching.sampling.rare import RareOutputs, sample_rare
from hf_async_batching.staging import Sections

logger = logging.getLogger(__name__)

# A capture can fail for a passing reason: another thread synchronized the device, or memory was short.
MAX_FAILED_CAPTURES = 3

# In place of features, for the graph of a forward alone.
FORWARD = None

# Tokens of the largest step with drafts that is captured.
MOST_DRAFTED = 128

Forward = Callable[[StepInputs], torch.Tensor]


def decode_buckets(max_rows: int) -> list[int]:
    """Sizes of decode steps that get a graph: 1, 2, 4, 8, then steps of 8 to 64, 16 to 128, 32 above."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_rows + 32, 32)]
    return [*[size for size in sizes if size < max_rows], max_rows]


def drafted_buckets(most: int) -> list[int]:
    """Sizes of steps with drafts that get a graph: up to `most` entries, of which at least one is padding."""
    return [size for size in (8, 16, 24, 32, 48, 64, 96, MOST_DRAFTED) if size <= most]


class Captured(NamedTuple):
    """What a graph was captured of: entries, what is done with the logits, and whether they are drafts."""

    size: int
    features: Features | None
    drafts: bool = False


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
        max_drafted: Entries of the largest step with drafts that is captured; 0 where none is.
        graphs: Whether steps are captured.
        autocast: What the forward runs under.

    Attributes:
        buckets: Sizes of decode steps that get a graph; empty where nothing is captured.
        drafted_buckets: Those of steps with drafts.
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
        max_drafted: int = 0,
        graphs: bool,
        autocast: Autocast | None = None,
    ) -> None:
        self._forward = forward
        self._autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        if autocast is not None and autocast.dtype is not None:
            self._autocast = autocast
        self._sampler = Sampler()
        self._state = state
        self._device = device
        self.buckets = decode_buckets(max_rows) if graphs else []
        self.drafted_buckets = drafted_buckets(max_drafted) if graphs else []
        self._seen: set[Captured] = set()
        # Of decode steps, and of steps with drafts.
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

    def drafted_bucket(self, plan: Plan) -> int:
        """Entries that a step with drafts is padded to; 0 for one that is run as it is."""
        if not plan.chunks or plan.features.eager or not self.drafted_buckets or not plan.only_goes_on:
            return 0
        # The padded samples need a padded token to point to.
        return next((size for size in self.drafted_buckets if size > plan.num_tokens), 0)

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
        if isinstance(self._forward, Tunable):
            self._forward.tune(self.buckets)
        self._replaced.append((self._step_number, list(self.captured.values())))
        self.captured, self._forwards = {}, {}

    @torch.inference_mode()
    def warm(self, features: Features) -> None:
        """Run and capture every bucket on the padding row; `decode_rows` is empty afterwards."""
        self._adopt()
        self._state.memory.ensure(words=features.memory, seen=features.seen)
        self._state.decode_rows.zero_()
        # The largest first: the smaller ones then fit into the memory that it has taken.
        for bucket in reversed([*self.buckets, *self.buckets]):
            if features.eager:
                self._decode_forward(bucket)
            else:
                self._decode(bucket, features)

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
        features = plan.features
        self._state.memory.ensure(words=features.memory, seen=features.seen)
        self._state.apply_updates(staged, sections)
        self.rare = None
        if sections.tokens > plan.num_tokens:
            self._state.keep_drafted(staged, sections)
            self._drafted(sections.tokens, features)
        elif plan.chunks:
            inputs = self._state.mixed_inputs(staged, sections, len(plan.decode_rows))
            embeddings = self._prompt_embeddings.pieces(plan)
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
            self._replaced.append((self._step_number, list(self.captured.values())))
            self._forward = offered
            self.captured, self._forwards = {}, {}
            self._seen.clear()

    def _decode(self, bucket: int, features: Features) -> None:
        self._replay(Captured(bucket, features), lambda: self._step(self._state.decode_inputs(bucket), features))

    def _drafted(self, size: int, features: Features) -> None:
        key = Captured(size, features, drafts=True)
        self._replay(key, lambda: self._step(self._state.drafted_inputs(size), features))

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
        """The graph of a step, captured the second time that it is asked for; None where there is none."""
        graph = self.captured.get(key)
        if graph is None and key in self._seen and (self.drafted_buckets if key.drafts else self.buckets):
            graph = self._capture(key, work)
        if graph is None:
            self._seen.add(key)
        return graph

    def _capture(self, key: Captured, work: Kernel) -> Graph | None:
        steps = "steps with drafts" if key.drafts else "decode steps"
        try:
            graph = self._device.capture(work)
        except RuntimeError as error:
            # Some forwards read tensors back, as mixtures of experts do in dtypes without a grouped product.
            self._failed_captures[key.drafts] += 1
            if self._failed_captures[key.drafts] == MAX_FAILED_CAPTURES:
                logger.warning("%s cannot be captured as CUDA graphs and run without: %s", steps, error)
                self.drafted_buckets = []
                if not key.drafts:
                    self.buckets = []
            logger.debug("a capture failed", exc_info=True)
            return None
        self.captured[key] = graph
        logger.info("captured %s of %d entries, %s", steps, key.size, key.features or "forward alone")
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
