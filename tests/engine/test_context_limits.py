"""Requests beyond a table of positions are refused at the door, whatever a family calls its length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.errors import RequestTooLongError
from hf_async_batching.model.view.model_view import context_length

LENGTH = 40
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": LENGTH}
_BERT: dict[str, Any] = {**_COMMON, "max_position_embeddings": LENGTH, "is_decoder": True}

FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "Mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": LENGTH}, LENGTH),
    "GPT2": (_GPT, LENGTH),
    "GPTJ": ({**_GPT, "rotary_dim": 4}, LENGTH),
    "Bert": (_BERT, LENGTH),
    "Roberta": ({**_BERT, "pad_token_id": 1}, LENGTH - 2),
    "Camembert": ({**_BERT, "pad_token_id": 1}, LENGTH - 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_of_positions_bounds_requests(family: str) -> None:
    fields, limit = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=64, eos_token_id=None, **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert context_length(model) == limit
    ids = torch.arange(LENGTH + 1)[None] % 50 + 5
    model(input_ids=ids[:, :limit], use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids[:, : limit + 1], use_cache=False)
    with GenerationManager(model, BatchingConfig(page_size=16)) as manager:
        innocent = manager.submit([5, 6], max_new_tokens=limit - 2)
        longest = manager.submit(ids[0, : limit - 1], max_new_tokens=1)
        with pytest.raises(RequestTooLongError, match="lower `max_new_tokens`"):
            manager.submit(ids[0, : limit - 1], max_new_tokens=2)
        assert len(innocent.result(60).token_ids) == limit - 2
        assert len(longest.result(60).token_ids) == 1
