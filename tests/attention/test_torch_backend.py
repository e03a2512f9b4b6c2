"""The PyTorch kernels against a naive oracle in float64 that knows neither pages nor tiles.

Every slot that no query may see holds NaN: one hidden token that touches a result fails the test.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from hf_async_batching.attention.base import (
    AttentionContext,
    AttentionInputs,
    AttentionOptions,
    DecodeContext,
    MixedContext,
)
from hf_async_batching.attention.select import make_backend
from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache

SCALING = 0.17
PLAIN = AttentionOptions(SCALING)
NUM_PAGES = 80


class Run(NamedTuple):
    """`count` query tokens of a row that holds `before` tokens already."""

    before: int
    count: int


@dataclass
class Case:
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    page_size: int = 16
    shuffled: bool = True
    options: AttentionOptions = PLAIN
    decode: bool = False
    tile_size: int = 1 << 30
    first_pages: tuple[int, ...] = ()


def oracle(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, case: Case) -> torch.Tensor:
    """One query [heads, key_dim] over what it may see, newest last, head by head in float64."""
    window = case.options.sliding_window or len(keys)
    first = max(0, len(keys) - window)
    if case.options.chunk is not None:
        first = (len(keys) - 1) // case.options.chunk * case.options.chunk
    out = []
    for head in range(case.heads):
        group = head // (case.heads // case.kv_heads)
        scores = keys[first:, group].double() @ query[head].double() * case.options.scaling
        if case.options.softcap is not None:
            scores = case.options.softcap * torch.tanh(scores / case.options.softcap)
        weights = torch.exp(scores - scores.max())
        total = weights.sum()
        if case.options.sinks is not None:
            total += torch.exp(case.options.sinks[head].double() - scores.max())
        out.append(weights / total @ values[first:, group].double())
    return torch.stack(out)


def check(case: Case, runs: list[Run], backend: TorchBackend | None = None) -> None:
    """Attend once for every run, in two layers, and compare with the oracle."""
    backend = backend or TorchBackend()
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shape = LayerShape(case.kv_heads, case.key_dim, case.value_dim, torch.float32)
    cache = PagedCache([shape, shape], num_pages=NUM_PAGES, page_size=case.page_size, device=torch.device("cpu"))
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(math.nan)
    free = list(range(1, NUM_PAGES + 1))
    if case.shuffled:
        # Even pages, then odd ones, in no order: no two of a row are neighbours.
        rng.shuffle(free)
        free.sort(key=lambda page: page % 2)
    free = [*case.first_pages, *(page for page in free if page not in case.first_pages)]
    rows = rng.sample(range(1, len(runs) + 3), len(runs))
    table = torch.zeros(len(runs) + 3, 40, dtype=torch.int32)
    histories: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    for row, run in zip(rows, runs, strict=True):
        pages = [free.pop(0) for _ in range(-(-(run.before + run.count) // case.page_size))]
        table[row, : len(pages)] = torch.tensor(pages)
        for layer, history in enumerate(histories):
            keys = rand(run.before, case.kv_heads, case.key_dim)
            values = rand(run.before, case.kv_heads, case.value_dim)
            history.append((keys, values))
            for i in range(run.before):
                slot = pages[i // case.page_size], i % case.page_size
                cache.keys[layer][slot], cache.values[layer][slot] = keys[i], values[i]

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    token_rows = [row for row, run in zip(rows, runs, strict=True) for _ in range(run.count)]
    positions = [run.before + i for run in runs for i in range(run.count)]
    where = table, int32(token_rows), int32(positions)
    context: AttentionContext
    if case.decode:
        assert all(run.count == 1 for run in runs)
        context = DecodeContext(*where, int32(positions) + 1)
    else:
        starts = [sum(run.count for run in runs[:i]) for i in range(len(runs))]
        tiles = [
            (row, start + offset, min(case.tile_size, run.count - offset), run.before + offset)
            for row, start, run in zip(rows, starts, runs, strict=True)
            for offset in range(0, run.count, case.tile_size)
        ]
        tiles.append((0, 0, 0, 0))  # an empty tile is no work
        context = MixedContext(*where, *(int32(list(column)) for column in zip(*tiles, strict=True)), int32([]))

    tokens = len(positions)
    for layer, history in enumerate(histories):
        query = rand(tokens, case.heads, case.key_dim)
        key = rand(tokens, case.kv_heads, case.key_dim)
        value = rand(tokens, case.kv_heads, case.value_dim)
        got = backend.attend(AttentionInputs(query, key, value, layer, context, cache, case.options))
        assert got.shape == (tokens, case.heads, case.value_dim)
        expected = torch.empty(tokens, case.heads, case.value_dim, dtype=torch.float64)
        start = 0
        for run, (keys, values) in zip(runs, history, strict=True):
            all_keys = torch.cat([keys, key[start : start + run.count]])
            all_values = torch.cat([values, value[start : start + run.count]])
            for i in range(run.count):
                end = run.before + i + 1
                expected[start + i] = oracle(query[start + i], all_keys[:end], all_values[:end], case)
            start += run.count
        torch.testing.assert_close(got.double(), expected, atol=3e-6, rtol=3e-5)


DECODE = [Run(0, 1), Run(5, 1), Run(15, 1), Run(16, 1), Run(40, 1)]
MIXED = [Run(9, 1), Run(0, 1), Run(0, 20), Run(16, 18), Run(13, 5), Run(33, 1)]


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "neighbours"])
@pytest.mark.parametrize("window", [None, 1, 7, 16])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_attention(page_size: int, shuffled: bool, window: int | None, softcap: float | None, decode: bool) -> None:
    options = AttentionOptions(SCALING, window, softcap)
    case = Case(page_size=page_size, shuffled=shuffled, options=options, decode=decode)
    check(case, DECODE if decode else MIXED)


@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_chunked_attention(chunk: int, decode: bool) -> None:
    case = Case(options=AttentionOptions(SCALING, chunk=chunk), decode=decode)
    check(case, DECODE if decode else MIXED)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_attention_sinks(window: int | None, softcap: float | None, decode: bool) -> None:
    options = AttentionOptions(SCALING, window, softcap, sinks=torch.linspace(-4, 6, 4))
    check(Case(options=options, decode=decode), DECODE if decode else MIXED)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2), (1, 1)])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_groups_of_heads(heads: int, kv_heads: int, softcap: float | None, decode: bool) -> None:
    case = Case(heads=heads, kv_heads=kv_heads, options=AttentionOptions(SCALING, None, softcap), decode=decode)
    check(case, DECODE if decode else MIXED)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 8), (8, 24)])
def test_values_of_another_size(key_dim: int, value_dim: int, softcap: float | None, decode: bool) -> None:
    options = AttentionOptions(SCALING, None, softcap)
    check(Case(key_dim=key_dim, value_dim=value_dim, options=options, decode=decode), DECODE if decode else MIXED)


@pytest.mark.parametrize("pages", [(1, 9, 3), (5, 4, 3), (2, 3, 5), (7, 8, 9)])
def test_pages_that_look_like_neighbours(pages: tuple[int, ...]) -> None:
    for decode, runs in ((True, [Run(40, 1)]), (False, [Run(35, 6)])):
        check(Case(shuffled=False, first_pages=pages, decode=decode), runs)


@pytest.mark.parametrize("window", [None, 7])
def test_prompts_in_tiles(window: int | None) -> None:
    """The tiles of a piece see what the tiles before them have written."""
    check(Case(tile_size=4, options=AttentionOptions(SCALING, window)), MIXED)


@pytest.mark.parametrize("scaling", [1.0, 0.02])
def test_scaling(scaling: float) -> None:
    for decode in (True, False):
        check(Case(options=AttentionOptions(scaling), decode=decode), DECODE if decode else MIXED)


def test_padding_rows_write_to_the_padding_page_only() -> None:
    shape = LayerShape(1, 4, 4, torch.float32)
    cache = PagedCache([shape], num_pages=2, page_size=16, device=torch.device("cpu"))
    table = torch.tensor([[0, 0], [1, 2]], dtype=torch.int32)
    rows, positions = torch.tensor([1, 0, 0], dtype=torch.int32), torch.tensor([17, 0, 0], dtype=torch.int32)
    context = DecodeContext(table, rows, positions, positions + 1)
    new = torch.ones(3, 1, 4)
    TorchBackend().attend(AttentionInputs(new, new, new, 0, context, cache, AttentionOptions(SCALING)))
    written = cache.keys[0].any(-1)[..., 0].nonzero().tolist()
    assert written == [[0, 0], [2, 1]]


def test_the_result_has_the_dtype_of_the_query() -> None:
    shape = LayerShape(2, 16, 16, torch.bfloat16)
    for softcap in (None, 0.8):
        cache = PagedCache([shape], num_pages=2, page_size=16, device=torch.device("cpu"))
        table, zero = torch.tensor([[0], [1]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        context = DecodeContext(table, zero + 1, zero, zero + 1)
        new = torch.ones(1, 2, 16, dtype=torch.bfloat16)
        out = TorchBackend().attend(
            AttentionInputs(new, new, new, 0, context, cache, AttentionOptions(SCALING, None, softcap))
        )
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, new)


def test_it_serves_the_cpu() -> None:
    assert isinstance(make_backend("auto", torch.device("cpu")), TorchBackend)
    assert isinstance(make_backend("torch", torch.device("cuda")), TorchBackend)
    assert TorchBackend.reads_back, "it must not run inside a CUDA graph"
