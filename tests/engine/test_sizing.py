"""What the automatic settings become."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from hf_async_batching.config import BatchingConfig
from hf_async_batching.engine.sizing import GIB, ResolvedConfig, resolve_config
from hf_async_batching.kv_cache.layer_groups import LayerShape, group_layers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# 2 layers of 2 heads of 8 + 8 numbers of 4 bytes: 256 bytes per token.
LAYERS = [LayerShape(2, 8, 8, torch.float32)] * 2
TOKEN_BYTES = 256


def resolve(
    device: torch.device = CPU, *, context: int | None = 1000, free: int = 64 * GIB, weights: int = 0, **fields: Any
) -> ResolvedConfig:
    return resolve_config(BatchingConfig(**fields), LAYERS, context, device, free, weights)


def test_pages_are_shared_by_default() -> None:
    assert BatchingConfig().prefix_cache
    assert not resolve(prefix_cache=False).settings.prefix_cache


def test_choices_on_the_cpu() -> None:
    chosen = resolve(CPU)
    assert (chosen.depth, chosen.page_size, chosen.max_rows, chosen.max_batch_tokens) == (1, 256, 32, 256)
    assert chosen.max_sequence_length == 1000
    assert chosen.pages_per_row == 4
    assert chosen.num_pages == 4 * 32, "more could never be filled"
    assert chosen.settings.memory_fraction == 0.25


def test_choices_on_cuda() -> None:
    chosen = resolve(CUDA)
    assert (chosen.depth, chosen.page_size, chosen.max_rows, chosen.max_batch_tokens) == (2, 32, 256, 8192)
    assert chosen.pages_per_row == 32
    assert chosen.num_pages == 32 * 256
    assert chosen.settings.memory_fraction == 0.92
    assert chosen.settings.compile is chosen.settings.fuse_weights is True


def test_steps_of_large_models_take_fewer_prompt_tokens() -> None:
    assert resolve(CUDA, weights=16 * GIB).max_batch_tokens == 2048
    assert resolve(CUDA, weights=4 * GIB).max_batch_tokens == 4096
    assert resolve(CUDA, weights=16 * GIB, max_rows=3000).max_batch_tokens == 3000


def test_the_cache_takes_nine_tenths_of_what_the_weights_leave() -> None:
    """The card has 80 GiB; the weights take 15 GiB and torch itself takes half of one."""
    chosen = resolve(CUDA, context=1 << 20, free=80 * GIB - 15 * GIB - GIB // 2, weights=15 * GIB)
    assert chosen.num_pages * 32 * TOKEN_BYTES >= 0.9 * 65 * GIB


def test_small_cards_keep_room_for_the_steps() -> None:
    free = 6 * GIB
    chosen = resolve(CUDA, context=1 << 20, free=free)
    assert 1.4 * GIB < free - chosen.num_pages * 32 * TOKEN_BYTES < 1.6 * GIB
    asked = resolve(CUDA, context=1 << 20, free=free, memory_fraction=0.95)
    assert free - asked.num_pages * 32 * TOKEN_BYTES < 0.4 * GIB, "who asks for more gets it"


def test_what_is_for_cuda_only_by_default() -> None:
    assert resolve(CPU).settings.compile is resolve(CPU).settings.fuse_weights is False
    chosen = resolve(CPU, compile=True, fuse_weights=True).settings
    assert chosen.compile is chosen.fuse_weights is True
    chosen = resolve(CUDA, compile=False, fuse_weights=False).settings
    assert chosen.compile is chosen.fuse_weights is False


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_what_is_given_stays(device: torch.device) -> None:
    given = {
        "depth": 3,
        "page_size": 32,
        "max_rows": 5,
        "max_batch_tokens": 7,
        "max_sequence_length": 90,
        "num_pages": 11,
        "memory_fraction": 0.5,
        "compile": True,
        "fuse_weights": False,
    }
    config = BatchingConfig(**given)  # type: ignore[arg-type]
    chosen = resolve_config(config, LAYERS, 1000, device, 64 * GIB)
    assert chosen.settings == config
    for name, value in given.items():
        assert getattr(chosen.settings, name) == value
        if name not in ("memory_fraction", "compile", "fuse_weights"):
            assert getattr(chosen, name) == value
    assert chosen.pages_per_row == 3


def test_the_budget_and_the_rows_follow_each_other() -> None:
    assert resolve(CUDA, max_rows=4000, weights=16 * GIB).max_batch_tokens == 4000
    assert resolve(CUDA, max_rows=3, weights=16 * GIB).max_batch_tokens == 2048
    assert resolve(CUDA, max_batch_tokens=20).max_rows == 20
    assert resolve(CUDA, max_batch_tokens=9000).max_rows == 256


def test_pages_of_groups_of_layers() -> None:
    """A page holds one of two layers: twice as many fit, and what is given counts pages of both."""
    layers = [LAYERS[0], LAYERS[0]._replace(sliding_window=128)]
    groups, page = group_layers(layers), 256 * TOKEN_BYTES // 2

    def resolved(free: int, **fields: Any) -> ResolvedConfig:
        return resolve_config(BatchingConfig(**fields), layers, 1000, CPU, free, groups=groups)

    chosen = resolved(4 * 21 * page)
    assert (chosen.num_pages, chosen.max_sequence_length, chosen.settings.num_pages) == (20, 1000, 10)
    assert resolved(64 * GIB).num_pages == 2 * resolve().num_pages
    given = resolved(64 * GIB, num_pages=3)
    assert (given.num_pages, given.max_sequence_length, given.settings.num_pages) == (6, 768, 3)
    with pytest.raises(ValueError, match="at least one page"):
        resolved(4 * 2 * page)


def test_pages_that_memory_allows() -> None:
    page = 256 * TOKEN_BYTES
    # A quarter of what is free; one page more is needed for padding.
    assert resolve(free=4 * 21 * page).num_pages == 20
    assert resolve(free=4 * 21 * page - 1).num_pages == 19
    assert resolve(free=20 * page, memory_fraction=0.5).num_pages == 9


def test_one_request_cannot_outgrow_the_cache() -> None:
    chosen = resolve(free=4 * 3 * 256 * TOKEN_BYTES)
    assert chosen.num_pages == 2
    assert chosen.max_sequence_length == 512
    assert chosen.settings.max_sequence_length == 1000
    assert resolve(num_pages=1, page_size=16).max_sequence_length == 16


def test_memory_for_less_than_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs at least one page of .* GiB, and 25% of .* `memory_fraction`"):
        resolve(free=4 * 2 * 256 * TOKEN_BYTES - 1)
    assert resolve(free=4 * 2 * 256 * TOKEN_BYTES).num_pages == 1


def test_an_unknown_context_length() -> None:
    assert resolve(context=None).max_sequence_length == 4096


def test_choices_are_logged_with_their_reasons(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_async_batching")
    resolve(CPU, depth=2)
    lines = [record.getMessage() for record in caplog.records]
    assert "page_size = 256 (default on CPU)" in lines
    assert "max_sequence_length = 1000 (context length)" in lines
    assert "num_pages = 128 (32 rows of 1000 tokens)" in lines
    assert not any(line.startswith("depth") for line in lines), "it was given"
    caplog.clear()
    resolve(CPU, context=None, free=GIB // 512)
    lines = [record.getMessage() for record in caplog.records]
    assert "max_sequence_length = 4096 (unknown)" in lines
    assert any(line.startswith("num_pages = 7 (25% of 0.0 GiB free at 64 KiB a page") for line in lines)


def test_a_resolved_config_reads_well() -> None:
    text = str(resolve())
    assert "depth=1, page_size=256" in text
    assert "settings" not in text


# -- snapshots of states ----------------------------------------------------------------------------------------------


def with_states(free: int = 64 * GIB, state: int = 1 << 20, snapshots: bool = True, **fields: Any) -> ResolvedConfig:
    return resolve_config(
        BatchingConfig(max_rows=16, page_size=16, memory_fraction=1.0, **fields), LAYERS, 1 << 20, CPU, free, 0, state,
        snapshots=snapshots,
    )  # fmt: skip


def test_each_row_has_a_few_places_for_snapshots() -> None:
    assert with_states().num_snapshots == 4 * 16


@pytest.mark.parametrize("without", [{"snapshots": False}, {"prefix_cache": False}, {"state": 0}], ids=str)
def test_who_has_no_snapshots(without: dict[str, Any]) -> None:
    assert with_states(**without).num_snapshots == 0


def test_snapshots_take_a_part_of_what_rows_leave_and_pages_the_rest() -> None:
    mib = 1 << 20
    chosen = with_states(free=(17 + 80) * mib)
    assert chosen.num_snapshots == 20
    assert chosen.num_pages == 60 * mib // (16 * TOKEN_BYTES) - 1
    assert with_states(free=(17 + 2) * mib).num_snapshots == 0


def test_pages_that_were_asked_for_come_before_snapshots() -> None:
    mib = 1 << 20
    for pages, snapshots in ((60, 20), (70, 10), (85, 0)):
        chosen = with_states(free=(17 + 80) * mib, num_pages=pages * mib // (16 * TOKEN_BYTES))
        assert chosen.num_snapshots == snapshots
