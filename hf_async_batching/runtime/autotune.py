"""Choose kernel settings by measurement on this card, and store them in the user's cache folder.

Only `Tuning.tune` measures, and a warm-up calls it. `Tuning.choose` looks up measurements of this or an earlier
process, and otherwise returns the rule's default.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_async_batching.runtime.forking import ForkSafeLock

logger = logging.getLogger(__name__)

# A named tuple of numbers and flags, which JSON can hold and two runs can compare.
Config = TypeVar("Config", bound=tuple[Any, ...])


def cache_folder() -> Path:
    """The folder of measurements: `$HF_ASYNC_BATCHING_CACHE`, or `~/.cache/hf_async_batching`."""
    named = os.environ.get("HF_ASYNC_BATCHING_CACHE")
    return Path(named) if named else Path("~/.cache/hf_async_batching").expanduser()


def source_version(*files: str) -> str:
    """A short hash of source files, as a part of a kernel's name: a changed kernel gets a new name."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:12]


def describe(device: torch.device) -> dict[str, str]:
    """The card and the compiler versions for which a measurement is valid."""
    try:
        import triton  # type: ignore[import-untyped,unused-ignore]

        version = str(triton.__version__)
    except ImportError:
        version = "none"
    about = {"device": device.type, "capability": "", "torch": str(torch.__version__), "triton": version}
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
        about["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return about


def benchmark(launch: Callable[[], None]) -> float:
    """Seconds that `launch`'s work takes on the current CUDA device, in a captured graph, as decode steps run it.

    If short kernels were launched one by one, the measurement would show the speed of the host.
    """
    from triton.testing import do_bench_cudagraph  # type: ignore[import-untyped,unused-ignore]

    return float(do_bench_cudagraph(launch, rep=20, return_mode="median")) / 1000


class Tuning:
    """The best known settings on one kind of card. Any thread may call its methods.

    Args:
        device: Device of the kernels.
        folder: Folder of the measurements; None for `cache_folder()`.
        timer: Measures a launch in seconds; None for `benchmark`.

    Attributes:
        path: The file; one per card and compiler versions.
    """

    def __init__(
        self,
        device: torch.device,
        folder: Path | None = None,
        timer: Callable[[Callable[[], None]], float] | None = None,
    ) -> None:
        self._about = describe(device)
        name = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"tuning-{name}.json"
        self._timer = timer or benchmark
        self._lock = ForkSafeLock()
        self._best: dict[str, Any] = self._read()

    def choose(self, kernel: str, key: str, candidates: Sequence[Config], default: Config) -> Config:
        """Return the candidate that was measured to be the fastest.

        Args:
            kernel: Name and version of the kernel; see `source_version`.
            key: The problem: everything that the result may depend on.
            candidates: The allowed settings.
            default: Result if nothing was measured, or if the measured setting is no longer a candidate.
        """
        with self._lock:
            remembered = self._best.get(_entry(kernel, key))
        best = remembered.get("config") if isinstance(remembered, dict) else None
        return next((candidate for candidate in (default, *candidates) if _plain(candidate) == best), default)

    def tune(
        self,
        kernel: str,
        key: str,
        candidates: Sequence[Config],
        run: Callable[[Config], Callable[[], None]],
        default: Config,
    ) -> Config:
        """Measure the default and the candidates, unless this was done before, and store the fastest.

        Args:
            kernel: As in `choose`.
            key: As in `choose`.
            candidates: The settings to try. A candidate that raises, for example because it does not fit the card, is
                skipped.
            run: Returns for a setting the function that launches the work. Nothing else may run on the device.
            default: The rule's setting; the result if every candidate fails.
        """
        with self._lock:
            known = _entry(kernel, key) in self._best
        if known:
            return self.choose(kernel, key, candidates, default)
        times: dict[Config, float] = {}
        for candidate in dict.fromkeys((default, *candidates)):
            try:
                times[candidate] = self._timer(run(candidate))
            except Exception as error:
                logger.debug("%s, %s: %s does not run: %s", kernel, key, candidate, error)
        if not times:
            return default
        best = min(times, key=lambda candidate: times[candidate])
        logger.info(
            "%s, %s: %s takes %.1f us (the rule's %s: %.1f us)",
            kernel, key, best, times[best] * 1e6, default, times.get(default, float("nan")) * 1e6,
        )  # fmt: skip
        with self._lock:
            self._best[_entry(kernel, key)] = {"config": _plain(best), "seconds": times[best]}
            self._write()
        return best

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        best = content.get("best") if isinstance(content, dict) else None
        return best if isinstance(best, dict) else {}

    def _write(self) -> None:
        """Replace the file atomically, including entries that other processes have added in the meantime."""
        self._best = self._read() | self._best
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, prefix=self.path.stem, suffix=".tmp", delete=False
            ) as file:
                temporary = Path(file.name)
                json.dump({"about": self._about, "best": self._best}, file, indent=1)
            temporary.replace(self.path)
        except OSError as error:
            # A read-only home folder must not stop the engine: the process keeps its measurements in memory.
            logger.warning("measured kernel settings cannot be kept in %s: %s", self.path, error)
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def _entry(kernel: str, key: str) -> str:
    return f"{kernel}: {key}"


def _plain(config: tuple[Any, ...]) -> Any:
    """The setting as JSON returns it."""
    return json.loads(json.dumps(config))
