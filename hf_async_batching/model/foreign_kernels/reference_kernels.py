"""Let a model copy compute with transformers' torch code where it would call kernels of other packages.

Transformers uses flash-linear-attention, causal-conv1d and mamba-ssm wherever they are installed, on any device. None
of these packages runs on a CPU.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec

from torch import nn

from hf_async_batching.model.foreign_kernels.kernel_wrappers import rebind_wrappers

_PACKAGES = ("fla", "causal_conv1d", "mamba_ssm", "kernels")


def use_reference_kernels(model: nn.Module) -> None:
    """Rebind methods of a model's modules to torch functions in place of kernels of other packages.

    This changes nothing if no such package is installed, and never affects another model.

    Args:
        model: A copy that belongs to the engine.
    """
    if any(find_spec(package) for package in _PACKAGES):
        rebind_wrappers(model, inspect.unwrap)
