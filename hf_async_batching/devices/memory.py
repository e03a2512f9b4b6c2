"""How much memory is free where a model runs."""

from __future__ import annotations

import psutil
import torch

from hf_async_batching.devices.cuda import empty_cache
from hf_async_batching.kv_cache.lazy_zeros import promised_bytes


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now, torch's own cached blocks included.

    On a CPU the pages of other engines count as used, although the system sees as used only what they have written.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, int(psutil.virtual_memory().available) - promised_bytes())


def return_memory(device: torch.device) -> None:
    """Give torch's cached blocks back to the device."""
    if device.type == "cuda":
        empty_cache()
