"""Arguments of attention: what is not known by name is never taken for nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedModelError
from hf_async_batching.attention.hf_interface import HARMLESS, PagedCall, paged_attention_forward
from hf_async_batching.coverage.check import check_model, make_prompts, reference
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.model.forward.packed_forward import PackedForward

SPARSE: dict[str, Any] = {
    "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
    "index_block_size": 8,
    "index_topk_blocks": 2,
}


@pytest.fixture
def says_more() -> Iterator[dict[str, Any]]:
    """Keyword arguments that LlamaAttention passes on beside its own."""
    more: dict[str, Any] = {}
    forward = LlamaAttention.forward
    LlamaAttention.forward = lambda self, *args, **kwargs: forward(self, *args, **kwargs, **more)
    yield more
    LlamaAttention.forward = forward


@pytest.mark.parametrize(
    ("argument", "value"),
    [("block_indices", torch.zeros(1)), ("position_bias", 1.0), ("cu_seq_lens_q", torch.zeros(2)), ("new_one", False)],
)
def test_an_argument_that_is_not_known_refuses_the_packed_route(
    argument: str, value: object, says_more: dict[str, Any]
) -> None:
    model = tiny_model("LlamaForCausalLM")
    says_more[argument] = None
    assert PackedForward(model).route == "packed"
    says_more[argument] = value
    with pytest.raises(UnsupportedModelError, match=f"LlamaAttention passes `{argument}` to attention"):
        PackedForward(model)


def test_harmless_arguments_do_not(says_more: dict[str, Any]) -> None:
    says_more.update(dict.fromkeys(HARMLESS - {"dropout", "sliding_window", "attention_mask", "use_cache"}, 0))
    says_more.pop("position_ids")
    says_more.pop("position_embeddings")
    says_more["is_causal"] = True
    assert PackedForward(tiny_model("LlamaForCausalLM")).route == "packed"


def test_an_argument_that_comes_later_is_an_error() -> None:
    module = torch.nn.Linear(1, 1)
    call: Any = PagedCall(None, None, None, {}, {})  # type: ignore[arg-type]
    tensor = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedModelError, match="Linear passes `block_indices` to attention"):
        paged_attention_forward(module, tensor, tensor, tensor, None, paged=call, block_indices=tensor)


@pytest.mark.parametrize("local_blocks", [0, 1])
def test_sparse_blocks_are_served_as_generate_serves_them(local_blocks: int, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("MiniMaxM3VLForCausalLM", **SPARSE, index_local_blocks=local_blocks)
    known = reference(model, make_prompts(190, (5, 150, 1, 33, 14, 160)))
    settings = BatchingConfig(page_size=16, max_batch_tokens=48, max_rows=4, max_sequence_length=256)
    with caplog.at_level(logging.WARNING, "hf_async_batching"):
        verdict = check_model(model, known, config=settings)
    assert (verdict.status, verdict.reason) == ("exact", "")
    assert "passes `block_indices` to attention" in caplog.text
    with GenerationManager(model, settings) as manager:
        manager.submit([5, 6, 7], max_new_tokens=2).result(60)
        assert manager.assembly is not None and manager.assembly.forward.route != "packed"
