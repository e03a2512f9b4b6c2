"""Which device serves a model."""

from __future__ import annotations

import torch

from hf_async_batching.devices.base import Device
from hf_async_batching.devices.cpu import CpuDevice


def make_device(device: torch.device) -> Device:
    """The device that serves a model whose weights lie on `device`.

    Raises:
        NotImplementedError: Neither a CUDA device nor the CPU.
    """
    if device.type == "cpu":
        return CpuDevice()
    if device.type == "cuda":
        from hf_async_batching.devices.cuda import CudaDevice

        return CudaDevice(device)
    raise NotImplementedError(
        f"models on {device.type!r} devices are not served; move the model to a CUDA device or to the CPU"
    )
