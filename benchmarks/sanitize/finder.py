"""Finds the program compute-sanitizer."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

NAME = "compute-sanitizer"
_PACKAGES = ("nvidia-cuda-sanitizer-api", "nvidia-cuda-sanitizer-api-cu13", "nvidia-cuda-sanitizer-api-cu12")


class SanitizerNotFoundError(Exception):
    """This machine has no compute-sanitizer; the message says how to get it."""


def find_sanitizer(environment: Mapping[str, str] = os.environ, toolkits: str = "/usr/local/cuda*") -> Path:
    """Find the program on `PATH`, in a toolkit or in a package of pip, in this order.

    Args:
        environment: Environment variables; `PATH`, `CUDA_HOME` and `CUDA_PATH` are read.
        toolkits: Pattern of the folders where toolkits are installed; the newest comes first.

    Raises:
        SanitizerNotFoundError: The program was not found.
    """
    on_path = shutil.which(NAME, path=environment.get("PATH", ""))
    if on_path is not None:
        return Path(on_path)
    for candidate in _candidates(environment, toolkits):
        if candidate.is_file():
            return candidate
    raise SanitizerNotFoundError(
        "compute-sanitizer is neither on PATH, nor in $CUDA_HOME, $CUDA_PATH or "
        f"{toolkits} (bin/, compute-sanitizer/), nor in a package of pip. Install it with the CUDA toolkit (apt: "
        "cuda-sanitizer-13-0), or with `pip install 'nvidia-cuda-sanitizer-api==13.0.*'`, or put its folder on PATH"
    )


def _candidates(environment: Mapping[str, str], toolkits: str) -> Iterator[Path]:
    homes = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    # The link /usr/local/cuda points to one of the versions, and it sorts behind them.
    for home in [*homes, *sorted(glob.glob(toolkits), reverse=True)]:
        yield Path(home) / "bin" / NAME
        yield Path(home) / "compute-sanitizer" / NAME
        yield Path(home) / "extras" / "compute-sanitizer" / NAME
    for package in _PACKAGES:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        yield from (Path(str(file.locate())) for file in files if file.name == NAME)
