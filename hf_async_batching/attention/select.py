"""Which attention kernels serve a device."""

from __future__ import annotations

import torch

from hf_async_batching.attention.base import AttentionBackend
from hf_async_batching.config import BackendName


def make_backend(name: BackendName, device: torch.device) -> AttentionBackend:
    """The kernels for a device.

    Args:
        name: "torch" for plain PyTorch, "triton" for the Triton kernels, "auto" for Triton on CUDA and PyTorch else.
        device: Where the model runs.

    Raises:
        ImportError: Triton was asked for and is not installed.
    """
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        from hf_async_batching.attention.triton_backend import TritonBackend
        from hf_async_batching.runtime.autotune import Tuning

        return TritonBackend(device, Tuning(device))
    from hf_async_batching.attention.torch_backend import TorchBackend

    return TorchBackend()
