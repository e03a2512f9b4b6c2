"""How much shared memory a card gives to one program."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on a card; on a CPU, what the smallest card served has."""
    if device.type != "cuda":
        return 99 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
