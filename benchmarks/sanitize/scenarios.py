"""The scenarios for the sanitizer, by name; each runs in its own process."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

ONE_BY_ONE = "PYTORCH_NO_CUDA_MEMORY_CACHING"
"""With 1, each tensor has its own allocation, so that the sanitizer knows its bounds and bytes; torch then cannot
capture graphs."""

WITHOUT_PDL = "SANITIZE_WITHOUT_PDL"
"""With 1, no kernel is launched before the previous one has ended."""


class Scenario(NamedTuple):
    """The work of one process.

    Attributes:
        module: Module of the scenario's function, which has the scenario's name.
        about: Description for the list on the command line.
        captured: Whether the scenario captures CUDA graphs, if the allocator allows it.
        races: Whether the scenario runs kernels with shared memory that no other scenario runs.
    """

    module: str
    about: str
    captured: bool = False
    races: bool = False


SCENARIOS = {
    "compiled": Scenario("engine", "compiled layers, launched early where the card can", captured=True, races=True),
    "attention": Scenario("kernel", "write, decode, prefill and mixed; windows, caps, chunks, sinks", races=True),
    "hybrid": Scenario("engine", "recurrent states beside attention, over packed tokens"),
    "windows": Scenario("engine", "soft caps, windows and full attention in turn: two groups of pages", captured=True),
    "decode": Scenario("engine", "decode steps, packed projections and skinny products", captured=True),
    "mixed": Scenario("engine", "pieces of prompts beside rows that decode, padded and not", captured=True),
    "draws": Scenario("engine", "temperature, top-k, top-p, min-p, penalties, log-probabilities", captured=True),
    "drafts": Scenario("engine", "prompt lookup", captured=True),
    "sampling": Scenario("kernel", "the sampling and arg-max kernels over a large vocabulary", races=True),
    "states": Scenario("state", "convolutions, delta rules and scans: decode, and prompts beside it", races=True),
    "linear": Scenario("kernel", "skinny products: shapes that fill no block, shares, residuals", races=True),
    "tables": Scenario("kernel", "row tables: updates, carry-over, commit", races=True),
}
"""The slowest scenarios come first, so that none of them runs alone at the end."""


def run_scenario(name: str, device: torch.device) -> None:
    """Run one scenario in this process.

    Raises:
        Exception: The error of the scenario, or of the engine's own checks.
    """
    if os.environ.get(ONE_BY_ONE) == "1":
        _replay_by_running()
    if os.environ.get(WITHOUT_PDL) == "1":
        _launch_in_turn()
    module = import_module(f"benchmarks.sanitize.{SCENARIOS[name].module}_scenarios")
    run: Callable[[torch.device], None] = getattr(module, name)
    run(device)
    if device.type == "cuda":
        from torch.cuda import synchronize

        synchronize()


def _replay_by_running() -> None:
    """Run steps directly instead of capturing them, so that padded and decode steps run without graphs."""
    from hf_async_batching.devices.cuda import CudaDevice

    class Repeated:
        def __init__(self, work: Callable[[], object]) -> None:
            self._work = work

        def replay(self) -> None:
            self._work()

    CudaDevice.capture = lambda self, work: Repeated(work)  # type: ignore[method-assign]  # noqa: ARG005


def _launch_in_turn() -> None:
    """Launch no kernel early, so that early launches cause no report."""
    for name in ("attention.triton_kernels", "engine.background_compile", "linear.skinny"):
        module = import_module(f"hf_async_batching.{name}")
        assert hasattr(module, "supports_pdl")
        module.supports_pdl = lambda device: False  # noqa: ARG005
