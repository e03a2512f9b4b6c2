"""Lets a model of our own compute with transformers' own code where it would call kernels of other packages.

Transformers takes flash-linear-attention, causal-conv1d and mamba-ssm where they are installed, whatever the device;
none of them runs on a CPU.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec

from torch import nn

from hf_async_batching.model.foreign_kernels.kernel_wrappers import rebind_wrappers

_PACKAGES = ("fla", "causal_conv1d", "mamba_ssm", "kernels")


def use_reference_kernels(model: nn.Module) -> None:
    """Bind methods of a model's modules to the functions in torch that kernels of other packages stand for.

    Nothing changes where no such package is installed, and nothing but this model ever does.

    Args:
        model: A model of our own.
    """
    if any(find_spec(package) for package in _PACKAGES):
        rebind_wrappers(model, inspect.unwrap)
