"""Which layers share a page. In whole models, pages of layers with a window are freed while the others stay."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from support.tiny_models import greedy_alone, tiny_model

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.core.plan import NewPage, Plan
from hf_async_batching.core.step_layout import Sections
from hf_async_batching.coverage import families
from hf_async_batching.kv_cache.layer_groups import LayerShape, group_layers
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.runner.staging import encode

WIDE = LayerShape(2, 8, 8, torch.float32)
NARROW = WIDE._replace(sliding_window=128)


NEW = 90
PROMPTS = [[5 + i % 60 for i in range(length)] for length in (3, 40, 70)]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


def layers(pattern: str) -> list[LayerShape]:
    """`w` sees all, `n` a window of 128, `N` one of 512."""
    return [{"w": WIDE, "n": NARROW, "N": NARROW._replace(sliding_window=512)}[letter] for letter in pattern]


@pytest.mark.parametrize(
    ("pattern", "count", "kept", "window"),
    [
        ("wwww", 1, 1, None),
        ("nnnn", 1, 0, 128),
        ("nNnn", 1, 0, 512),
        ("nwnwnw", 2, 1, 128),  # Gemma-2, GPT-OSS
        ("nNnwnN", 6, 1, 512),
        ("nnnnnw" * 4 + "nn", 7, 1, 128),  # Gemma-3: 4 and 22, two places of 28 empty
        ("wwwn", 4, 3, 128),
        ("w" * 20 + "n", 1, 1, None),  # too many tables
        ("wwwwn", 1, 1, None),  # little to gain
        ("nnnww", 1, 1, None),  # a quarter of the memory would be empty
    ],
)
def test_groups(pattern: str, count: int, kept: int, window: int | None) -> None:
    shapes = layers(pattern)
    groups = group_layers(shapes)
    assert (groups.count, groups.full_attention_groups, groups.window) == (count, kept, window)
    assert len(set(zip(groups.group_of, groups.place_of, strict=True))) == len(shapes), "two layers in one place"
    assert sorted(set(groups.group_of)) == list(range(count))
    if count > 1:
        assert all((shape.sliding_window is None) == (group < kept) for shape, group in zip(shapes, groups.group_of))
    alone = group_layers(shapes, apart=False)
    assert alone.count == 1
    assert alone.page_bytes(shapes, 16) == 16 * sum(shape.bytes_per_token for shape in shapes)
    assert groups.page_bytes(shapes, 16) * count <= 1.2 * alone.page_bytes(shapes, 16)


def test_there_are_at_most_16_groups() -> None:
    assert group_layers(layers("n" * 15 + "w")).count == 16
    assert group_layers(layers("n" * 16 + "w")).count == 1


def test_windows_that_nobody_outgrows_make_no_groups() -> None:
    assert group_layers(layers("nw"), longest=128).count == 1
    assert group_layers(layers("nw"), longest=129).count == group_layers(layers("nw"), longest=None).count == 2


# -- whole models -------------------------------------------------------------------------------------------------


def gpt_oss() -> Any:
    return families.tiny_model("GptOssForCausalLM", sliding_window=16)


@pytest.mark.parametrize(("make", "groups", "depth"), [("Gemma3Text", 6, 2), ("Gemma2", 2, 1), (gpt_oss, 2, 2)])
def test_pages_go_and_tokens_stay(make: Any, groups: int, depth: int) -> None:
    model = tiny_model(make) if isinstance(make, str) else make()
    expected = [greedy_alone(model, prompt, NEW, eos_token_id=None) for prompt in PROMPTS]
    config = BatchingConfig(page_size=16, num_pages=40, depth=depth, debug=True, prefix_cache=False)
    with GenerationManager(model, config) as manager:
        handles = [manager.submit(prompt, max_new_tokens=NEW, **GREEDY) for prompt in PROMPTS]
        held = 0
        while not all(handle.done for handle in handles):
            held = max(held, manager.stats().pages_in_use)
            time.sleep(0.002)
        assert [handle.result().token_ids for handle in handles] == expected
        assert manager.stats().pages_total == 40 * groups
        # All of the pages that see everything; of each other group those of a window, and one that is being filled.
        whole = sum(-(-(len(prompt) + NEW) // 16) for prompt in PROMPTS)
        assert held <= whole + (groups - 1) * 3 * len(PROMPTS) + (groups - 1) * 5
        assert held < 0.75 * whole * groups
        assert manager.stats().pages_in_use == 0


def test_the_triton_kernels_read_each_groups_table() -> None:
    pytest.importorskip("triton")
    model = tiny_model("Gemma2", num_hidden_layers=2)
    prompt = PROMPTS[1][:18]
    expected = greedy_alone(model, prompt, 3, eos_token_id=None)
    config = BatchingConfig(page_size=16, num_pages=6, max_rows=2, attention_backend="triton", attach_check=False)
    with GenerationManager(model, config) as manager:
        first = manager.submit(prompt, max_new_tokens=3, **GREEDY)
        assert first.result(200).token_ids == expected
        # Behind the pages that the first one left, with page numbers out of order.
        again = manager.submit(prompt, max_new_tokens=3, **GREEDY)
        assert again.result(200).token_ids == expected
        assert again.result().metrics.cached_prompt_tokens == 16


def test_a_long_generation_fits_in_memory_that_could_not_hold_all_of_its_pages() -> None:
    """Two requests of 160 tokens, 10 pages of each of 6 groups, in 72 pages of a group; all kept they would be 120."""
    model = tiny_model("Gemma3Text")
    config = BatchingConfig(page_size=16, num_pages=12, debug=True)
    with GenerationManager(model, config) as manager:
        handles = [manager.submit([9, 10 + i], max_new_tokens=158, **GREEDY) for i in range(2)]
        for i, handle in enumerate(handles):
            assert handle.result(120).token_ids == greedy_alone(model, [9, 10 + i], 158, eos_token_id=None)
        assert manager.stats().preemptions == 0


def test_entries_go_to_the_tables_of_their_groups() -> None:
    state = RowTables(max_rows=2, max_pages_per_row=4, device=torch.device("cpu"), groups=3)
    pages = tuple(
        NewPage(row, ordinal, 10 * row + ordinal) for row, ordinal in ((1, 0), (1, 1), (1, 2), (2, 5), (2, 3))
    )
    limits = Sections.largest(max_rows=2, max_batch_tokens=4, num_pages=12)
    array = torch.zeros(limits.total, dtype=torch.int32)
    sections = encode(Plan(0, (), new_pages=pages), array.numpy(), bucket=0, send_decode_rows=False, tile_size=4)
    state.apply_updates(array, sections)
    assert state.page_table[:, 1, 0].tolist() == [10, 11, 12]
    assert state.page_table[:, 2, 1].tolist() == [23, 0, 25]
    assert int(state.page_table.sum()) == 10 + 11 + 12 + 23 + 25


def test_every_groups_table_begins_on_16_bytes() -> None:
    state = RowTables(max_rows=256, max_pages_per_row=63, device=torch.device("cpu"), groups=3)
    assert state.page_table.shape == (3, 257, 64)
    assert {table.data_ptr() % 16 for table in state.page_table} == {state.page_table.data_ptr() % 16}
