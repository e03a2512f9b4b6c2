"""Capture steps as CUDA graphs, behind the device protocol.

A step runs normally before it is captured, which also compiles its kernels. Small steps with prompts or drafts are
captured too: launching their kernels one by one would take the host longer than the device needs. From
`graph_buckets.MOST_PADDED` tokens on it does not, and such steps run without capture.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

from hf_async_batching.core.plan import Features
from hf_async_batching.core.step_layout import Padding
from hf_async_batching.devices.base import Device, Graph, Kernel

logger = logging.getLogger(__name__)

# A capture can fail for a temporary reason: another thread synchronized the device, or memory was short.
MAX_FAILED_CAPTURES = 3

# Takes the place of features in the key of a graph that holds only the forward.
FORWARD = None

# Largest number of graphs of steps with prompts, and largest memory of all graphs, in bytes, before a new capture.
MOST_PADDED_GRAPHS = 160
_MOST_GRAPH_BYTES = 1 << 30

# Runs of a step before it is captured; a capture takes as long as a few uncaptured steps. A decode step repeats at
# once, while a step with prompts may be the last of its size.
DECODE_USES, PADDED_USES = 1, 4


class Captured(NamedTuple):
    """The key of a graph: the rows of a decode step or the sizes of a padded one, and the features of its sampling."""

    size: int | Padding
    features: Features | None


class GraphCache:
    """Captures steps that come often enough, and replays them.

    Args:
        device: Device that captures graphs.
        enabled: Whether steps are captured.

    Attributes:
        enabled: Whether decode steps are captured; False for good after `MAX_FAILED_CAPTURES` failures in a row.
        captured: Graphs by key. The graph of a step with rare features holds only the forward, with the key's features
            `FORWARD`.
    """

    def __init__(self, device: Device, *, enabled: bool) -> None:
        self._device = device
        self.enabled = enabled
        self.captured: dict[Captured, Graph] = {}
        self._uses: Counter[Captured] = Counter()
        # Failures in a row: of decode steps, and of steps with prompts.
        self._failed_captures = [0, 0]
        # Replaced graphs, and the last step that may have replayed them.
        self._replaced: list[tuple[int, list[Graph]]] = []

    def run(self, key: Captured, work: Kernel) -> bool:
        """Replay the graph of a step, captured once the step has come often enough; without a graph, run `work`.

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
        """Capture a step with prompts when it comes next: its kernels are compiled already."""
        self._uses[key] = PADDED_USES

    def captures_prompts(self) -> bool:
        """Whether there is room for graphs of more steps with prompts, and such steps can be captured."""
        count = sum(isinstance(key.size, Padding) for key in self.captured)
        return (
            self._failed_captures[True] < MAX_FAILED_CAPTURES
            and count < MOST_PADDED_GRAPHS
            and self._device.graph_bytes() < _MOST_GRAPH_BYTES
        )

    def forget(self, last_step: int) -> None:
        """Capture all steps again, after runs that compile their kernels; `last_step` may still replay old graphs."""
        self._replaced.append((last_step, list(self.captured.values())))
        self.captured = {}
        self._uses.clear()

    def completed(self, step: int) -> None:
        """Drop graphs that no step after `step` can replay."""
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
            # Some forwards read tensors back, such as mixtures of experts in dtypes without a grouped product.
            self._failed_captures[padded] += 1
            if self._failed_captures[padded] == MAX_FAILED_CAPTURES:
                logger.warning("%s cannot be captured as CUDA graphs and run without: %s", steps, error)
                if not padded:
                    self.enabled = False
            if padded:
                del self._uses[key]  # tried again after the same number of uses
            logger.debug("a capture failed", exc_info=True)
            return None
        self._failed_captures[padded] = 0
        self.captured[key] = graph
        logger.info("captured %s of size %s, %s", steps, key.size, key.features or "forward alone")
        return graph
