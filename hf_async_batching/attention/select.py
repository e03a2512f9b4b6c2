"""Select the attention kernels for a device."""

from __future__ import annotations

import torch

from hf_async_batching.attention.base import AttentionBackend
from hf_async_batching.config import BackendName


def make_backend(name: BackendName, device: torch.device) -> AttentionBackend:
    """Return the kernels for a device.

    Args:
        name: "torch" for PyTorch, "triton" for the Triton kernels, "auto" for Triton on CUDA and PyTorch elsewhere.
        device: Device of the model.

    Raises:
        ImportError: Triton was requested but is not installed.
    """
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        from hf_async_batching.attention.triton_backend import TritonBackend
        from hf_async_batching.runtime.autotune import Tuning

        return TritonBackend(device, Tuning(device))
    from hf_async_batching.attention.torch_backend import TorchBackend

    return TorchBackend()
