"""Paged attention in Triton: write keys and values to pages, decode, and prefill packed prompts.

This module is the only entry to the kernels. Importing it imports triton, so import it on demand. All functions work
on the current stream of their tensors' device, allocate only through torch (so a CUDA graph can capture them), and
never wait for the device.

The cache of one layer is `key_cache` [num_pages, page_size, num_kv_heads, head_dim] and `value_cache`
[num_pages, page_size, num_kv_heads, head_dim_v], contiguous. Token `p` of row `r` is in page
`page_table[r, p // page_size]`, slot `p % page_size`. Page 0 is scratch memory for the writes of padding.
"""

import functools
import math

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.attention.triton_decode import (
    BlockSizes,
    DecodeConfig,
    combine_kernel,
    decode_block_sizes,
    decode_kernel,
    power_of_two,
)
from hf_async_batching.attention.triton_prefill import (
    PREFILL_TILE,
    prefill_block_sizes,
    prefill_kernel,
    write_kv_kernel,
)
from hf_async_batching.devices.pdl import supports_pdl

__all__ = [
    "MAX_SPLITS",
    "PREFILL_TILE",
    "BlockSizes",
    "DecodeConfig",
    "decode_attention",
    "decode_programs",
    "default_decode_config",
    "default_num_splits",
    "prefill_attention",
    "write_kv",
]

MAX_SPLITS = 64
"""The largest number of parts into which `decode_attention` divides a context."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOG2_E = math.log2(math.e)


def default_num_splits(batch: int, num_kv_heads: int, device: torch.device | str) -> int:
    """The largest number of parts into which `decode_attention` divides each context by default.

    It depends only on the batch and the device, which are fixed for a captured graph, and never on a context. One
    program per context is best if there are then at least three programs for every two multiprocessors: their loads in
    flight suffice, and nothing has to be combined (measured on an H200). Otherwise four programs per multiprocessor
    keep the memory busy.

    Args:
        batch: entries of the batch, padding included.
        num_kv_heads: number of key-value heads.
        device: device that runs the kernel. For a CPU (the interpreter) the result is 1.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return 1
    programs, available = max(1, batch * num_kv_heads), multiprocessors(device)
    if 2 * programs >= 3 * available:
        return 1
    return max(1, min(32, 4 * available // programs))


def default_decode_config(
    batch: int, num_kv_heads: int, group: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, device: torch.device
) -> DecodeConfig:
    """How `decode_attention` divides its work by default: a rule over values that are fixed for a captured graph.

    Args:
        batch: entries of the batch, padding included.
        num_kv_heads: number of key-value heads.
        group: number of query heads per key-value head.
        head_dim: head size of queries and keys.
        head_dim_v: head size of values.
        dtype: dtype of queries, keys and values.
        device: device that runs the kernel.
    """
    sizes = decode_block_sizes(head_dim, head_dim_v, group, dtype)
    splits = default_num_splits(batch, num_kv_heads, device)
    stages = sizes.stages
    if splits == 1 and dtype != torch.float32 and device.type == "cuda":
        # With few programs of whole contexts, each keeps more loads in flight. Measured on an H200.
        stages += 2 if batch * num_kv_heads <= 2 * multiprocessors(device) else 0
    # Few contexts are divided finely, and the last program would combine many parts alone. Measured on an H200.
    few = batch * num_kv_heads <= 64
    return DecodeConfig(
        splits,
        sizes.n,
        sizes.warps,
        stages,
        tokens_per_split=max(32, sizes.n) if few else 128,
        fused=not few,
        pdl=supports_pdl(device),
    )


def decode_programs(
    batch: int, num_kv_heads: int, group: int, head_dim: int, head_dim_v: int, dtype: torch.dtype
) -> int:
    """Number of counters that `decode_attention` needs: programs of one split; args of `default_decode_config`."""
    m = decode_block_sizes(head_dim, head_dim_v, group, dtype).m
    return batch * num_kv_heads * (-(-group // m))


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write the keys and values of T tokens to their pages, with one kernel.

    Args:
        key: [T, num_kv_heads, head_dim], any strides but 1 for the last dimension.
        value: [T, num_kv_heads, head_dim_v], any strides but 1 for the last dimension.
        key_cache: [num_pages, page_size, num_kv_heads, head_dim], the dtype of `key`.
        value_cache: [num_pages, page_size, num_kv_heads, head_dim_v], the dtype of `value`.
        page_table: [num_rows, max_pages_per_row], int32.
        rows: [T], int32: the row of each token.
        positions: [T], int32, not negative: its position in the row. A position beyond the page table goes to page 0.

    Raises:
        ValueError: a shape, stride or dtype is not as above; the message names the argument.
    """
    kv_heads, head_dim, head_dim_v, page_size = _check_cache(key_cache, value_cache, page_table)
    tokens = check_index("rows", rows)
    check_index("positions", positions, tokens)
    _check_heads("key", key, (tokens, kv_heads, head_dim), key_cache.dtype)
    _check_heads("value", value, (tokens, kv_heads, head_dim_v), value_cache.dtype)
    if tokens == 0:
        return
    block_d, block_dv = power_of_two(head_dim), power_of_two(head_dim_v)
    block_h = min(power_of_two(kv_heads, at_least=1), max(1, 2048 // max(block_d, block_dv)))
    with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
        write_kv_kernel[(tokens, triton.cdiv(kv_heads, block_h))](
            key, value, key_cache, value_cache, page_table, rows, positions, page_table.shape[1],
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            KV_HEADS=kv_heads, HEAD_DIM=head_dim, VALUE_DIM=head_dim_v, PAGE_SIZE=page_size,
            BLOCK_H=block_h, BLOCK_D=block_d, BLOCK_DV=block_dv, num_warps=4,
        )  # fmt: skip


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    context_lengths: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
    counters: torch.Tensor | None = None,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    beside_prefill: bool = False,
) -> torch.Tensor:
    """Attention of one query token per entry of the batch over the pages of its row.

    This is split-KV, or Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023): several programs share a context. The last
    program to finish combines their results, as in Stream-K (Osama et al., 2023), or a second kernel does. The launch
    does not depend on any context, so a captured graph serves growing contexts. The result is deterministic.

    Args:
        query: [B, num_heads, head_dim], float16, bfloat16 or float32, any strides but 1 for the last dimension;
            num_heads is a multiple of num_kv_heads, and neighbouring query heads share a key-value head.
        key_cache: [num_pages, page_size, num_kv_heads, head_dim], the dtype of `query`.
        value_cache: [num_pages, page_size, num_kv_heads, head_dim_v], the same dtype.
        page_table: [num_rows, max_pages_per_row], int32.
        rows: [B], int32.
        context_lengths: [B], int32: tokens of the context, including the current one, whose key is already written or
            given in `new`. 0 gives zeros. A length beyond the row's page table is cut to the table's length.
        scaling: multiplies the scores; positive.
        sliding_window: number of last tokens that are visible, including the current one; None for all.
        softcap: c replaces each scaled score s by c * tanh(s / c), before the mask; None for no soft cap.
        chunk: tokens before the last multiple of it are hidden; None for none. Not together with a window.
        sinks: [num_heads], contiguous: unscaled scores that take part in each softmax but have no value; None for no
            sinks.
        config: how the work is divided; None asks `default_decode_config`.
        counters: [at least `decode_programs`], int32, zeros before the first call and after each. Calls that may run
            at the same time need separate counters. Without counters, or with too few, a second kernel combines.
        new: keys [B, num_kv_heads, head_dim] and values [B, num_kv_heads, head_dim_v] of the current tokens, any
            strides but 1 for the last dimension; this launch writes them to their pages. None if they are written.
        out: [B, num_heads, head_dim_v], contiguous, the dtype of `query`, for the result; None for a new tensor.
        beside_prefill: whether the previous launch on this stream is `prefill_attention` of other rows. The two may
            then run at the same time (if `config.pdl` is set).

    Returns:
        [B, num_heads, head_dim_v], contiguous, the dtype of `query`.

    Raises:
        ValueError: a shape, stride, dtype or option is wrong; the message names the argument.
    """
    kv_heads, head_dim, head_dim_v, page_size = _check_cache(key_cache, value_cache, page_table)
    batch = check_index("rows", rows)
    check_index("context_lengths", context_lengths, batch)
    key, value = (query, query) if new is None else new
    if new is not None:
        _check_heads("new[0]", key, (batch, kv_heads, head_dim), key_cache.dtype)
        _check_heads("new[1]", value, (batch, kv_heads, head_dim_v), value_cache.dtype)
    group = _check_query(query, batch, kv_heads, head_dim, key_cache, value_cache)
    window, score_scale, cap = check_options(scaling, sliding_window, softcap, chunk)
    check_sinks(sinks, kv_heads * group)
    if config is None:
        config = default_decode_config(batch, kv_heads, group, head_dim, head_dim_v, query.dtype, query.device)
    splits = config.splits
    if not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"config must have from 1 to {MAX_SPLITS} splits, got {splits}")
    if counters is not None:
        check_index("counters", counters)
    heads = kv_heads * group
    output = query.new_empty((batch, heads, head_dim_v)) if out is None else _check_out(out, query, head_dim_v)
    if batch == 0:
        return output
    m = decode_block_sizes(head_dim, head_dim_v, group, query.dtype).m
    programs = kv_heads * triton.cdiv(group, m)
    fused = splits > 1 and config.fused and counters is not None and counters.numel() >= batch * programs
    # With one split the kernel writes the output itself, and the partial results are never used.
    partial = output if splits == 1 else query.new_empty((batch, heads, splits, head_dim_v), dtype=torch.float32)
    log_sum = output if splits == 1 else query.new_empty((batch, heads, splits), dtype=torch.float32)
    block_dv = power_of_two(head_dim_v)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        decode_kernel[(programs, splits, batch)](
            query, key, value, key_cache, value_cache, page_table, rows, context_lengths, output, partial, log_sum,
            counters if fused else rows, page_table.shape[1], query.stride(0), query.stride(1), key.stride(0),
            key.stride(1), value.stride(0), value.stride(1), score_scale, cap, query if sinks is None else sinks,
            splits, max(1, config.tokens_per_split // config.n), int(beside_prefill), NEW=new is not None,
            SPLIT=splits > 1, FUSED=fused, PDL=config.pdl, KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim,
            VALUE_DIM=head_dim_v, PAGE_SIZE=page_size, WINDOW=window, HAS_CAP=softcap is not None,
            HAS_SINKS=sinks is not None, BLOCK_M=m, BLOCK_N=config.n, BLOCK_D=power_of_two(head_dim),
            BLOCK_DV=block_dv, num_warps=config.warps, num_stages=config.stages,
            **({"launch_pdl": True} if config.pdl else {}),
        )  # fmt: skip
        if splits > 1 and not fused:
            block_s = power_of_two(splits, at_least=2)
            combine_kernel[(batch * heads,)](
                partial, log_sum, output, splits, VALUE_DIM=head_dim_v, BLOCK_S=block_s,
                BLOCK_DV=block_dv, num_warps=1 if block_s * block_dv <= 1024 else 4,
            )  # fmt: skip
    return output


def prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_table: torch.Tensor,
    tile_rows: torch.Tensor,
    tile_query_starts: torch.Tensor,
    tile_query_lengths: torch.Tensor,
    tile_first_positions: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks: torch.Tensor | None = None,
    config: BlockSizes | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed queries over their rows' pages, in tiles of at most PREFILL_TILE tokens.

    The method is FlashAttention-2 (Dao, 2023), read through a page table. Keys and values of the query tokens must be
    written already.

    Args:
        query: [T, num_heads, head_dim], as in `decode_attention`; the tokens of all tiles, packed.
        key_cache: [num_pages, page_size, num_kv_heads, head_dim], the dtype of `query`.
        value_cache: [num_pages, page_size, num_kv_heads, head_dim_v], the same dtype.
        page_table: [num_rows, max_pages_per_row], int32.
        tile_rows: [N], int32: the row of each tile.
        tile_query_starts: [N], int32: its first token in `query`.
        tile_query_lengths: [N], int32: its tokens, 0 to PREFILL_TILE; a tile of 0 is padding.
        tile_first_positions: [N], int32: the position of its first token in the row.
        scaling: multiplies the scores; positive.
        sliding_window: as in `decode_attention`.
        softcap: as in `decode_attention`.
        chunk: as in `decode_attention`.
        sinks: as in `decode_attention`.
        config: block sizes of one program; None asks `prefill_block_sizes`.
        out: [T, num_heads, head_dim_v], contiguous, the dtype of `query`, for the result; None for a new tensor.

    Returns:
        [T, num_heads, head_dim_v], contiguous, the dtype of `query`. Tokens outside all tiles are zeros in a new
        tensor, and unchanged in `out`.

    Raises:
        ValueError: a shape, stride, dtype or option is wrong; the message names the argument.
    """
    kv_heads, head_dim, head_dim_v, page_size = _check_cache(key_cache, value_cache, page_table)
    tiles = check_index("tile_rows", tile_rows)
    check_index("tile_query_starts", tile_query_starts, tiles)
    check_index("tile_query_lengths", tile_query_lengths, tiles)
    check_index("tile_first_positions", tile_first_positions, tiles)
    group = _check_query(query, query.shape[0], kv_heads, head_dim, key_cache, value_cache)
    window, score_scale, cap = check_options(scaling, sliding_window, softcap, chunk)
    check_sinks(sinks, kv_heads * group)
    # Zeros, because empty memory may hold NaN, which would spread from padding tokens through the layers to page 0.
    output = (
        query.new_zeros((query.shape[0], kv_heads * group, head_dim_v))
        if out is None
        else _check_out(out, query, head_dim_v)
    )
    if tiles == 0:
        return output
    sizes = config or prefill_block_sizes(head_dim, head_dim_v, group, query.dtype)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        prefill_kernel[(tiles * kv_heads * triton.cdiv(PREFILL_TILE * group, sizes.m),)](
            query, key_cache, value_cache, page_table,
            tile_rows, tile_query_starts, tile_query_lengths, tile_first_positions, output,
            page_table.shape[1], query.stride(0), query.stride(1), score_scale, cap,
            query if sinks is None else sinks, EARLY=supports_pdl(query.device),
            TILE=PREFILL_TILE, KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, VALUE_DIM=head_dim_v,
            PAGE_SIZE=page_size, WINDOW=window, HAS_CAP=softcap is not None, HAS_SINKS=sinks is not None,
            BLOCK_M=sizes.m, BLOCK_N=sizes.n, BLOCK_D=power_of_two(head_dim),
            BLOCK_DV=power_of_two(head_dim_v), num_warps=sizes.warps, num_stages=sizes.stages,
            **({"maxnreg": sizes.registers} if sizes.registers else {}),
        )  # fmt: skip
    return output


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_cache(
    key_cache: torch.Tensor, value_cache: torch.Tensor, page_table: torch.Tensor
) -> tuple[int, int, int, int]:
    """Return num_kv_heads, head_dim, head_dim_v and page_size."""
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != 4 or not cache.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous [num_pages, page_size, num_kv_heads, size], got {cache.shape}"
            )
        if cache.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16 or float32, got {cache.dtype}")
        if not 16 <= cache.shape[3] <= 256:
            raise ValueError(f"{name} must have a head size from 16 to 256, got {cache.shape[3]}")
    if key_cache.shape[:3] != value_cache.shape[:3]:
        raise ValueError(
            f"value_cache {value_cache.shape} must match key_cache {key_cache.shape} except for the head size"
        )
    page_size = key_cache.shape[1]
    if not 16 <= page_size <= 256 or page_size & (page_size - 1):
        raise ValueError(f"key_cache must have a page size of 16, 32, 64, 128 or 256, got {page_size}")
    if page_table.dim() != 2 or page_table.dtype != torch.int32 or not page_table.is_contiguous():
        raise ValueError(
            f"page_table must be contiguous int32 [num_rows, max_pages], got {page_table.dtype} {page_table.shape}"
        )
    return key_cache.shape[2], key_cache.shape[3], value_cache.shape[3], page_size


def check_index(name: str, index: torch.Tensor, length: int | None = None) -> int:
    expected = index.numel() if length is None else length
    if index.dim() != 1 or index.dtype != torch.int32 or index.shape[0] != expected or not index.is_contiguous():
        size = "N" if length is None else length
        raise ValueError(f"{name} must be contiguous int32 [{size}], got {index.dtype} {tuple(index.shape)}")
    return expected


def _check_heads(name: str, tensor: torch.Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.stride(2) != 1:
        raise ValueError(
            f"{name} must be {dtype} {shape} with a last stride of 1, "
            f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
        )


def _check_query(
    query: torch.Tensor, tokens: int, kv_heads: int, head_dim: int, key_cache: torch.Tensor, value_cache: torch.Tensor
) -> int:
    """Return the number of query heads per key-value head."""
    if query.dim() != 3 or query.shape[1] == 0 or query.shape[1] % kv_heads:
        raise ValueError(f"query must be [tokens, a multiple of {kv_heads} heads, {head_dim}], got {query.shape}")
    _check_heads("query", query, (tokens, query.shape[1], head_dim), key_cache.dtype)
    if value_cache.dtype != key_cache.dtype:
        raise ValueError(f"value_cache must have the dtype of key_cache {key_cache.dtype}, got {value_cache.dtype}")
    return query.shape[1] // kv_heads


def _check_out(out: torch.Tensor, query: torch.Tensor, head_dim_v: int) -> torch.Tensor:
    shape = (*query.shape[:2], head_dim_v)
    if out.shape != shape or out.dtype != query.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {query.dtype} {shape}, got {out.dtype} {tuple(out.shape)}")
    return out


def check_sinks(sinks: torch.Tensor | None, heads: int) -> None:
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks must be contiguous [{heads}], got {tuple(sinks.shape)}")


def check_options(
    scaling: float, sliding_window: int | None, softcap: float | None, chunk: int | None
) -> tuple[int, float, float]:
    """Return the window and the two factors of the scores, in base 2, as the kernels take them.

    The window is 0 for no window, and the negative chunk size for chunked attention.
    """
    if scaling <= 0:
        raise ValueError(f"scaling must be positive, got {scaling}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 or None, got {sliding_window}")
    if chunk is not None and (chunk < 1 or sliding_window is not None):
        raise ValueError(f"chunk must be at least 1 and without a sliding_window, or None, got {chunk}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    window = sliding_window or -(chunk or 0)
    if softcap is None:
        return window, scaling * _LOG2_E, 0.0
    return window, 2 * _LOG2_E * scaling / softcap, softcap * _LOG2_E
