"""The Triton kernels against a naive oracle in float64: on the GPU where there is one, else in Triton's interpreter.

Every cache is full of NaN but for the tokens that a query may see, and page tables point to NaN beyond them: a kernel
that lets one hidden token touch the result fails.
"""

import importlib.util
import math
import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so it comes before the kernels
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton.language as tl

if not torch.cuda.is_available() and "Interpreted" not in type(tl.sum).__name__:
    pytest.skip("triton was imported before TRITON_INTERPRET=1 was set: set it in conftest", allow_module_level=True)

from support.interpreter import widen_bfloat16_products

from hf_async_batching.attention import triton_kernels as kernels
from hf_async_batching.attention.triton_kernels import DecodeConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = kernels.PREFILL_TILE
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
SCALING = 0.17
POISON_PAGE = 1

# Triton 3.9 announces a change of a compiler default that makes no difference here.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.fixture(autouse=True)
def bfloat16_products_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        widen_bfloat16_products(monkeypatch)


def queries(tokens: int, heads: int, size: int, dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    """Random queries [tokens, heads, size] with NaN between the heads and after the last one."""
    padded = torch.full((tokens, heads + 1, 2 * size), math.nan, dtype=dtype, device=DEVICE)
    padded[:, :heads, :size] = (torch.randn(tokens, heads, size) * spread).to(dtype)
    return padded[:, :heads, :size]


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Cache:
    """The pages of rows 1, 2, … that hold `lengths` tokens each, in shuffled order; row 0 is the padding row."""

    def __init__(
        self,
        lengths: list[int],
        *,
        kv_heads: int = 1,
        head_dim: int = 64,
        head_dim_v: int | None = None,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        torch.manual_seed(seed)
        self.page_size, self.kv_heads, self.dtype = page_size, kv_heads, dtype
        per_row = [-(-length // page_size) for length in lengths]
        ids = (2 + torch.randperm(sum(per_row))).tolist()
        head_dim_v = head_dim_v or head_dim
        pages = len(ids) + 2
        self.key = torch.full((pages, page_size, kv_heads, head_dim), math.nan, dtype=dtype)
        self.value = torch.full((pages, page_size, kv_heads, head_dim_v), math.nan, dtype=dtype)
        self.table = torch.full((len(lengths) + 1, max(per_row) + 2), POISON_PAGE, dtype=torch.int32)
        self.table[0] = 0
        self.keys, self.values = [torch.zeros(0, kv_heads, head_dim)], [torch.zeros(0, kv_heads, head_dim_v)]
        for row, (length, count) in enumerate(zip(lengths, per_row, strict=True), start=1):
            self.table[row, :count] = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int32)
            self.keys.append(torch.randn(length, kv_heads, head_dim).to(dtype))
            self.values.append((torch.randn(length, kv_heads, head_dim_v) + 0.5).to(dtype))
            position = torch.arange(length)
            page = self.table[row].long()[position // page_size]
            self.key[page, position % page_size] = self.keys[row]
            self.value[page, position % page_size] = self.values[row]
        self.key, self.value, self.table = self.key.to(DEVICE), self.value.to(DEVICE), self.table.to(DEVICE)

    def release(self, row: int, visible_from: int) -> None:
        """Hides all tokens before the window: whole pages go to the poison page, the rest becomes NaN."""
        whole = visible_from // self.page_size
        page, slots = self.table[row, whole].item(), visible_from % self.page_size
        self.table[row, :whole] = POISON_PAGE
        self.key[page, :slots] = math.nan
        self.value[page, :slots] = math.nan

    def attend(
        self,
        query: torch.Tensor,
        row: int,
        position: int,
        window: int | None,
        softcap: float | None,
        chunk: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The oracle: one query [num_heads, head_dim] at one position."""
        begin = visible_from(position, window, chunk)
        group = query.shape[0] // self.kv_heads
        keys = self.keys[row][begin : position + 1].double().repeat_interleave(group, 1)
        values = self.values[row][begin : position + 1].double().repeat_interleave(group, 1)
        scores = torch.einsum("hd,jhd->hj", query.cpu().double(), keys) * SCALING
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.cpu().double()[:, None]], 1)
        return torch.einsum("hj,jhd->hd", scores.softmax(-1)[:, : len(values)], values)


def visible_from(position: int, window: int | None, chunk: int | None) -> int:
    if chunk is not None:
        return position - position % chunk
    return 0 if window is None else max(0, position - window + 1)


def some_sinks(heads: int, dtype: torch.dtype) -> torch.Tensor:
    """From one that hardly counts to one that outweighs all keys."""
    return torch.linspace(-4, 6, heads, device=DEVICE).to(dtype)


def check(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Each head of each query by itself, so that a wrong one can't hide in the norm of the others."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    actual = actual.cpu().double()
    assert actual.isfinite().all()
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    assert error.max() < TOLERANCE[dtype], f"relative error {error.max():.2e}"


def config(
    splits: int, *, tokens_per_split: int = 1, fused: bool = True, size: int = 64, group: int = 1,
    dtype: torch.dtype = torch.float32,
) -> DecodeConfig:  # fmt: skip
    """The rule's block sizes; contexts are split however short they are, unless told."""
    sizes = kernels.decode_block_sizes(size, size, group, dtype)
    return DecodeConfig(splits, sizes.n, sizes.warps, sizes.stages, tokens_per_split, fused)


def zero_counters() -> torch.Tensor:
    return int32([0] * 64)


def check_decode(
    cache: Cache,
    contexts: list[int],
    group: int,
    *,
    splits: int | None = None,
    fused: bool = True,
    tokens_per_split: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    with_sinks: bool = False,
    spread: float = 1.0,
) -> None:
    """Decodes rows 1, 2, … in reverse order behind a padding entry; `spread` makes the scores larger."""
    rows = [0, *range(len(contexts), 0, -1)]
    lengths = [0, *reversed(contexts)]
    heads, size = group * cache.kv_heads, cache.key.shape[3]
    query = queries(len(rows), heads, size, cache.dtype, spread)
    expected = torch.zeros(len(rows), heads, cache.value.shape[3], dtype=torch.float64)
    sinks = some_sinks(heads, cache.dtype) if with_sinks else None
    for entry, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if length:
            expected[entry] = cache.attend(query[entry], row, length - 1, window, softcap, chunk, sinks)
            cache.release(row, visible_from(length - 1, window, chunk))
    chosen = None
    if splits is not None:
        chosen = config(
            splits, tokens_per_split=tokens_per_split, fused=fused, size=size, group=group, dtype=cache.dtype
        )
    counters, out = zero_counters(), torch.full(expected.shape, math.nan, dtype=cache.dtype, device=DEVICE)
    actual = kernels.decode_attention(
        query, cache.key, cache.value, cache.table, int32(rows), int32(lengths),
        scaling=SCALING, sliding_window=window, softcap=softcap, chunk=chunk, sinks=sinks, config=chosen,
        counters=counters, out=out,
    )  # fmt: skip
    assert actual is out
    assert (actual[0] == 0).all()
    check(actual, expected, cache.dtype)
    assert not counters.any(), "the next launch needs zeros"

    # The same where the launch itself writes the last tokens, which are not in their pages yet.
    page_size = cache.key.shape[1]
    slots = [(int(cache.table[row, (n - 1) // page_size]), (n - 1) % page_size) for row, n in zip(rows, lengths)]
    pages, offsets = (torch.tensor(index, device=DEVICE) for index in zip(*slots[1:], strict=True))
    written = cache.key.clone(), cache.value.clone()
    nan = torch.full_like(cache.key[:1, 0], math.nan), torch.full_like(cache.value[:1, 0], math.nan)
    new = tuple(torch.cat([n, c[pages, offsets]]) for n, c in zip(nan, written, strict=True))
    cache.key[pages, offsets] = cache.value[pages, offsets] = math.nan
    actual = kernels.decode_attention(
        query, cache.key, cache.value, cache.table, int32(rows), int32(lengths),
        scaling=SCALING, sliding_window=window, softcap=softcap, chunk=chunk, sinks=sinks, config=chosen,
        counters=counters, new=new,
    )  # fmt: skip
    assert (actual[0] == 0).all(), "the padding entry's new token is not used"
    check(actual, expected, cache.dtype)
    for before, after in zip(written, (cache.key, cache.value), strict=True):
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), "each token in its slot, and no other"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "group", "kv_heads", "page_size"),
    [
        (64, 64, 1, 2, 16),
        (64, 80, 3, 1, 32),
        (80, 80, 4, 1, 256),
        (96, 96, 8, 1, 16),
        (128, 128, 4, 2, 16),
        (192, 128, 1, 1, 64),
        (256, 256, 3, 1, 256),
        (24, 24, 40, 2, 16),
    ],
)
def test_decode_shapes(
    head_dim: int, head_dim_v: int, group: int, kv_heads: int, page_size: int, dtype: torch.dtype
) -> None:
    contexts = [1, page_size, page_size + 1, 3 * page_size - 1 if page_size < 256 else 300]
    cache = Cache(
        contexts, kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim_v, page_size=page_size, dtype=dtype
    )
    check_decode(cache, contexts, group, splits=1 if group == 3 else 2)


def test_decode_float16() -> None:
    check_decode(Cache([40, 7], dtype=torch.float16), [40, 7], 4, splits=2)


@pytest.mark.parametrize("splits", [1, 2, 5, 16])  # the last: more than the longest context has blocks
@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize("fused", [True, False])
def test_decode_splits_and_windows(splits: int, window: int | None, fused: bool) -> None:
    contexts = [1, 16, 33, 140]
    check_decode(Cache(contexts, head_dim=16, page_size=16), contexts, 2, splits=splits, window=window, fused=fused)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("chunk", [1, 16, 24, 150])
def test_decode_chunks(splits: int, chunk: int) -> None:
    contexts = [1, 2, 16, 24, 25, 129, 200]
    check_decode(Cache(contexts, head_dim=16), contexts, 2, splits=splits, chunk=chunk)


@pytest.mark.parametrize(("splits", "fused"), [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 2.0)])
def test_decode_sinks(splits: int, fused: bool, window: int | None, softcap: float | None) -> None:
    contexts = [1, 16, 200]
    cache = Cache(contexts, kv_heads=2, head_dim=16)
    check_decode(cache, contexts, 3, splits=splits, fused=fused, window=window, softcap=softcap, with_sinks=True)


def test_decode_sinks_of_bfloat16_and_many_heads() -> None:
    cache = Cache([100, 3], head_dim=64, dtype=torch.bfloat16)
    check_decode(cache, [100, 3], 40, splits=2, with_sinks=True)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("window", [None, 100])
def test_decode_splits_no_further_than_told(fused: bool, window: int | None) -> None:
    contexts = [20, 100, 200, 330]
    cache = Cache(contexts, head_dim=16)
    check_decode(cache, contexts, 2, splits=5, tokens_per_split=96, fused=fused, window=window)


def test_decode_of_short_contexts_leaves_the_partial_results_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of splits that a context is too short for do nothing, and the only one writes the output itself."""
    partial = []
    original = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        made = original(self, *arguments, **options)
        if options.get("dtype") == torch.float32:
            partial.append(made.fill_(math.nan))
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    contexts = [20, 64]
    cache = Cache(contexts, head_dim=16)
    for tokens_per_split, touched in ((64, False), (32, True)):
        partial.clear()
        check_decode(cache, contexts, 2, splits=5, tokens_per_split=tokens_per_split)
        assert len(partial) == 4, "partial results and their log-sums, of two launches"
        assert any(tensor.isfinite().any() for tensor in partial) == touched


def test_only_beside_prompts_the_kernel_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would not wait for the kernel before it."""
    told = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **_: told.append(arguments[-1])

    monkeypatch.setattr(kernels, "decode_kernel", Kernel())
    cache = Cache([20], head_dim=16)
    for beside in (False, True):
        kernels.decode_attention(
            queries(1, 2, 16, torch.float32), cache.key, cache.value, cache.table, int32([1]), int32([20]),
            scaling=SCALING, beside_prefill=beside,
        )  # fmt: skip
    assert told == [0, 1]


@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter: it decides which program is last")
def test_decode_combines_in_the_order_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    contexts = [200, 170]
    cache = Cache(contexts, head_dim=16)
    query = queries(2, 2, 16, torch.float32)

    def decode() -> torch.Tensor:
        counters = zero_counters()
        out = kernels.decode_attention(
            query, cache.key, cache.value, cache.table, int32([1, 2]), int32(contexts), scaling=SCALING,
            config=config(6, size=16), counters=counters,
        )  # fmt: skip
        assert not counters.any()
        return out

    forwards = decode()
    builder = interpreter.InterpreterBuilder
    original = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda self, x, y, z: original(self, x, self.grid_dim[1] - 1 - y, z))
    assert torch.equal(decode(), forwards)


def test_decode_with_too_few_counters_takes_two_kernels() -> None:
    contexts = [100, 90, 80]
    cache = Cache(contexts, head_dim=16, kv_heads=2)
    query = queries(3, 4, 16, torch.float32)
    expected = torch.stack([cache.attend(query[i], i + 1, contexts[i] - 1, None, None) for i in range(3)])
    assert kernels.decode_programs(3, 2, 2, 16, 16, torch.float32) == 6
    for counters in (None, int32([0] * 5), int32([0] * 6)):
        actual = kernels.decode_attention(
            query, cache.key, cache.value, cache.table, int32([1, 2, 3]), int32(contexts), scaling=SCALING,
            config=config(3, size=16), counters=counters,
        )  # fmt: skip
        check(actual, expected, torch.float32)


@pytest.mark.parametrize(("softcap", "spread"), [(2.0, 1.0), (30.0, 100.0)])
@pytest.mark.parametrize("window", [None, 20])
def test_decode_softcap(softcap: float, spread: float, window: int | None) -> None:
    """A large spread saturates the cap: no overflow on the way."""
    contexts = [5, 70]
    check_decode(Cache(contexts, head_dim=32), contexts, 2, splits=2, window=window, softcap=softcap, spread=spread)


@pytest.mark.parametrize("splits", [1, 3])
def test_decode_large_scores(splits: int) -> None:
    """Scores of several hundred overflow an exponential that is not shifted by its maximum."""
    contexts = [70, 100]
    cache = Cache(contexts, head_dim=64)
    rows, query = int32([1, 2]), torch.randn(2, 2, 64, device=DEVICE)
    for sign in (100.0, -100.0):  # either the first block or a later one dominates
        cache.keys[1][0], cache.keys[1][69] = sign * query[0, 0].cpu(), -sign * query[0, 0].cpu()
        for position in (0, 69):
            cache.key[cache.table[1, position // 16], position % 16] = cache.keys[1][position].to(DEVICE)
        actual = kernels.decode_attention(
            query,
            cache.key,
            cache.value,
            cache.table,
            rows,
            int32(contexts),
            scaling=SCALING,
            config=config(splits),
            counters=zero_counters(),
        )
        expected = [cache.attend(query[i], i + 1, contexts[i] - 1, None, None) for i in range(2)]
        check(actual, torch.stack(expected), torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("splits", [1, 5])
def test_decode_nan_stays_in_its_entry(splits: int) -> None:
    contexts = [40, 30, 170]
    cache = Cache(contexts, head_dim=16)
    query = queries(3, 2, 16, torch.float32)
    query[1] = math.nan
    actual = kernels.decode_attention(
        query, cache.key, cache.value, cache.table, int32([1, 2, 3]), int32(contexts), scaling=SCALING,
        config=config(splits), counters=zero_counters(),
    )  # fmt: skip
    assert actual[1].isnan().all()
    expected = [cache.attend(query[i], i + 1, contexts[i] - 1, None, None) for i in (0, 2)]
    check(actual[[0, 2]], torch.stack(expected), torch.float32)


def test_decode_context_beyond_the_table() -> None:
    """A padding row's length grows without end: it is cut where its table ends, and no other row's pages are read."""
    cache = Cache([32, 40], head_dim=16)
    table = cache.table[:, :2].contiguous()
    query = torch.randn(1, 2, 16, device=DEVICE)
    actual = kernels.decode_attention(
        query, cache.key, cache.value, table, int32([1]), int32([1000]), scaling=SCALING, config=config(2)
    )
    check(actual, cache.attend(query[0], 1, 31, None, None)[None], torch.float32)


def test_decode_picks_its_own_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def three(batch: int, num_kv_heads: int, device: torch.device) -> int:
        asked.append((batch, num_kv_heads, device.type))
        return 3

    monkeypatch.setattr(kernels, "default_num_splits", three)
    check_decode(Cache([70], head_dim=16, kv_heads=2), [70], 1)
    assert asked == [(2, 2, DEVICE)] * 2, "once for each of two launches"


def test_default_num_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)
    assert kernels.default_num_splits(1, 8, "cpu") == 1
    assert kernels.default_num_splits(32, 8, torch.device("cuda")) == 1
    assert kernels.default_num_splits(256, 8, "cuda") == 1
    assert kernels.default_num_splits(8, 8, "cuda") == 8
    assert kernels.default_num_splits(1, 1, "cuda") == 32
    assert kernels.default_num_splits(0, 8, "cuda") == 32


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: a CUDA graph is captured")
@pytest.mark.parametrize("fused", [True, False])
def test_a_captured_graph_stays_right_as_contexts_grow(fused: bool) -> None:
    cache = Cache([600, 600], head_dim=128, kv_heads=2, dtype=torch.bfloat16)
    query = torch.randn(2, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    rows, lengths = int32([1, 2]), int32([1, 2])

    counters = zero_counters()

    def decode() -> torch.Tensor:
        return kernels.decode_attention(
            query, cache.key, cache.value, cache.table, rows, lengths, scaling=SCALING,
            config=config(4, fused=fused, dtype=torch.bfloat16), counters=counters,
        )  # fmt: skip

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode()
    for contexts in ([1, 40], [600, 333]):
        lengths.copy_(int32(contexts))
        graph.replay()
        expected = [cache.attend(query[i], i + 1, contexts[i] - 1, None, None) for i in range(2)]
        check(output, torch.stack(expected), torch.bfloat16)


def check_prefill(
    cache: Cache,
    chunks: list[tuple[int, int, int]],
    group: int,
    *,
    tile: int = TILE,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    with_sinks: bool = False,
) -> None:
    """Prefills chunks (row, first position, tokens) as tiles, with padding tiles and uncovered tokens between."""
    heads, size = group * cache.kv_heads, cache.key.shape[3]
    total = sum(count + 1 for _, _, count in chunks)
    query = queries(total, heads, size, cache.dtype)
    expected = torch.zeros(total, heads, cache.value.shape[3], dtype=torch.float64)
    tiles, start = [], 0
    sinks = some_sinks(heads, cache.dtype) if with_sinks else None
    for row, first, count in chunks:
        for index in range(count):
            expected[start + index] = cache.attend(
                query[start + index], row, first + index, window, softcap, chunk, sinks
            )
        for offset in range(0, count, tile):
            tiles.append((row, start + offset, min(tile, count - offset), first + offset))
        tiles.append((0, 0, 0, 0))
        cache.release(row, visible_from(first, window, chunk))
        start += count + 1
    actual = kernels.prefill_attention(
        query, cache.key, cache.value, cache.table, *(int32(list(column)) for column in zip(*tiles, strict=True)),
        scaling=SCALING, sliding_window=window, softcap=softcap, chunk=chunk, sinks=sinks,
    )  # fmt: skip
    check(actual, expected, cache.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "group", "kv_heads", "page_size"),
    [
        (64, 64, 1, 2, 16),
        (64, 80, 3, 1, 32),
        (80, 80, 4, 1, 256),
        (96, 96, 8, 1, 16),
        (128, 128, 4, 1, 16),
        (256, 256, 3, 1, 256),
    ],
)
def test_prefill_shapes(
    head_dim: int, head_dim_v: int, group: int, kv_heads: int, page_size: int, dtype: torch.dtype
) -> None:
    """A whole prompt, a chunk behind a prior context, and a decoding row in one launch."""
    cache = Cache(
        [TILE + 3, 70, 35], kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim_v, page_size=page_size,
        dtype=dtype,
    )  # fmt: skip
    check_prefill(cache, [(1, 0, TILE + 3), (2, 33, 37), (3, 34, 1)], group)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("window", [1, 7, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_prefill_windows_and_softcap(group: int, window: int, softcap: float | None) -> None:
    cache = Cache([100, 90, 20], head_dim=16)
    chunks = [(1, 51, 49), (2, 89, 1), (3, 0, 20)]
    check_prefill(cache, chunks, group, window=window, softcap=softcap)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("chunk", [1, 7, 40, 64])
def test_prefill_chunks(group: int, chunk: int) -> None:
    cache = Cache([100, 90, 20], head_dim=16)
    check_prefill(cache, [(1, 51, 49), (2, 89, 1), (3, 0, 20)], group, chunk=chunk)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 1.5)])
def test_prefill_sinks(group: int, window: int | None, softcap: float | None) -> None:
    cache = Cache([100, 90, 20], kv_heads=2, head_dim=16)
    chunks = [(1, 51, 49), (2, 89, 1), (3, 0, 20)]
    check_prefill(cache, chunks, group, window=window, softcap=softcap, with_sinks=True)


def test_prefill_softcap_without_window() -> None:
    check_prefill(Cache([90, 20], head_dim=16), [(1, 40, 50), (2, 19, 1)], 2, softcap=1.5)


def test_prefill_tiles_may_be_short() -> None:
    check_prefill(Cache([50], head_dim=16), [(1, 3, 47)], 2, tile=5)


@pytest.fixture
def products(bfloat16_products_of_the_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one for each matrix product that the interpreter computes."""
    from triton.runtime import interpreter

    counted: list[None] = []
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot
    monkeypatch.setattr(builder, "create_dot", lambda *arguments: counted.append(None) or original(*arguments))
    return counted


@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter: it counts the blocks that are read")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("splits", [1, 3, 5])
def test_decode_reads_each_visible_block_once(splits: int, window: int | None, products: list[None]) -> None:
    cache = Cache([200], head_dim=16)
    check_decode(cache, [200], 1, splits=splits, window=window)
    size = kernels.decode_block_sizes(16, 16, 1, torch.float32).n
    first = 0 if window is None else (200 - window) // size
    # Two launches: the second finds all but the last token in its pages.
    assert len(products) == 2 * (-(-200 // size) - first) + 2 * (-(-199 // size) - first)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter: it counts the blocks that are read")
@pytest.mark.parametrize("window", [None, 7])
def test_prefill_reads_each_visible_block_once(window: int | None, products: list[None]) -> None:
    check_prefill(Cache([120], head_dim=16), [(1, 90, 10)], 1, window=window)
    size = kernels.prefill_block_sizes(16, 16, 1, torch.float32).n
    first = 0 if window is None else (90 - window + 1) // size
    assert len(products) == 2 * (-(-100 // size) - first)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "kv_heads", "page_size"), [(80, 24, 3, 16), (128, 128, 1, 256), (256, 96, 9, 32)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv(head_dim: int, head_dim_v: int, kv_heads: int, page_size: int, dtype: torch.dtype) -> None:
    """Strided inputs go to their slots, a position beyond the table to page 0, and nothing else changes."""
    cache = Cache([page_size + 2, 5], kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim_v, page_size=page_size)
    key_cache, value_cache = cache.key.to(dtype), cache.value.to(dtype)
    table = cache.table[:, :2].contiguous()
    rows = [1, 2, 1, 0, 1, 0]
    positions = [0, 4, page_size + 1, 7, page_size - 1, 5 * page_size + 3]
    key = torch.randn(len(rows), kv_heads + 2, head_dim).to(dtype).to(DEVICE)[:, 1:-1]
    value = torch.randn(kv_heads, len(rows), head_dim_v + 3).to(dtype).to(DEVICE)[..., :head_dim_v].transpose(0, 1)
    assert not key.is_contiguous()
    assert not value.is_contiguous()
    expected_key, expected_value = key_cache.clone(), value_cache.clone()
    for token, (row, position) in enumerate(zip(rows, positions, strict=True)):
        index = position // page_size
        page = int(table[row, index]) if index < table.shape[1] else 0
        expected_key[page, position % page_size] = key[token]
        expected_value[page, position % page_size] = value[token]
    kernels.write_kv(key, value, key_cache, value_cache, table, int32(rows), int32(positions))
    torch.testing.assert_close(key_cache, expected_key, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(value_cache, expected_value, rtol=0, atol=0, equal_nan=True)


def test_offsets_beyond_32_bits() -> None:
    """Caches of more than 2^31 elements. Of their memory only the pages in use are ever touched."""
    pages = 2**31 // (256 * 256) + 2
    key_cache = torch.empty(pages, 256, 1, 256, dtype=torch.bfloat16, device=DEVICE)
    value_cache = torch.empty(pages, 256, 1, 256, dtype=torch.bfloat16, device=DEVICE)
    table = int32([pages - 1])[:, None]
    key = torch.randn(3, 1, 256).to(torch.bfloat16).to(DEVICE)
    value = torch.randn(3, 1, 256).to(torch.bfloat16).to(DEVICE)
    query = torch.randn(1, 1, 256).to(torch.bfloat16).to(DEVICE)
    kernels.write_kv(key, value, key_cache, value_cache, table, int32([0, 0, 0]), int32([0, 1, 2]))
    scores = torch.einsum("hd,jhd->hj", query[0].double(), key.double()) * SCALING
    expected = torch.einsum("hj,jhd->hd", scores.softmax(-1), value.double())[None].cpu()
    actual = kernels.decode_attention(query, key_cache, value_cache, table, int32([0]), int32([3]), scaling=SCALING)
    check(actual, expected, torch.bfloat16)
    actual = kernels.prefill_attention(
        query, key_cache, value_cache, table, int32([0]), int32([0]), int32([1]), int32([2]), scaling=SCALING
    )
    check(actual, expected, torch.bfloat16)


def test_nothing_to_do() -> None:
    cache, none = Cache([3], head_dim=16), int32([])
    query = torch.empty(0, 2, 16, device=DEVICE)
    kernels.write_kv(query[:, :1], query[:, :1], cache.key, cache.value, cache.table, none, none)
    arguments = (cache.key, cache.value, cache.table, none)
    assert kernels.decode_attention(query, *arguments, none, scaling=1.0).shape == (0, 2, 16)
    assert kernels.prefill_attention(query, *arguments, none, none, none, scaling=1.0).shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("query", {"query": torch.zeros(2, 3, 32)}),
        ("query", {"query": torch.zeros(2, 4, 16)}),
        ("query", {"query": torch.zeros(1, 4, 32)}),
        ("query", {"query": torch.zeros(2, 4, 32, dtype=torch.float16)}),
        ("query", {"query": torch.zeros(2, 4, 64)[..., ::2]}),
        ("key_cache", {"key_cache": torch.zeros(4, 16, 2, 64)[..., ::2]}),
        ("key_cache", {"key_cache": torch.zeros(4, 16, 2, 512)}),
        ("key_cache", {"key_cache": torch.zeros(4, 24, 2, 32), "value_cache": torch.zeros(4, 24, 2, 32)}),
        ("key_cache", {"key_cache": torch.zeros(4, 512, 2, 32), "value_cache": torch.zeros(4, 512, 2, 32)}),
        ("key_cache", {"key_cache": torch.zeros(4, 16, 2, 32, dtype=torch.int32)}),
        ("value_cache", {"value_cache": torch.zeros(5, 16, 2, 32)}),
        ("value_cache", {"value_cache": torch.zeros(4, 16, 2, 32, dtype=torch.float16)}),
        ("page_table", {"page_table": torch.zeros(3, 4, dtype=torch.int64)}),
        ("page_table", {"page_table": torch.zeros(3, 8, dtype=torch.int32)[:, ::2]}),
        ("rows", {"rows": torch.zeros(2, dtype=torch.int64)}),
        ("context_lengths", {"context_lengths": torch.zeros(3, dtype=torch.int32)}),
        ("scaling", {"scaling": 0.0}),
        ("sliding_window", {"sliding_window": 0}),
        ("softcap", {"softcap": 0.0}),
        ("config", {"config": config(0)}),
        ("config", {"config": config(kernels.MAX_SPLITS + 1)}),
        ("counters", {"counters": torch.zeros(8)}),
        ("out", {"out": torch.zeros(2, 4, 16)}),
        ("out", {"out": torch.zeros(2, 4, 32, dtype=torch.float16)}),
        ("out", {"out": torch.zeros(4, 2, 32).transpose(0, 1)}),
    ],
)
def test_decode_refuses(named: str, changes: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "query": torch.zeros(2, 4, 32),
        "key_cache": torch.zeros(4, 16, 2, 32),
        "value_cache": torch.zeros(4, 16, 2, 32),
        "page_table": torch.zeros(3, 4, dtype=torch.int32),
        "rows": torch.zeros(2, dtype=torch.int32),
        "context_lengths": torch.zeros(2, dtype=torch.int32),
        "scaling": 1.0,
    }
    with pytest.raises(ValueError, match=f"^{named} "):
        kernels.decode_attention(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("named", ["tile_query_starts", "tile_query_lengths", "tile_first_positions"])
def test_prefill_refuses(named: str) -> None:
    cache, index = Cache([3], head_dim=16), int32([0])
    tiles = {"tile_query_starts": index, "tile_query_lengths": index, "tile_first_positions": index}
    tiles[named] = int32([0, 0])
    with pytest.raises(ValueError, match=f"^{named} "):
        kernels.prefill_attention(
            torch.zeros(1, 1, 16, device=DEVICE), cache.key, cache.value, cache.table, index, scaling=1.0, **tiles
        )


@pytest.mark.parametrize("named", ["key", "value", "positions"])
def test_write_refuses(named: str) -> None:
    cache, index = Cache([3], head_dim=16), int32([1])
    heads = torch.zeros(1, 1, 16, device=DEVICE)
    arguments = {"key": heads, "value": heads, "positions": index}
    arguments[named] = torch.zeros(1, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match=f"^{named} "):
        kernels.write_kv(key_cache=cache.key, value_cache=cache.value, page_table=cache.table, rows=index, **arguments)
