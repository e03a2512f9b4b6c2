"""Families that are run through their own cache class: rows that come and go, preemption, prompts in pieces."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.hidden_states import hide_functions
from support.pace import held
from transformers import PreTrainedModel

from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedModelError
from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.coverage.check import Reference, make_prompts, reference
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.runner.row_tables import RowTables

LENGTHS = (14, 12, 1, 15, 13, 40, 9, 11)
NEW = 14
ROUTES = {
    "BloomForCausalLM": "padded",
    "Qwen3NextForCausalLM": "padded, row states",
    "MambaForCausalLM": "padded, row states, whole prompts",
    "ZayaForCausalLM": "padded, row states",
    "BartForCausalLM": "lockstep",
    "InklingForCausalLM": "lockstep, row states",
    "RwkvForCausalLM": "single",
}


@pytest.fixture(autouse=True)
def _states_in_cache_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers whose states could be packed are not recognised: these tests are about the other way."""
    hide_functions(monkeypatch)


@functools.cache
def known(class_name: str) -> tuple[PreTrainedModel, Reference]:
    model = tiny_model(class_name)
    return model, reference(model, make_prompts(190, LENGTHS, seed=3), NEW)


def serve(manager: GenerationManager, prompts: list[list[int]], cancelled: int | None = None) -> list[list[int]]:
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    with held(manager):
        handles = [manager.submit(prompt, **arguments) for prompt in prompts]
    if cancelled is not None:
        next(iter(handles[cancelled]))
        handles[cancelled].cancel()
    return [handle.result(120).token_ids for handle in handles]


# Every route at depth 3, one at depth 1; all of them in the slow form.
@pytest.mark.parametrize(
    ("class_name", "depth"),
    [
        pytest.param(name, depth, marks=[] if depth == 3 or name == "BloomForCausalLM" else pytest.mark.slow)
        for name in ROUTES
        for depth in (3, 1)
    ],
)
def test_rows_come_and_go(class_name: str, depth: int) -> None:
    model, expected = known(class_name)
    # Three rows for eight requests, and pages for two: rows are taken over, and requests are computed again.
    config = BatchingConfig(
        page_size=16, num_pages=4, max_rows=3, max_batch_tokens=16, max_sequence_length=64, depth=depth, debug=True
    )
    with GenerationManager(model, config) as manager:
        got = serve(manager, expected.prompts, cancelled=1)
        assert manager.assembly is not None
        assert manager.assembly.forward.route == ROUTES[class_name]
        preemptions = manager.assembly.engine.scheduler.preemptions
    assert got[1] == expected.tokens[1][: len(got[1])]
    assert [tokens for i, tokens in enumerate(got) if i != 1] == [t for i, t in enumerate(expected.tokens) if i != 1]
    # What cannot be computed again is never asked to give up its pages.
    assert (preemptions == 0) == (ROUTES[class_name] == "single")


@pytest.mark.parametrize("class_name", ["BloomForCausalLM", "Qwen3NextForCausalLM", "RwkvForCausalLM"])
def test_prefixes_are_shared_where_pages_hold_all_of_them(class_name: str) -> None:
    model, expected = known(class_name)
    with GenerationManager(model, BatchingConfig(page_size=16, max_batch_tokens=64)) as manager:
        for _ in range(2):
            assert serve(manager, expected.prompts[5:6]) == expected.tokens[5:6]
        assert manager.assembly is not None
        shared = manager.assembly.engine.scheduler.pages.prefixes.num_unheld
    assert (shared > 0) == (class_name == "BloomForCausalLM")


def test_a_model_that_sees_later_tokens_is_served_as_generate_serves_it() -> None:
    """It could not be computed again from its tokens, so that it runs row by row, whatever `num_pages` says."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.BertLMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(6)
    expected = reference(model, make_prompts(97, LENGTHS), NEW)
    with GenerationManager(model, BatchingConfig(page_size=16, num_pages=4, max_rows=3)) as manager:
        assert serve(manager, expected.prompts) == expected.tokens
        assert manager.assembly is not None
        assert manager.assembly.forward.route == "single"
        assert manager.assembly.engine.scheduler.preemptions == 0
    assert expected.distinct_tokens > 8


def test_padding_rows_are_not_computed() -> None:
    model, _ = known("BloomForCausalLM")
    forward = CacheForward(model, "padded", False)
    forward.bind(PagedCache(forward.layers, num_pages=1, page_size=16, device=forward.device), TorchBackend())
    state = RowTables(max_rows=2, max_pages_per_row=1, device=forward.device)
    with torch.inference_mode():
        logits = forward(state.decode_inputs(2))
    assert logits.shape == (2, 193)
    assert all(not pages.any() for pages in (*forward._pages.keys, *forward._pages.values))  # type: ignore[union-attr]


def test_what_a_route_cannot_do_is_said() -> None:
    model, _ = known("RwkvForCausalLM")
    with pytest.raises(UnsupportedModelError, match="RwkvForCausalLM is not served: it makes its own cache"):
        CacheForward(model, "padded", False)


def test_the_model_is_left_alone() -> None:
    model, expected = known("Qwen3NextForCausalLM")
    before = (model.generation_config, model.config.to_dict(), model.config._attn_implementation)
    with GenerationManager(model, BatchingConfig(page_size=16)) as manager:
        serve(manager, expected.prompts[:1])
    assert (model.generation_config, model.config.to_dict(), model.config._attn_implementation) == before
    assert model.generation_config is before[0]


def test_sparse_attention_is_checked_where_it_leaves_keys_out() -> None:
    """AXK2's picks other keys for a token at once and one by one: no row of it may be computed again."""
    model = tiny_model("AXK2ForCausalLM", index_topk=90)
    with GenerationManager(model, BatchingConfig(page_size=16)) as manager:
        manager.submit([5, 6, 7], max_new_tokens=2, do_sample=False).result(60)
        assert manager.assembly is not None
        assert manager.assembly.forward.route == "single"
