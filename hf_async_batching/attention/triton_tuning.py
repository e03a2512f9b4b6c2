"""Settings of the attention kernels: by rule, or measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from hf_async_batching.attention import triton_decode, triton_prefill
from hf_async_batching.attention.base import AttentionOptions
from hf_async_batching.attention.triton_decode import BlockSizes, DecodeConfig, power_of_two
from hf_async_batching.attention.triton_kernels import (
    MAX_SPLITS,
    PREFILL_TILE,
    decode_attention,
    default_decode_config,
    prefill_attention,
)
from hf_async_batching.attention.triton_prefill import prefill_block_sizes
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.runtime.autotune import Tuning, source_version

_VERSION = source_version(triton_decode.__file__, triton_prefill.__file__)
DECODE_KERNEL, PREFILL_KERNEL = f"decode attention {_VERSION}", f"prefill attention {_VERSION}"

# Cached tokens, warps and stages to try for 16-bit numbers. Float32 keeps its rule.
_DECODE_SIZES = ((32, 2, 3), (32, 2, 5), (64, 4, 3), (64, 4, 5))
_PREFILL_SIZES = (
    *(BlockSizes(128, 64, 8, 3), BlockSizes(128, 64, 8, 3, 128), BlockSizes(128, 32, 8, 3, 128)),
    *(BlockSizes(128, 128, 8, 3), BlockSizes(64, 64, 4, 3), BlockSizes(64, 32, 4, 3, 128)),
)


class Problem(NamedTuple):
    """Properties of a layer that, with the number of rows, decide which settings are best."""

    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    page_size: int
    dtype: torch.dtype
    window: int | None
    capped: bool

    @classmethod
    def of(cls, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: AttentionOptions) -> Problem:
        """The problem of a call of the backend.

        Args:
            query: [tokens, num_heads, head_dim].
            keys: [pages, page_size, num_kv_heads, head_dim].
            values: [pages, page_size, num_kv_heads, head_dim_v].
            options: Scaling, window, soft cap.
        """
        return cls(
            query.shape[1], keys.shape[2], keys.shape[3], values.shape[3], keys.shape[1], query.dtype,
            options.sliding_window or -(options.chunk or 0) or None, options.softcap is not None,
        )  # fmt: skip

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())


class _Layer(NamedTuple):
    """A layer with this problem, on which it is measured."""

    number: int
    options: AttentionOptions


class TritonSettings:
    """Chooses the settings of each launch, and measures them on request.

    Args:
        device: Device of the kernels.
        tuning: Stored measurements; None to use only the rules.
    """

    def __init__(self, device: torch.device, tuning: Tuning | None) -> None:
        self._device = device
        self._tuning = tuning
        self._layers: dict[Problem, _Layer] = {}
        self._decode: dict[tuple[Problem, int], DecodeConfig] = {}
        self._prefill: dict[Problem, BlockSizes] = {}

    def decode(self, problem: Problem, layer: int, options: AttentionOptions, batch: int) -> DecodeConfig:
        """How decode attention of `batch` rows divides its work; `layer` and `options` identify the problem."""
        config = self._decode.get((problem, batch))
        if config is None:
            self._layers.setdefault(problem, _Layer(layer, options))
            rows = power_of_two(batch, at_least=1)
            default, candidates = self._decode_choices(problem, rows)
            config = default
            if self._tuning is not None:
                config = self._tuning.choose(DECODE_KERNEL, f"{problem} rows={rows}", candidates, default)
            self._decode[problem, batch] = config
        return config

    def prefill(self, problem: Problem, layer: int, options: AttentionOptions) -> BlockSizes:
        """The block sizes of prefill attention."""
        config = self._prefill.get(problem)
        if config is None:
            self._layers.setdefault(problem, _Layer(layer, options))
            default, candidates = self._prefill_choices(problem)
            config = default
            if self._tuning is not None:
                config = self._tuning.choose(PREFILL_KERNEL, str(problem), candidates, default)
            self._prefill[problem] = config
        return config

    def tune(
        self, cache: PagedCache, counters: torch.Tensor, *, batches: Iterable[int], context: int, prompt: int
    ) -> None:
        """Measure settings for the problems met so far; see `AttentionBackend.tune`.

        Args:
            cache: The pages; they are read and never written.
            counters: int32 zeros, as in `decode_attention`.
            batches: Numbers of rows of decode steps.
            context: Tokens that each row holds.
            prompt: Tokens of a prompt.
        """
        if self._tuning is None:
            return
        for problem, layer in self._layers.items():
            for rows in sorted({power_of_two(batch, at_least=1) for batch in batches}):
                default, candidates = self._decode_choices(problem, rows)
                run = _decode_run(problem, layer, cache, counters, rows, context)
                self._tuning.tune(DECODE_KERNEL, f"{problem} rows={rows}", candidates, run, default)
            sizes, choices = self._prefill_choices(problem)
            self._tuning.tune(
                PREFILL_KERNEL, str(problem), choices, _prefill_run(problem, layer, cache, prompt), sizes
            )
        self._decode.clear()
        self._prefill.clear()

    def _decode_choices(self, problem: Problem, rows: int) -> tuple[DecodeConfig, list[DecodeConfig]]:
        """The rule's settings, and the settings to try."""
        group = problem.heads // problem.kv_heads
        default = default_decode_config(
            rows, problem.kv_heads, group, problem.head_dim, problem.head_dim_v, problem.dtype, self._device
        )
        splits = sorted({min(MAX_SPLITS, max(1, factor * default.splits // 2)) for factor in (1, 2, 3, 4)})
        sizes: list[tuple[int, int, int]] = [(default.n, default.warps, default.stages)]
        if problem.dtype != torch.float32:
            sizes += _DECODE_SIZES
        candidates = [DecodeConfig(count, *each) for each in dict.fromkeys(sizes) for count in splits]
        apart = [default._replace(fused=False)] if default.splits > 1 else []
        return default, [config for config in [*candidates, *apart] if config != default]

    def _prefill_choices(self, problem: Problem) -> tuple[BlockSizes, list[BlockSizes]]:
        group = problem.heads // problem.kv_heads
        default = prefill_block_sizes(problem.head_dim, problem.head_dim_v, group, problem.dtype)
        rows = power_of_two(PREFILL_TILE * group)
        fitting = _PREFILL_SIZES if problem.dtype != torch.float32 else ()
        return default, [sizes for sizes in fitting if sizes.m <= rows and sizes != default]


def _table(cache: PagedCache, rows: int, context: int, device: torch.device) -> torch.Tensor:
    """int32 [rows, pages]: arbitrary pages, because their content does not matter."""
    pages = cache.keys[0].shape[0]
    return torch.randint(pages, (rows, -(-context // cache.page_size)), dtype=torch.int32, device=device)


def _decode_run(
    problem: Problem, layer: _Layer, cache: PagedCache, counters: torch.Tensor, rows: int, context: int
) -> Callable[[DecodeConfig], Callable[[], None]]:
    keys, values = cache.keys[layer.number], cache.values[layer.number]
    table = _table(cache, rows, context, keys.device)
    query = torch.randn(rows, problem.heads, problem.head_dim, dtype=problem.dtype, device=keys.device)
    index = torch.arange(rows, dtype=torch.int32, device=keys.device)
    lengths = torch.full_like(index, context)
    options = layer.options

    def run(config: DecodeConfig) -> Callable[[], None]:
        def launch() -> None:
            decode_attention(
                query, keys, values, table, index, lengths, scaling=options.scaling,
                sliding_window=options.sliding_window, softcap=options.softcap, chunk=options.chunk,
                sinks=options.sinks, config=config, counters=counters,
            )  # fmt: skip

        return launch

    return run


def _prefill_run(
    problem: Problem, layer: _Layer, cache: PagedCache, prompt: int
) -> Callable[[BlockSizes], Callable[[], None]]:
    keys, values = cache.keys[layer.number], cache.values[layer.number]
    table = _table(cache, 1, prompt, keys.device)
    query = torch.randn(prompt, problem.heads, problem.head_dim, dtype=problem.dtype, device=keys.device)
    starts = torch.arange(0, prompt, PREFILL_TILE, dtype=torch.int32, device=keys.device)
    tile_rows, lengths = torch.zeros_like(starts), (prompt - starts).clamp(max=PREFILL_TILE)
    options = layer.options

    def run(config: BlockSizes) -> Callable[[], None]:
        def launch() -> None:
            prefill_attention(
                query, keys, values, table, tile_rows, starts, lengths, starts, scaling=options.scaling,
                sliding_window=options.sliding_window, softcap=options.softcap, chunk=options.chunk,
                sinks=options.sinks, config=config,
            )  # fmt: skip

        return launch

    return run
