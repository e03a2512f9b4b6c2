"""Zeros that take no time and no memory until they are used.

On a CPU `torch.zeros` writes to all its memory, about a second per GiB. The pages of an engine are gigabytes, and most
requests use a few of them. Memory that the operating system has just mapped is zero already: NumPy asks for such
memory (calloc), and the first write to a part of it makes that part real.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch

_ALIGNMENT = 64
"""Bytes; where torch's own tensors begin. Results of a few CPU kernels depend on the place in a vector."""

_promised: dict[int, int] = {}
"""Bytes by the identity of the array that holds them. A finalizer may run in any line: it takes no lock."""


def lazy_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros of a shape, as `torch.zeros` does; on a CPU they are written when they are used.

    Args:
        shape: Shape of the tensor.
        dtype: Dtype of the tensor.
        device: Device of the tensor.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not num_bytes:
        return torch.zeros(*shape, dtype=dtype, device=device)
    memory = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    _promised[id(memory)] = num_bytes
    weakref.finalize(memory, _promised.pop, id(memory)).atexit = False
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(*shape)


def promised_bytes() -> int:
    """Bytes of all zeros that live on the CPU: some of them look free as long as they are not used."""
    return sum(tuple(_promised.values()))
