"""Which layers share a page, and the memory behind the pages."""

from __future__ import annotations

import pytest
import torch

from hf_async_batching.kv_cache.paged_cache import LayerShape, PagedCache, group_layers

WIDE = LayerShape(2, 8, 8, torch.float32)
NARROW = WIDE._replace(sliding_window=128)


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
    assert (groups.count, groups.kept, groups.window) == (count, kept, window)
    assert len(set(zip(groups.group_of, groups.place_of, strict=True))) == len(shapes), "two layers in one place"
    assert sorted(set(groups.group_of)) == list(range(count))
    if count > 1:
        assert all((shape.sliding_window is None) == (group < kept) for shape, group in zip(shapes, groups.group_of))
    alone = group_layers(shapes, apart=False)
    assert alone.count == 1
    assert alone.page_bytes(shapes, 16) == 16 * sum(shape.bytes_per_token for shape in shapes)
    assert groups.page_bytes(shapes, 16) * count <= 1.2 * alone.page_bytes(shapes, 16)


def test_windows_that_nobody_outgrows_make_no_groups() -> None:
    assert group_layers(layers("nw"), longest=128).count == 1
    assert group_layers(layers("nw"), longest=129).count == group_layers(layers("nw"), longest=None).count == 2


def test_layers_of_several_sizes_share_their_pages() -> None:
    shapes = [WIDE, NARROW._replace(num_kv_heads=4)]
    groups = group_layers(shapes)
    assert (groups.count, groups.kept, groups.window) == (1, 1, None)
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
