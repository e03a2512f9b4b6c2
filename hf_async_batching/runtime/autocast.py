"""The calling thread's `torch.autocast`: captured when a request is submitted, entered around the view's forward.

A new thread does not inherit it. Under autocast keys and values have the lower precision, as attention casts them, so
an engine belongs to one autocast state.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Autocast:
    """A thread's autocast state for one type of device.

    Attributes:
        device_type: "cuda" or "cpu".
        dtype: The lower precision; None if autocast is off.
    """

    device_type: str
    dtype: torch.dtype | None = None

    @classmethod
    def of_this_thread(cls, device_type: str) -> Autocast:
        """The state of the calling thread; autocast for other types of device does not concern the model."""
        if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
            return cls(device_type)
        return cls(device_type, torch.get_autocast_dtype(device_type))

    def __call__(self) -> AbstractContextManager[object]:
        """A context in which the calling thread has this state.

        Weights are cast in each forward. torch's cache of casts is shared by all threads, is emptied when any thread
        leaves autocast, and would hide weight updates from an engine that never leaves it. Results are the same with
        and without the cache.
        """
        if self == Autocast.of_this_thread(self.device_type) and self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None, cache_enabled=False)

    def __str__(self) -> str:
        return "off" if self.dtype is None else str(self.dtype)


def lowered(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cast queries, keys and values as attention does under the calling thread's autocast; unchanged if it is off.

    torch's own attention casts all three there (rotary positions leave queries and keys in float32).
    """
    device_type = query.device.type
    if not torch.is_autocast_enabled(device_type):
        return query, key, value
    dtype = torch.get_autocast_dtype(device_type)
    return query.to(dtype), key.to(dtype), value.to(dtype)
