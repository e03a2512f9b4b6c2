"""A streamer that remembers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


class Recorder(BaseStreamer):
    """Keeps the shape, dtype, device and values of each tensor that `generate` puts, and the end."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append((tuple(value.shape), value.dtype, value.device, value.flatten().tolist()))

    def end(self) -> None:
        self.calls.append("end")
