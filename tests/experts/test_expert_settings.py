"""Block sizes by rule fit the card, and the fixed grid holds every routing."""

from __future__ import annotations

import pytest

from hf_async_batching.experts.settings import block_m, default_setting, first_tokens, most_blocks, shared_memory

SHAPES = [(128, 2048, 768, 8), (32, 2880, 2880, 4), (64, 2048, 1408, 6), (8, 4096, 14336, 2), (512, 2048, 512, 10)]


@pytest.mark.parametrize("memory", [64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("tokens", [1, 8, 32, 256, 2048])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_settings_fit_the_card(memory: int, tokens: int, itemsize: int, gated: bool, packed: bool) -> None:
    for experts, hidden, inner, choices in SHAPES:
        setting = default_setting(
            tokens * choices, experts, hidden, inner, itemsize, memory, gated=gated, packed=packed
        )
        size = setting.block_m
        assert shared_memory(size, setting.up, itemsize, gated=gated, packed=packed) <= memory
        assert shared_memory(size, setting.down, itemsize, gated=False, packed=packed) <= memory
        assert min(setting.up.stages, setting.down.stages) >= 2


def test_a_block_holds_most_experts_tokens() -> None:
    assert block_m(8, 128) == block_m(256, 128) == block_m(1, 1) == 16
    assert block_m(2048, 128) == 32
    assert block_m(1024, 32) == block_m(10**6, 8) == 64


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("experts", [1, 3, 128])
@pytest.mark.parametrize("assignments", [1, 2, 17, 64, 300])
def test_the_grid_holds_the_worst_routing(assignments: int, experts: int, size: int) -> None:
    # As many experts as can be hit by one assignment; the rest is one expert's, one more than full blocks.
    hit = min(assignments, experts)
    for more in range(assignments - hit + 1):
        counts = [1] * (hit - 1) + [1 + more]
        assert sum(-(-count // size) for count in counts) <= most_blocks(assignments, experts, size)


@pytest.mark.parametrize(("experts", "choices"), [(8, 2), (32, 4), (128, 8), (512, 10), (1, 1)])
def test_the_first_tokens_reach_each_size_of_a_block(experts: int, choices: int) -> None:
    tokens = first_tokens(experts, choices)
    assert [block_m(count * choices, experts) for count in tokens] == [16, 32, 64]
    assert all(block_m((count - 1) * choices, experts) < block_m(count * choices, experts) for count in tokens[1:])
    tokens = first_tokens(experts, choices, packed=True)
    assert [block_m(count * choices, experts, packed=True) for count in tokens] == [16, 32, 64, 128]
