"""Rows in pages and tables, as the cache object of a family sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, cache_utils

from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.model.forward.row_cache import RowCache

PAGE = 16
HEADS, DIM, DIM_V = 2, 4, 6


def made(*layers: Any) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(layers)
    cache.layer_class_to_replicate = None
    return cache


def kv(batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, count, DIM), torch.randn(batch, HEADS, count, DIM_V)


class Rows:
    """Rows 1 and 2 of a cache with one attention layer, beside what each should hold."""

    def __init__(self, make_layer: Any, **more: Any) -> None:
        torch.manual_seed(0)
        used = made(make_layer())
        used.update(*kv(1, 3), 0)
        self.rows = RowCache(made(make_layer()), used, 3)
        self.pages = PagedCache(self.rows.shapes, num_pages=8, page_size=PAGE, device=torch.device("cpu"))
        for tensor in (*self.pages.keys, *self.pages.values):
            tensor.fill_(torch.nan)  # what no step wrote must not be seen
        self.table = torch.tensor([[0, 0], [3, 1], [2, 5]], dtype=torch.int32)
        self.rows.allocate(3)
        self.held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {
            row: tuple(tensor[0, :, :0] for tensor in kv(1, 0))  # type: ignore[misc]
            for row in (1, 2)
        }

    def step(self, rows: list[int], count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Compute `count` tokens of these rows together; what the model sees, by row, without padding."""
        index, starts = torch.tensor(rows), [self.held[row][0].shape[1] for row in rows]
        step = self.rows.load(index, starts, self.table, self.pages)
        new = kv(len(rows), count)
        seen = step.cache.update(*new, 0)
        self.rows.store(step, index, starts, self.table, self.pages)
        out = []
        for i, row in enumerate(rows):
            self.held[row] = tuple(  # type: ignore[assignment]
                torch.cat([old, tensor[i]], 1) for old, tensor in zip(self.held[row], new, strict=True)
            )
            assert all(tensor.isfinite().all() for tensor in seen), "what no step wrote is seen"
            out.append(tuple(tensor[i] for tensor in seen))
        return out  # type: ignore[return-value]


def test_rows_of_different_lengths() -> None:
    rows = Rows(cache_utils.DynamicLayer)
    rows.step([1], 20)
    rows.step([2], 5)
    for chosen in ([1, 2], [2, 1], [2], [1, 2]):
        seen = rows.step(chosen, 1)
        longest = max(rows.held[row][0].shape[1] for row in chosen)
        for row, tensors in zip(chosen, seen, strict=True):
            length = rows.held[row][0].shape[1]
            for got, want in zip(tensors, rows.held[row], strict=True):
                assert got.shape[1] == longest
                assert torch.equal(got[:, longest - length :], want)
    rows.step([2], 7)
    assert rows.held[2][0].shape[1] == 16


@pytest.mark.parametrize("first", [3, 11, 25])
def test_sliding_layers_get_their_window(first: int) -> None:
    window = 8
    rows = Rows(lambda: cache_utils.DynamicSlidingWindowLayer(sliding_window=window))
    rows.step([1], first)
    rows.step([2], 2)
    plain = cache_utils.DynamicSlidingWindowLayer(sliding_window=window)
    plain.update(*(tensor[None] for tensor in rows.held[1]))
    for _ in range(5):
        seen = rows.step([1, 2], 1)[0]
        want = plain.update(*(tensor[None, :, -1:] for tensor in rows.held[1]))
        for got, expected in zip(seen, want, strict=True):
            assert torch.equal(got, expected[0])


def test_states_of_rows() -> None:
    def layer() -> Any:
        return cache_utils.LinearAttentionLayer()

    used = made(layer())
    used.update_conv_state(torch.randn(1, 5, 4), 0)
    used.update_recurrent_state(torch.randn(1, 2, 3, 3), 0)
    rows = RowCache(made(layer()), used, 3)
    assert rows.state_bytes > 0
    assert not rows.shapes
    assert rows.state_bytes == 4 * (5 * 4 + 2 * 3 * 3)
    rows.allocate(4)
    pages, table = PagedCache([], num_pages=1, page_size=PAGE, device=torch.device("cpu")), torch.zeros(4, 1)
    expected: dict[int, torch.Tensor] = {}
    for row in (3, 1):
        step = rows.load(torch.tensor([row]), [0], table, pages)
        assert not step.cache.has_previous_state(), "a row starts from nothing"
        step.cache.update_conv_state(torch.randn(1, 5, 4), 0)
        expected[row] = torch.randn(1, 2, 3, 3)
        step.cache.update_recurrent_state(expected[row], 0)
        rows.store(step, torch.tensor([row]), [0], table, pages)
    step = rows.load(torch.tensor([1, 3]), [9, 4], table, pages)
    assert step.cache.has_previous_state()
    assert torch.equal(step.cache.layers[0].recurrent_states[0], torch.cat([expected[1], expected[3]]))
    step.cache.update_recurrent_state(torch.zeros(2, 2, 3, 3), 0)
    again = rows.load(torch.tensor([1, 3]), [9, 4], table, pages)
    assert torch.equal(again.cache.layers[0].recurrent_states[0], torch.cat([expected[1], expected[3]])), "not stored"


def test_caches_that_are_not_known_are_refused() -> None:
    class Own(cache_utils.DynamicLayer):
        pass

    used = made(Own())
    used.update(*kv(1, 3), 0)
    with pytest.raises(UnsupportedModelError, match="layers of the class Own"):
        RowCache(made(Own()), used, 3)
    with pytest.raises(UnsupportedModelError, match="keeps its state in a list"):
        RowCache([], [], 3)
    used = made(cache_utils.DynamicLayer())
    used.update(*kv(1, 5), 0)
    with pytest.raises(UnsupportedModelError, match="other entries than the tokens"):
        RowCache(made(cache_utils.DynamicLayer()), used, 3)


def test_two_writes_in_a_step_are_refused() -> None:
    rows = Rows(cache_utils.DynamicLayer)
    step = rows.rows.load(torch.tensor([1]), [0], rows.table, rows.pages)
    step.cache.update(*kv(1, 2), 0)
    with pytest.raises(UnsupportedModelError, match="more than once"):
        step.cache.update(*kv(1, 2), 0)
