"""The kernels of latents against a naive oracle in float64, on the GPU or in Triton's interpreter.

The pages are full of NaN but for the tokens that a query may see: a kernel that lets one hidden token touch the result
fails.
"""

import importlib.util
import math
import os

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

from hf_async_batching.attention import latent_backend
from hf_async_batching.attention.base import AttentionInputs, AttentionOptions, DecodeContext, MixedContext
from hf_async_batching.attention.latents import multiply_by_heads
from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.attention.triton_backend import TritonBackend
from hf_async_batching.attention.triton_latents import (
    LatentConfig,
    Latents,
    decode_latents,
    default_latent_config,
    multiply_few,
    prefill_latents,
    write_latents,
)
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SCALING = 0.17

# Triton 3.9 announces a change of a compiler default that makes no difference here.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.fixture(autouse=True)
def bfloat16_products_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        widen_bfloat16_products(monkeypatch)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Pages:
    """Rows 1, 2, … with `lengths` tokens each, in shuffled pages; page 0 is scratch and page 1 holds NaN."""

    def __init__(self, lengths: list[int], rank: int, rotary: int, dtype: torch.dtype, page_size: int = 16) -> None:
        torch.manual_seed(0)
        counts = [-(-length // page_size) for length in lengths]
        ids = (2 + torch.randperm(sum(counts))).tolist()
        self.rank, self.page_size = rank, page_size
        self.cache = torch.full((len(ids) + 2, page_size, 1, rank + rotary), math.nan, dtype=dtype)
        self.table = torch.ones(len(lengths) + 1, max(counts) + 2, dtype=torch.int32)
        self.table[0] = 0
        self.kept = [torch.zeros(0, rank + rotary, dtype=dtype)]
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True), start=1):
            self.table[row, :count] = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int32)
            self.kept.append(torch.randn(length, rank + rotary).to(dtype))
            position = torch.arange(length)
            self.cache[self.table[row].long()[position // page_size], position % page_size, 0] = self.kept[row]
        self.cache, self.table = self.cache.to(DEVICE), self.table.to(DEVICE)

    def latents(self, query: torch.Tensor) -> Latents:
        return Latents(query[..., : self.rank], query[..., self.rank :], self.cache, self.table)

    def attend(self, query: torch.Tensor, row: int, position: int, options: AttentionOptions) -> torch.Tensor:
        """The oracle: one query [heads, rank + rotary] at one position."""
        begin = 0
        if options.sliding_window is not None:
            begin = max(0, position - options.sliding_window + 1)
        if options.chunk is not None:
            begin = position - position % options.chunk
        kept = self.kept[row][begin : position + 1].double()
        scores = query.cpu().double() @ kept.T * options.scaling
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if options.sinks is not None:
            scores = torch.cat([scores, options.sinks.cpu().double()[:, None]], 1)
        return scores.softmax(-1)[:, : len(kept)] @ kept[:, : self.rank]


def queries(tokens: int, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Random queries [tokens, heads, width] with NaN after each head."""
    padded = torch.full((tokens, heads, width + 8), math.nan, dtype=dtype)
    padded[..., :width] = torch.randn(tokens, heads, width).to(dtype)
    return padded.to(DEVICE)[..., :width]


OPTIONS = {
    "plain": AttentionOptions(SCALING),
    "window": AttentionOptions(SCALING, sliding_window=20),
    "chunk": AttentionOptions(SCALING, chunk=32),
    "softcap": AttentionOptions(SCALING, softcap=2.0),
    "sinks": AttentionOptions(SCALING, sinks=torch.linspace(-1, 2, 4, device=DEVICE)),
}


def arguments(options: AttentionOptions) -> dict[str, object]:
    return latent_backend._arguments(options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("splits", [1, 3])
def test_decode_reads_what_a_query_may_see_and_writes_the_new_token(name: str, splits: int) -> None:
    lengths, heads, rank, rotary = [1, 16, 70, 129], 4, 24, 8
    pages = Pages(lengths, rank, rotary, torch.float32)
    query = queries(len(lengths), heads, rank + rotary, torch.float32)
    new = torch.stack([kept[-1] for kept in pages.kept[1:]]).to(DEVICE)
    for row, length in enumerate(lengths, start=1):  # the current token is in `new` only
        pages.cache[pages.table[row, (length - 1) // 16].item(), (length - 1) % 16] = math.nan
    rows, config = int32([1, 2, 3, 4]), LatentConfig(splits, 16, 16, 4, 1, tokens_per_split=16)
    out = decode_latents(
        pages.latents(query), new, rows, int32(lengths), config=config, **arguments(OPTIONS[name])
    )  # fmt: skip
    for index, length in enumerate(lengths):
        want = pages.attend(query[index], index + 1, length - 1, OPTIONS[name])
        torch.testing.assert_close(out[index].cpu().double(), want, rtol=0, atol=TOLERANCE[torch.float32])
        page = pages.cache[pages.table[index + 1, (length - 1) // 16].item(), (length - 1) % 16, 0]
        assert torch.equal(page, new[index])


@pytest.mark.parametrize(
    ("heads", "rank", "rotary", "page_size", "dtype"),
    [(20, 40, 16, 32, torch.float32), (4, 64, 0, 16, torch.float32), (16, 512, 64, 32, torch.bfloat16)],
)
def test_decode_of_other_sizes(heads: int, rank: int, rotary: int, page_size: int, dtype: torch.dtype) -> None:
    lengths = [77, 5]
    pages = Pages(lengths, rank, rotary, dtype, page_size)
    query = queries(2, heads, rank + rotary, dtype) / 4
    new = torch.stack([kept[-1] for kept in pages.kept[1:]]).to(DEVICE)
    config = default_latent_config(2, heads, dtype, DEVICE)._replace(splits=2, tokens_per_split=32)
    out = decode_latents(
        pages.latents(query), new, int32([1, 2]), int32(lengths), config=config, scaling=SCALING
    )  # fmt: skip
    for index, length in enumerate(lengths):
        want = pages.attend(query[index], index + 1, length - 1, AttentionOptions(SCALING))
        torch.testing.assert_close(out[index].cpu().double(), want, rtol=0, atol=TOLERANCE[dtype])


def test_padding_rows_give_zeros_and_write_to_the_scratch_page_only() -> None:
    pages = Pages([40], 24, 8, torch.float32)
    query, new = queries(2, 4, 32, torch.float32), torch.zeros(2, 32, device=DEVICE)
    pages.cache[0] = 0
    before = pages.cache.clone()
    # A padding row of length 0, and one whose length has grown past its table.
    out = decode_latents(pages.latents(query), new, int32([0, 0]), int32([0, 10_000]), scaling=SCALING)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(pages.cache[1:].nan_to_num(-1), before[1:].nan_to_num(-1))
    write_latents(new, pages.cache, pages.table, int32([0, 1]), int32([7, 10_000]))
    assert torch.equal(pages.cache[1:].nan_to_num(-1), before[1:].nan_to_num(-1))


@pytest.mark.parametrize("name", OPTIONS)
def test_prefill_of_pieces_with_earlier_pages(name: str) -> None:
    heads, rank, rotary = 4, 24, 8
    # A whole prompt, a piece behind 33 tokens, and a tile of padding.
    pages = Pages([21, 60], rank, rotary, torch.float32)
    query = queries(48, heads, rank + rotary, torch.float32)
    out = prefill_latents(
        pages.latents(query), int32([1, 2, 0]), int32([0, 21, 0]), int32([21, 27, 0]), int32([0, 33, 0]),
        **arguments(OPTIONS[name]),
    )  # fmt: skip
    places = [(1, position) for position in range(21)] + [(2, position) for position in range(33, 60)]
    for index, (row, position) in enumerate(places):
        want = pages.attend(query[index], row, position, OPTIONS[name])
        torch.testing.assert_close(out[index].cpu().double(), want, rtol=0, atol=TOLERANCE[torch.float32])


def test_the_backends_agree_on_a_mixed_step_and_on_a_decode_step() -> None:
    heads, rank, rotary = 4, 24, 8
    shape = LayerShape(1, rank + rotary, rank, torch.float32, heads, values_in_keys=True)
    lengths = [50, 12]
    pages = Pages(lengths, rank, rotary, torch.float32)
    caches = []
    for _ in range(2):
        cache = PagedCache([shape], num_pages=len(pages.cache) - 1, page_size=16, device=DEVICE)
        cache.keys[0].copy_(pages.cache.nan_to_num(0))
        caches.append(cache)
    table = pages.table
    # Row 1 decodes at position 49; 12 tokens of row 2 are a prompt.
    rows, positions = int32([1] + [2] * 12), int32([49, *range(12)])
    mixed = MixedContext(
        table, rows, positions, int32([1, 2]), int32([0, 1]), int32([1, 12]), int32([49, 0]), int32([50])
    )
    decode = DecodeContext(table, int32([1, 2]), int32([49, 11]), int32([50, 12]))
    for context in (mixed, decode):
        count = len(context.rows)
        query, key = (
            queries(count, heads, rank + rotary, torch.float32),
            torch.randn(count, 1, rank + rotary).to(DEVICE),
        )
        results = []
        for backend, cache in zip((TorchBackend(), TritonBackend(DEVICE)), caches, strict=True):
            split = query[..., :rank], key, key[..., :rank], 0, context, cache, OPTIONS["plain"], query[..., rank:]
            results.append(backend.attend(AttentionInputs(*split)))
        torch.testing.assert_close(*results, rtol=0, atol=TOLERANCE[torch.float32])
        assert torch.equal(*(cache.keys[0][1:] for cache in caches))


@pytest.mark.parametrize("tokens", [1, 20])
def test_products_of_heads(tokens: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 72, 40).to(DEVICE, torch.float16)
    x = queries(tokens, 3, 24, torch.float16)
    wanted = torch.einsum("thi,hio->tho", x.double(), weight[:, :24].double())
    for product in (multiply_few, multiply_by_heads):
        got = product(x, weight[:, :24])
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=2e-2)
    x = queries(tokens, 3, 40, torch.float16)
    wanted = torch.einsum("thi,hoi->tho", x.double(), weight[:, 24:].double())
    torch.testing.assert_close(multiply_few(x, weight[:, 24:].transpose(1, 2)).double(), wanted, rtol=2e-3, atol=2e-2)


def test_every_kernel_that_steps_launch_is_compiled_ahead() -> None:
    shape = LayerShape(1, 32, 24, torch.float32, 4, values_in_keys=True)
    TritonBackend(DEVICE).ready([shape, shape], page_size=16, batches=[1, 4])
    jobs = latent_backend.ready_latents(shape, 16, [1, 4], DEVICE)
    assert {"prefill", "write"} <= {key[1] for key in jobs if isinstance(key, tuple)}
