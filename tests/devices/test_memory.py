"""What a device has to give."""

from __future__ import annotations

import pytest
import torch

from hf_async_batching.devices import cuda
from hf_async_batching.devices.memory import free_memory, return_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_blocks_return_while_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(cuda._exclusive.locked()))
    return_memory(CPU)
    assert calls == []
    return_memory(CUDA)
    assert calls == [True]
    assert not cuda._exclusive.locked()


def test_what_torch_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_memory(CUDA) == 60
    assert free_memory(CPU) > 1 << 20
