"""The memory behind the pages."""

from __future__ import annotations

import torch

from hf_async_batching.kv_cache.layer_groups import LayerShape, group_layers
from hf_async_batching.kv_cache.paged_cache import PagedCache

WIDE = LayerShape(2, 8, 8, torch.float32)
NARROW = WIDE._replace(sliding_window=128)


def layers(pattern: str) -> list[LayerShape]:
    """`w` sees all, `n` a window of 128."""
    return [{"w": WIDE, "n": NARROW}[letter] for letter in pattern]


def test_layers_of_several_sizes_share_their_pages() -> None:
    shapes = [WIDE, NARROW._replace(num_kv_heads=4)]
    groups = group_layers(shapes)
    assert (groups.count, groups.full_attention_groups, groups.window) == (1, 1, None)
    cache = PagedCache(shapes, num_pages=3, page_size=16, device=torch.device("cpu"), groups=groups)
    assert [tuple(keys.shape) for keys in cache.keys] == [(4, 16, 2, 8), (4, 16, 4, 8)]
    assert cache.group_of is None


def test_no_layers() -> None:
    groups = group_layers([])
    assert (groups.count, groups.window) == (1, None)
    assert PagedCache([], num_pages=3, page_size=16, device=torch.device("cpu"), groups=groups).num_bytes == 0


def test_groups_share_memory() -> None:
    """Layers of one place are one tensor: each group has other pages of it."""
    shapes = layers("nwnw")
    groups = group_layers(shapes)
    cache = PagedCache(shapes, num_pages=7, page_size=16, device=torch.device("cpu"), groups=groups)
    assert cache.group_of == [1, 0, 1, 0]
    for tensors in (cache.keys, cache.values):
        assert tensors[0] is tensors[1]
        assert tensors[2] is tensors[3]
        assert tensors[0] is not tensors[2]
    plain = PagedCache(shapes, num_pages=7, page_size=16, device=torch.device("cpu"))
    assert plain.num_bytes == 2 * cache.num_bytes == 4 * 2 * 8 * 16 * 2 * 8 * 4
    assert len({id(keys) for keys in plain.keys}) == 4
