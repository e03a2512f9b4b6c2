"""Torch's default device is the caller's business."""

from __future__ import annotations

from typing import Any

import torch
from support.tiny_models import greedy_alone, tiny_model

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager

ARGUMENTS: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None}


def test_a_default_device_without_memory_changes_nothing() -> None:
    model: Any = tiny_model("Llama")
    ids, expected = torch.tensor([[5, 6, 7]]), greedy_alone(tiny_model("Llama"), [5, 6, 7], 5, eos_token_id=None)
    with torch.device("meta"), GenerationManager(model, BatchingConfig(page_size=16)) as manager:
        out = model.generate(ids, do_sample=False, custom_generate=manager.bind(), **ARGUMENTS)
        assert out[0, 3:].tolist() == expected
        direct: Any = hf_async_batching.generate(model, ids, manager=manager, do_sample=False, **ARGUMENTS)
        assert torch.equal(direct, out)
        assert manager.submit([5, 6, 7], do_sample=False, **ARGUMENTS).result(60).token_ids == expected
        ruled = manager.submit(
            [5, 6, 7], do_sample=True, top_k=3, suppress_tokens=[9], seed=torch.Generator(), **ARGUMENTS
        )
        assert len(ruled.result(60).token_ids) == 5
        assert torch.get_default_device().type == "meta"
