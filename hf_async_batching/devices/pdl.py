"""Programmatic dependent launch: a kernel is set up while the kernel before it still runs."""

from __future__ import annotations

import functools

import torch


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Whether a device can launch kernels before the one ahead of them has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
