"""What is run under the sanitizer, by name, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

ONE_BY_ONE = "PYTORCH_NO_CUDA_MEMORY_CACHING"
"""With 1, each tensor is an allocation of its own, whose bounds and bytes the sanitizer knows; and torch cannot
capture graphs."""

WITHOUT_PDL = "SANITIZE_WITHOUT_PDL"
"""With 1, no kernel is launched before the one ahead of it has ended."""


class Scenario(NamedTuple):
    """What one process runs.

    Attributes:
        module: Where its function is, which has the scenario's name.
        about: For the list on the command line.
        captured: Whether it captures CUDA graphs, where the allocator lets it.
        races: Whether kernels with shared memory run in it that run in no other scenario.
    """

    module: str
    about: str
    captured: bool = False
    races: bool = False


SCENARIOS = {
    "compiled": Scenario("engine", "compiled layers, launched early where the card can", captured=True, races=True),
    "attention": Scenario("kernel", "write, decode, prefill and mixed; windows, caps, chunks, sinks", races=True),
    "hybrid": Scenario("engine", "recurrent states beside attention: the padded route"),
    "windows": Scenario("engine", "soft caps, windows and full attention in turn: two groups of pages", captured=True),
    "decode": Scenario("engine", "decode steps, packed projections and skinny products", captured=True),
    "mixed": Scenario("engine", "pieces of prompts beside rows that decode, padded and not", captured=True),
    "draws": Scenario("engine", "temperature, top-k, top-p, min-p, penalties, log-probabilities", captured=True),
    "drafts": Scenario("engine", "prompt lookup", captured=True),
    "sampling": Scenario("kernel", "the sampling and arg-max kernels over a large vocabulary", races=True),
    "linear": Scenario("kernel", "skinny products: shapes that fill no block, shares, residuals", races=True),
    "tables": Scenario("kernel", "row tables: updates, carry-over, commit", races=True),
}
"""The slowest first, so that none of them is left alone at the end."""


def run_scenario(name: str, device: torch.device) -> None:
    """Run one in this process.

    Raises:
        Exception: What the scenario raises; the engine's own checks are part of it.
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
    """Let a captured step be the step itself, so that padded and decode steps run as they are without graphs."""
    from hf_async_batching.devices.cuda import CudaDevice

    class Repeated:
        def __init__(self, work: Callable[[], object]) -> None:
            self._work = work

        def replay(self) -> None:
            self._work()

    CudaDevice.capture = lambda self, work: Repeated(work)  # type: ignore[method-assign]  # noqa: ARG005


def _launch_in_turn() -> None:
    """Launch no kernel early: what a tool reports then is not of early launches."""
    for name in ("attention.triton_kernels", "engine.background_compile", "linear.skinny"):
        module = import_module(f"hf_async_batching.{name}")
        assert hasattr(module, "supports_pdl")
        module.supports_pdl = lambda device: False  # noqa: ARG005
