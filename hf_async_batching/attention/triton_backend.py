"""The Triton kernels as an attention backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from hf_async_batching.attention.base import AttentionInputs, AttentionOptions, DecodeContext
from hf_async_batching.attention.latent_backend import attend_latents, ready_latents
from hf_async_batching.attention.latents import multiply_by_heads
from hf_async_batching.attention.triton_decode import BlockSizes, DecodeConfig
from hf_async_batching.attention.triton_kernels import PREFILL_TILE, decode_attention, prefill_attention, write_kv
from hf_async_batching.attention.triton_latents import multiply_few, serves_product
from hf_async_batching.attention.triton_tuning import Problem, TritonSettings
from hf_async_batching.devices.parallel import run_parallel
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.runtime.autotune import Tuning

# Counters of decode attention: one per key-value head of each row. Larger batches do not split contexts.
_COUNTERS = 16384


class TritonBackend:
    """Reads every length and page on the device, so that a captured graph stays right while sequences grow.

    Steps of one backend must not overlap on the device, because they share counters. Each engine has its own backend.

    Args:
        device: Device of the model.
        tuning: Stored measurements; None to use only the rules.
    """

    tile_size = PREFILL_TILE
    reads_back = False

    def __init__(self, device: torch.device, tuning: Tuning | None = None) -> None:
        self._device = device
        self._settings = TritonSettings(device, tuning)
        # Never replaced, because captured graphs keep using it.
        self._counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        context = inputs.context
        if inputs.query_rotary is not None:
            return attend_latents(inputs)
        if isinstance(context, DecodeContext):
            return self._decode(inputs, context.rows, context.context_lengths)
        query, key, value, layer, options = inputs.query, inputs.key, inputs.value, inputs.layer, inputs.options
        keys, values, table = inputs.keys, inputs.values, inputs.page_table
        write_kv(key, value, keys, values, table, context.rows, context.positions)
        # Zeros, because empty memory may hold NaN, which would spread from tokens outside all tiles to the scratch
        # page.
        out = query.new_zeros((*query.shape[:2], values.shape[-1]))
        decodes = context.num_decodes
        prefill_attention(
            query,
            keys,
            values,
            table,
            context.tile_rows[decodes:],
            context.tile_queries[decodes:],
            context.tile_lengths[decodes:],
            context.tile_positions[decodes:],
            scaling=options.scaling,
            sliding_window=options.sliding_window,
            softcap=options.softcap,
            chunk=options.chunk,
            sinks=options.sinks,
            config=self._settings.prefill(Problem.of(query, keys, values, options), layer, options),
            out=out,
        )
        if decodes:
            # Decoding rows are written twice, so that one kernel also serves mixed steps. The decode kernel is
            # launched after the prefill kernel and can overlap with it: memory bounds the decode kernel, and few
            # prompts are bounded by the time that one of them takes.
            leading = inputs._replace(query=query[:decodes], key=key[:decodes], value=value[:decodes])
            beside = context.tile_rows.numel() > decodes
            self._decode(leading, context.rows[:decodes], context.decode_lengths, out[:decodes], beside=beside)
        return out

    def _decode(
        self,
        inputs: AttentionInputs,
        rows: torch.Tensor,
        context_lengths: torch.Tensor,
        out: torch.Tensor | None = None,
        *,
        beside: bool = False,
    ) -> torch.Tensor:
        """Attention of rows that decode one token each.

        Args:
            inputs: Queries, keys and values of these rows, and the layer.
            rows: int32 [tokens].
            context_lengths: int32 [tokens], keys visible to each query, itself included.
            out: Tensor for the result; None for a new tensor.
            beside: Whether the prefill kernel was launched right before.
        """
        query, keys, values, options = inputs.query, inputs.keys, inputs.values, inputs.options
        problem = Problem.of(query, keys, values, options)
        return decode_attention(
            query,
            keys,
            values,
            inputs.page_table,
            rows,
            context_lengths,
            scaling=options.scaling,
            sliding_window=options.sliding_window,
            softcap=options.softcap,
            chunk=options.chunk,
            sinks=options.sinks,
            config=self._settings.decode(problem, inputs.layer, options, query.shape[0]),
            counters=self._counters,
            new=(inputs.key, inputs.value),
            out=out,
            beside_prefill=beside,
        )

    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return multiply_few(x, weight) if serves_product(x) else multiply_by_heads(x, weight)

    def ready(self, layers: Iterable[LayerShape], *, page_size: int, batches: Iterable[int]) -> None:
        device, jobs, batches = self._device, dict[object, Callable[[], None]](), sorted(set(batches))
        for layer in dict.fromkeys(layers):
            if not layer.num_heads:
                continue
            if layer.values_in_keys:
                jobs |= ready_latents(layer, page_size, batches, device)
                continue
            problem = Problem(
                layer.num_heads, layer.num_kv_heads, layer.key_dim, layer.value_dim, page_size, layer.dtype,
                layer.sliding_window or -(layer.chunk or 0) or None, False,
            )  # fmt: skip
            example = _Example(layer, page_size, device)
            options = AttentionOptions(
                layer.key_dim**-0.5,
                layer.sliding_window,
                None,
                layer.chunk,
                example.sinks if layer.has_sinks else None,
            )
            # The kernel that compiles longest comes first.
            jobs[layer, "prefill"] = partial(example.prefill, self._settings.prefill(problem, 0, options), options)
            for batch in batches:
                config = self._settings.decode(problem, 0, options, batch)
                # Compilation depends on whether contexts are split, not on the number of splits.
                kind = config._replace(splits=min(config.splits, 2))
                jobs.setdefault((layer, kind), partial(example.decode, config, options))
            jobs[layer, "write"] = example.write
        run_parallel(list(jobs.values()), device)

    def tune(self, cache: PagedCache, *, batches: Iterable[int], context: int, prompt: int) -> None:
        self._settings.tune(cache, self._counters, batches=batches, context=context, prompt=prompt)


class _Example:
    """Launches each kernel on tiny inputs, to compile it as steps will need it."""

    def __init__(self, layer: LayerShape, page_size: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._keys = zeros(1, page_size, layer.num_kv_heads, layer.key_dim, dtype=layer.dtype)
        self._values = zeros(1, page_size, layer.num_kv_heads, layer.value_dim, dtype=layer.dtype)
        self._key, self._value = self._keys[0, :2], self._values[0, :2]
        self._query = zeros(2, layer.num_heads, layer.key_dim, dtype=layer.dtype)
        self.sinks = zeros(layer.num_heads, dtype=layer.dtype)
        self._table, self._index, self._counters = zeros(1, 3), zeros(4), zeros(_COUNTERS)

    def write(self) -> None:
        write_kv(self._key, self._value, self._keys, self._values, self._table, self._index[:2], self._index[:2])

    def decode(self, config: DecodeConfig, options: AttentionOptions) -> None:
        decode_attention(
            self._query, self._keys, self._values, self._table, self._index[:2], self._index[:2],
            scaling=options.scaling, sliding_window=options.sliding_window, chunk=options.chunk, sinks=options.sinks,
            config=config, counters=self._counters, new=(self._key, self._value),
        )  # fmt: skip

    def prefill(self, config: BlockSizes, options: AttentionOptions) -> None:
        index = self._index[:1]
        prefill_attention(
            self._query, self._keys, self._values, self._table, index, index, index, index,
            scaling=options.scaling, sliding_window=options.sliding_window, chunk=options.chunk, sinks=options.sinks,
            config=config,
        )  # fmt: skip
