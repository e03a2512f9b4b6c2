"""Independence from torch's default device, which belongs to the caller: tensors made here default to the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def cpu_by_default(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with the CPU as torch's default device, as in a thread whose caller has set none."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run
