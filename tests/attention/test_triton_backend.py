"""Whole steps through the Triton backend against the plain one: on the GPU where there is one, else interpreted."""

import importlib.util
import math
from functools import partial
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from hf_async_batching.attention import triton_backend
from hf_async_batching.attention.base import (
    AttentionContext,
    AttentionInputs,
    AttentionOptions,
    DecodeContext,
    MixedContext,
)
from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.attention.triton_backend import TritonBackend
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = LayerShape(2, 16, 32, torch.float32)
HEADS, PAGE_SIZE, PAGES_PER_ROW = 4, 16, 8

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Step:
    """Rows 1, 2, … compute `count` tokens behind `before` others; the first `num_decodes` of them decode."""

    def __init__(self, runs: list[tuple[int, int]], num_decodes: int, *, decode: bool = False, tile: int = 9) -> None:
        torch.manual_seed(0)
        assert all(count == 1 for _, count in runs[:num_decodes])
        pages = 1 + torch.randperm(len(runs) * PAGES_PER_ROW, dtype=torch.int32)
        self.table = torch.cat([pages.new_zeros(1, PAGES_PER_ROW), pages.view(-1, PAGES_PER_ROW)]).to(DEVICE)
        self.cache = PagedCache([SHAPE] * 2, num_pages=len(pages), page_size=PAGE_SIZE, device=DEVICE)
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.copy_(torch.randn(tensor.shape))
        rows, positions, tiles = [], [], []
        for row, (before, count) in enumerate(runs, start=1):
            tiles += [
                (row, len(rows) + start, min(tile, count - start), before + start) for start in range(0, count, tile)
            ]
            rows += [row] * count
            positions += range(before, before + count)
        columns = [int32(list(column)) for column in zip(*tiles, strict=True)]
        lengths = int32([position + 1 for position in (positions if decode else positions[:num_decodes])])
        where = self.table, int32(rows), int32(positions)
        self.context: AttentionContext = (
            DecodeContext(*where, lengths) if decode else MixedContext(*where, *columns, lengths)
        )
        tokens = len(rows)
        self.query = torch.randn(tokens, HEADS, SHAPE.key_dim, device=DEVICE)
        self.key = torch.randn(tokens, SHAPE.num_kv_heads, SHAPE.key_dim, device=DEVICE)
        self.value = torch.randn(tokens, SHAPE.num_kv_heads, SHAPE.value_dim, device=DEVICE)

    def attend(self, backend: TritonBackend | TorchBackend, options: AttentionOptions) -> list[torch.Tensor]:
        return [
            backend.attend(
                AttentionInputs(
                    self.query * (layer + 1), self.key, self.value, layer, self.context, self.cache, options
                )
            )
            for layer in range(2)
        ]

    @property
    def mixed(self) -> MixedContext:
        assert isinstance(self.context, MixedContext)
        return self.context


MIXED = [(20, 1), (0, 1), (90, 1), (0, 30), (16, 18), (33, 1)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of what reached each kernel: queries for decoding, tiles for prompts."""
    seen: dict[str, list[tuple[int, ...]]] = {"decode": [], "prefill": []}
    decode, prefill = triton_backend.decode_attention, triton_backend.prefill_attention

    def count_decode(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen["decode"].append(tuple(query.shape))
        return decode(query, *arguments, **options)

    def count_prefill(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        seen["prefill"].append(tuple(arguments[3].shape))
        return prefill(query, *arguments, **options)

    monkeypatch.setattr(triton_backend, "decode_attention", count_decode)
    monkeypatch.setattr(triton_backend, "prefill_attention", count_prefill)
    return seen


@pytest.mark.parametrize(
    ("num_decodes", "window", "softcap"), [(0, None, None), (1, None, None), (3, None, None), (3, 7, 0.8)]
)
def test_a_mixed_step(
    num_decodes: int, window: int | None, softcap: float | None, calls: dict[str, list[tuple[int, ...]]]
) -> None:
    options = AttentionOptions(0.25, window, softcap)
    expected = Step(MIXED, num_decodes).attend(TorchBackend(), options)
    step, backend = Step(MIXED, num_decodes), TritonBackend(DEVICE)
    for actual, wanted in zip(step.attend(backend, options), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=2e-4)
    assert calls["decode"] == [(num_decodes, HEADS, SHAPE.key_dim)] * 2 * bool(num_decodes)
    assert calls["prefill"] == [(len(step.mixed.tile_rows) - num_decodes,)] * 2, "no decoding row is read twice"


@pytest.mark.parametrize("prompts", [True, False])
def test_what_decodes_runs_beside_prompts(prompts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind their launch, which lets it start; where there is none it must wait for what is before."""
    step, order = Step(MIXED, 3), list[str | tuple[str, bool]]()
    if not prompts:
        for name in ("tile_rows", "tile_queries", "tile_lengths", "tile_positions"):
            setattr(step.context, name, getattr(step.context, name)[:3])
    decode, prefill = triton_backend.decode_attention, triton_backend.prefill_attention

    def note_decode(*arguments: Any, **options: Any) -> torch.Tensor:
        order.append(("decode", options["beside_prefill"]))
        return decode(*arguments, **options)

    def note_prefill(*arguments: Any, **options: Any) -> torch.Tensor:
        order.append("prefill")
        return prefill(*arguments, **options)

    monkeypatch.setattr(triton_backend, "decode_attention", note_decode)
    monkeypatch.setattr(triton_backend, "prefill_attention", note_prefill)
    step.attend(TritonBackend(DEVICE), AttentionOptions(0.25))
    assert order == ["prefill", ("decode", prompts)] * 2


def test_a_decode_step(calls: dict[str, list[tuple[int, ...]]]) -> None:
    runs, options = [(20, 1), (0, 1), (90, 1)], AttentionOptions(0.25)
    expected = Step(runs, 3, decode=True).attend(TorchBackend(), options)
    for actual, wanted in zip(
        Step(runs, 3, decode=True).attend(TritonBackend(DEVICE), options), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=2e-4)
    assert calls == {"decode": [(3, HEADS, SHAPE.key_dim)] * 2, "prefill": []}


def test_tokens_of_no_tile_are_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """They must not carry NaN to the layers behind."""
    step = Step(MIXED, 1)
    for name in ("tile_rows", "tile_queries", "tile_lengths", "tile_positions"):
        setattr(step.context, name, getattr(step.context, name)[:-1].contiguous())
    out = step.attend(TritonBackend(DEVICE), AttentionOptions(0.25))[0]
    assert (out[-1] == 0).all()
    assert not (out[:-1] == 0).all(-1).any()


def test_padding_changes_nothing() -> None:
    """Tokens of row 0, and tiles without tokens, as a step with drafts has them that is captured."""
    runs, options = [(20, 1), (90, 6), (31, 3)], AttentionOptions(0.25)
    plain, padded = Step(runs, 0), Step(runs, 0)
    count, context = len(plain.query), padded.mixed
    for name in ("query", "key", "value"):
        given = getattr(padded, name)
        setattr(padded, name, torch.cat([given, given.new_full((16 - count, *given.shape[1:]), math.nan)]))
    context.rows = torch.cat([context.rows, int32([0] * (16 - count))])
    context.positions = torch.cat([context.positions, int32([0] * (16 - count))])
    for name, value in (("tile_rows", 0), ("tile_queries", count), ("tile_lengths", 0), ("tile_positions", 0)):
        given = getattr(context, name)
        setattr(context, name, torch.cat([given, int32([value] * (16 - len(given)))]))
    backend = TritonBackend(DEVICE)
    for actual, wanted in zip(padded.attend(backend, options), plain.attend(backend, options), strict=True):
        assert torch.equal(actual[:count], wanted)
        assert not actual[count:].any()
    for actual, wanted in zip(padded.cache.keys, plain.cache.keys, strict=True):
        assert torch.equal(actual[1:], wanted[1:]), "padding is written to the scratch page"


def test_room_for_rows_that_decode_changes_nothing() -> None:
    """Entries of row 0 between what decodes and what does not, as a captured step with prompts has them."""
    runs, options, at, count = [(20, 1), (90, 1), (31, 3)], AttentionOptions(0.25), 2, 3
    plain, padded = Step(runs, at), Step(runs, at)
    context = padded.mixed

    def widen(given: torch.Tensor, values: torch.Tensor | float) -> torch.Tensor:
        return torch.cat([given[:at], given.new_zeros(count, *given.shape[1:]) + values, given[at:]])

    for name, value in (("query", 1.0), ("key", math.nan), ("value", math.nan)):
        setattr(padded, name, widen(getattr(padded, name), value))
    for name, value in (("rows", 0), ("positions", 0), ("decode_lengths", 1), ("tile_rows", 0), ("tile_lengths", 0)):
        setattr(context, name, widen(getattr(context, name), value))
    queries = context.tile_queries + count * (context.tile_queries >= at).int()
    context.tile_queries = widen(queries, at + torch.arange(count, device=queries.device).int())
    context.tile_positions = widen(context.tile_positions, 0)
    assert context.num_decodes == at + count
    backend = TritonBackend(DEVICE)
    for actual, wanted in zip(padded.attend(backend, options), plain.attend(backend, options), strict=True):
        assert torch.equal(torch.cat([actual[:at], actual[at + count :]]), wanted)
    for actual, wanted in zip(padded.cache.keys, plain.cache.keys, strict=True):
        assert torch.equal(actual[1:], wanted[1:]), "padding is written to the scratch page"


def test_each_backend_has_counters_of_its_own_and_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = triton_backend.decode_attention

    def keep(*arguments: Any, counters: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(counters)
        assert not counters.any()
        return original(*arguments, counters=counters, **options)

    monkeypatch.setattr(triton_backend, "decode_attention", keep)
    backends = [TritonBackend(DEVICE), TritonBackend(DEVICE)]
    for backend in backends:
        for decodes in (1, 3):
            Step(MIXED, decodes).attend(backend, AttentionOptions(0.25))
    first, second = seen[:4], seen[4:]
    assert len({counters.data_ptr() for counters in first}) == len({counters.data_ptr() for counters in second}) == 1
    assert first[0].data_ptr() != second[0].data_ptr()
    assert first[0].dtype == torch.int32
    assert not first[0].any()


def test_nan_of_released_pages_stays_out_of_a_mixed_step() -> None:
    """Slots behind a row's own tokens belong to nobody."""
    step = Step(MIXED, 3)
    for tensor in (*step.cache.keys, *step.cache.values):
        for row, (before, count) in enumerate(MIXED, start=1):
            for position in range(before + count, PAGES_PER_ROW * PAGE_SIZE):
                tensor[step.table[row, position // PAGE_SIZE], position % PAGE_SIZE] = math.nan
    for out in step.attend(TritonBackend(DEVICE), AttentionOptions(0.25)):
        assert out.isfinite().all()


def test_kernels_are_made_ready_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[str, Any]] = []
    kernels = {name: getattr(triton_backend, name) for name in ("write_kv", "decode_attention", "prefill_attention")}

    def record(name: str, *args: Any, **kwargs: Any) -> Any:
        launched.append((name, kwargs.get("config")))
        return kernels[name](*args, **kwargs)

    for name in kernels:
        monkeypatch.setattr(triton_backend, name, partial(record, name))
    plain = SHAPE._replace(num_heads=HEADS)
    backend = TritonBackend(DEVICE)
    backend.ready([plain, plain, plain._replace(sliding_window=4), SHAPE], page_size=PAGE_SIZE, batches=[1, 2, 2])
    counts = {name: sum(1 for launch, _ in launched if launch == name) for name, _ in launched}
    # Two kinds of layers; one whose heads nobody counted is left to its first step.
    assert counts["write_kv"] == counts["prefill_attention"] == 2
    decodes = [config for name, config in launched if name == "decode_attention"]
    assert len(decodes) >= 2
    assert len(set(decodes)) <= len(decodes) <= 4, "one for each kind, not for each batch"
