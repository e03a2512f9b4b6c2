"""Which memory a module tree holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hf_async_batching.model.view.shared_tensors import tensors_within


def storages(*roots: Any) -> dict[int, int]:
    """Bytes by address of every storage that can be reached: parameters, buffers, attributes, state objects."""
    found: dict[int, int] = {}
    for root in roots:
        for tensor in tensors_within(root):
            for part in parts(tensor):
                storage = part.untyped_storage()
                if storage.nbytes():
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def parts(tensor: Any) -> Iterator[torch.Tensor]:
    """What a tensor subclass is made of, down to tensors with memory of their own."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts(getattr(tensor, name))
