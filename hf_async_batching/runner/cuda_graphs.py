"""Steps captured as CUDA graphs, behind the device protocol.

A step is run as it is before it is captured, which also compiles its kernels. Steps with prompts or drafts that have
few tokens are captured, too: launching their kernels one by one would take the host longer than the device needs. With
`graph_buckets.MOST_PADDED` tokens or more it does not, and these are run as they are.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

from hf_async_batching.core.plan import Features
from hf_async_batching.core.step_layout import Padding
from hf_async_batching.devices.base import Device, Graph, Kernel

logger = logging.getLogger(__name__)

# A capture can fail for a passing reason: another thread synchronized the device, or memory was short.
MAX_FAILED_CAPTURES = 3

# In place of features, for the graph of a forward alone.
FORWARD = None

# The most graphs of steps with prompts, and the memory of all graphs, in bytes, up to which they are captured.
MOST_PADDED_GRAPHS = 96
_MOST_GRAPH_BYTES = 1 << 30

# Runs of a step before it is captured; a capture takes as long as a few uncaptured steps. A decode step comes again at
# once, while a step with prompts may be the last of its size.
DECODE_USES, PADDED_USES = 1, 4


class Captured(NamedTuple):
    """The key of a graph: the rows of a decode step or the sizes of a padded one, and the features of its sampling."""

    size: int | Padding
    features: Features | None


class GraphCache:
    """Captures steps that come often enough, and replays them.

    Args:
        device: Where graphs are captured.
        enabled: Whether anything is captured.

    Attributes:
        enabled: Whether decode steps are captured; False for good once that has failed `MAX_FAILED_CAPTURES` times.
        captured: Graphs by what they were captured of. For a step with rare features, it is the forward alone,
            under `FORWARD`.
    """

    def __init__(self, device: Device, *, enabled: bool) -> None:
        self._device = device
        self.enabled = enabled
        self.captured: dict[Captured, Graph] = {}
        self._uses: Counter[Captured] = Counter()
        # Failures in a row: of decode steps, and of steps with prompts.
        self._failed_captures = [0, 0]
        # Graphs that were replaced, and the last step that may have replayed them.
        self._replaced: list[tuple[int, list[Graph]]] = []

    def run(self, key: Captured, work: Kernel) -> bool:
        """Replay the graph of a step, captured once it has come often enough; without a graph run `work`.

        Returns:
            Whether a graph was replayed.
        """
        graph = self.captured.get(key)
        if graph is None and self._is_due(key):
            graph = self._capture(key, work)
        if graph is None:
            self._uses[key] += 1
            work()
            return False
        graph.replay()
        return True

    def capture_next(self, key: Captured) -> None:
        """Capture a step with prompts when it comes next: what it needs is compiled already."""
        self._uses[key] = PADDED_USES

    def captures_prompts(self) -> bool:
        """Whether there is room for graphs of further steps with prompts, and they can be captured."""
        count = sum(isinstance(key.size, Padding) for key in self.captured)
        return (
            self._failed_captures[True] < MAX_FAILED_CAPTURES
            and count < MOST_PADDED_GRAPHS
            and self._device.graph_bytes() < _MOST_GRAPH_BYTES
        )

    def forget(self, last_step: int) -> None:
        """Capture anew, after runs that compile what the new steps need; `last_step` may still replay old graphs."""
        self._replaced.append((last_step, list(self.captured.values())))
        self.captured = {}
        self._uses.clear()

    def completed(self, step: int) -> None:
        """Let go of graphs that no step after `step` can replay."""
        if self._replaced:
            self._replaced = [replaced for replaced in self._replaced if replaced[0] > step]

    def _is_due(self, key: Captured) -> bool:
        if isinstance(key.size, Padding):
            return self._uses[key] >= PADDED_USES and self.captures_prompts()
        return self.enabled and self._uses[key] >= DECODE_USES

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
                    self.enabled = False
            if padded:
                del self._uses[key]  # tried again after as many uses
            logger.debug("a capture failed", exc_info=True)
            return None
        self._failed_captures[padded] = 0
        self.captured[key] = graph
        logger.info("captured %s of size %s, %s", steps, key.size, key.features or "forward alone")
        return graph
