"""Zeros that become real memory when they are used."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch

from hf_async_batching.devices.memory import free_memory
from hf_async_batching.kv_cache.lazy_zeros import lazy_zeros, promised_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_they_are_what_torch_makes(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        tensor, like = lazy_zeros(3, 5, 7, dtype=dtype, device=CPU), torch.zeros(3, 5, 7, dtype=dtype)
    assert torch.equal(tensor, like)
    assert (tensor.dtype, tensor.stride(), tensor.is_inference()) == (dtype, like.stride(), like.is_inference())
    assert tensor.data_ptr() % 64 == 0
    with torch.inference_mode():
        tensor[1, 2, 3] = 4
    assert tensor.sum() == 4
    assert lazy_zeros(3, 0, dtype=dtype, device=CPU).shape == (3, 0)
    assert lazy_zeros(3, 2, dtype=dtype, device=torch.device("meta")).shape == (3, 2)


def test_they_take_no_memory_until_they_are_used() -> None:
    process, num_bytes = psutil.Process(), 1 << 30
    before = process.memory_info().rss
    tensor = lazy_zeros(num_bytes, dtype=torch.uint8, device=CPU)
    assert process.memory_info().rss - before < num_bytes // 8
    tensor[: num_bytes // 4] = 1
    assert process.memory_info().rss - before > num_bytes // 8


def test_another_engine_does_not_count_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    memory = psutil.virtual_memory()._replace(available=1 << 40)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    promised, free = promised_bytes(), free_memory(CPU)
    tensor = lazy_zeros(1000, dtype=torch.float32, device=CPU)
    half = tensor[:500].view(torch.int32)
    assert (promised_bytes(), free_memory(CPU)) == (promised + 4000, free - 4000)
    del tensor
    assert free_memory(CPU) == free - 4000, "a view of it still lives"
    del half
    assert (promised_bytes(), free_memory(CPU)) == (promised, free)
