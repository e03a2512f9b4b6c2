"""Attention to latents in Triton: write them to pages, decode, and prefill packed prompts.

The typed door to `triton_latent_kernels`, as `triton_kernels` is to its kernels. The pages of a layer are `cache`
[num_pages, page_size, 1, rank + rotary], contiguous. `rank` and `rotary` are the sizes of the two parts of a query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped,unused-ignore]

from hf_async_batching.attention.latents import MOST_RANK, MOST_ROTARY
from hf_async_batching.attention.triton_decode import BlockSizes, power_of_two
from hf_async_batching.attention.triton_kernels import (
    MAX_SPLITS,
    check_index,
    check_options,
    check_sinks,
    multiprocessors,
)
from hf_async_batching.attention.triton_latent_kernels import (
    head_product_kernel,
    latent_combine_kernel,
    latent_decode_kernel,
    latent_prefill_kernel,
    write_latents_kernel,
)
from hf_async_batching.attention.triton_prefill import PREFILL_TILE
from hf_async_batching.devices.pdl import supports_pdl

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class LatentConfig(NamedTuple):
    """How `decode_latents` divides its work.

    Attributes:
        splits: The most programs that share a context, 1 to MAX_SPLITS.
        m: Heads of a program.
        n: Cached tokens of a program's step.
        warps: Warps of a program.
        stages: Steps in flight, as in `DecodeConfig`.
        tokens_per_split: A context is divided into fewer parts where these would hold fewer tokens.
        pdl: Whether the kernel may be set up while the one before it still runs (compute capability 9 and later).
    """

    splits: int
    m: int
    n: int
    warps: int
    stages: int
    tokens_per_split: int = 64
    pdl: bool = False


class Latents(NamedTuple):
    """Queries and pages of one layer.

    Attributes:
        query: [T, heads, rank], float16, bfloat16 or float32, any strides but 1 for the last dimension.
        query_rotary: [T, heads, rotary], the same.
        cache: [num_pages, page_size, 1, rank + rotary], the dtype of `query`.
        page_table: [num_rows, max_pages_per_row], int32.
    """

    query: torch.Tensor
    query_rotary: torch.Tensor
    cache: torch.Tensor
    page_table: torch.Tensor


def default_latent_config(batch: int, heads: int, dtype: torch.dtype, device: torch.device) -> LatentConfig:
    """How `decode_latents` divides its work by default: a rule over values that are fixed for a captured graph.

    Args:
        batch: Entries of the batch, padding included.
        heads: Query heads.
        dtype: Dtype of queries and pages.
        device: Device that runs the kernel. On a CPU (the interpreter) contexts are not divided.
    """
    if dtype == torch.float32:
        sizes = BlockSizes(16, 16, 4, 1)
    elif heads <= 16:
        sizes = BlockSizes(16, 32, 4, 5)
    else:
        # 64 heads fill the products of Hopper's tensor cores.
        sizes = BlockSizes(min(power_of_two(heads), 64 if major(device) >= 9 else 32), 32, 8, 3)
    splits = 1
    if device.type == "cuda":
        programs = batch * -(-heads // sizes.m)
        splits = max(1, min(MAX_SPLITS, 4 * multiprocessors(device) // programs))
    return LatentConfig(splits, *sizes[:4], pdl=supports_pdl(device))


def latent_prefill_sizes(heads: int, dtype: torch.dtype, device: torch.device) -> BlockSizes:
    """The block sizes of `prefill_latents`, by rule; args of `default_latent_config`."""
    rows = power_of_two(PREFILL_TILE * heads)
    if dtype == torch.float32:
        return BlockSizes(min(rows, 16), 16, 4, 1)
    return BlockSizes(min(rows, 64 if major(device) >= 9 else 32), 32, 8, 2)


MOST_PRODUCT_TOKENS = 64
"""Beyond this many tokens torch computes products of heads."""


def serves_product(x: torch.Tensor) -> bool:
    """Whether `multiply_few` computes the product; `x` is [tokens, heads, inner]."""
    return x.dtype.itemsize == 2 and x.shape[0] <= MOST_PRODUCT_TOKENS and x.stride(2) == 1


def multiply_few(x: torch.Tensor, weight: torch.Tensor, block: int | None = None) -> torch.Tensor:
    """The product of each head of few tokens with a matrix of its own, as `AttentionBackend.multiply`.

    Args:
        x: [tokens, heads, inner], float16 or bfloat16, any strides but 1 for the last dimension.
        weight: [heads, inner, outer], the same dtype, any strides.
        block: Columns of one program; None for a rule.

    Raises:
        ValueError: A shape, stride or dtype is not as above.
    """
    tokens, heads, inner = x.shape
    if not serves_product(x) or weight.dtype != x.dtype or weight.shape[:2] != (heads, inner):
        raise ValueError(f"x {x.dtype} {tuple(x.shape)} and weight {weight.dtype} {tuple(weight.shape)} do not fit")
    outer = weight.shape[2]
    out = x.new_empty(tokens, heads, outer)
    if tokens == 0:
        return out
    block = block or (16 if heads * outer <= 4096 else 64)
    pdl = supports_pdl(x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        head_product_kernel[(triton.cdiv(outer, block), heads)](
            x, weight, out, tokens, x.stride(0), x.stride(1), *weight.stride(), PDL=pdl, HEADS=heads, INNER=inner,
            OUTER=outer, BLOCK_M=power_of_two(tokens), BLOCK_K=128, BLOCK_N=block, num_warps=4, num_stages=3,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return out


def write_latents(
    key: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write what pages keep of T tokens.

    Args:
        key: [T, rank + rotary], any strides but 1 for the last dimension.
        cache: [num_pages, page_size, 1, rank + rotary], the dtype of `key`.
        page_table: [num_rows, max_pages_per_row], int32.
        rows: [T], int32.
        positions: [T], int32, not negative. A position beyond the page table goes to page 0.

    Raises:
        ValueError: A shape, stride or dtype is not as above; the message names the argument.
    """
    width = cache.shape[-1]
    tokens = check_index("rows", rows)
    check_index("positions", positions, tokens)
    _check_pages(cache, page_table)
    _check_key(key, tokens, width, cache.dtype)
    if tokens == 0:
        return
    with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
        write_latents_kernel[(tokens,)](
            key, cache, page_table, rows, positions, page_table.shape[1], key.stride(0), WIDTH=width,
            PAGE_SIZE=cache.shape[1], BLOCK_W=power_of_two(width), num_warps=1 if width <= 128 else 4,
        )  # fmt: skip


def decode_latents(
    latents: Latents,
    key: torch.Tensor,
    rows: torch.Tensor,
    context_lengths: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks: torch.Tensor | None = None,
    config: LatentConfig | None = None,
    out: torch.Tensor | None = None,
    beside_prefill: bool = False,
) -> torch.Tensor:
    """Attention of one query token per entry of the batch to the latents of its row, in the absorbed form.

    Several programs share a context, as in `decode_attention`, and a second kernel combines their parts in a fixed
    order. The launch does not depend on any context. The result is deterministic.

    Args:
        latents: The B queries, and the pages.
        key: [B, rank + rotary], what pages keep of the current tokens; this launch writes it to their pages.
        rows: [B], int32.
        context_lengths: [B], int32; as in `decode_attention`.
        scaling: Multiplies the scores; positive.
        sliding_window: As in `decode_attention`.
        softcap: As in `decode_attention`.
        chunk: As in `decode_attention`.
        sinks: As in `decode_attention`.
        config: How the work is divided; None asks `default_latent_config`.
        out: [B, heads, rank], contiguous, the dtype of the queries, for the result; None for a new tensor.
        beside_prefill: Whether the previous launch on this stream is `prefill_latents` of other rows.

    Returns:
        [B, heads, rank], contiguous.

    Raises:
        ValueError: A shape, stride, dtype or option is wrong; the message names the argument.
    """
    heads, rank, rotary = _check(latents, sinks)
    query, query_rotary, cache, page_table = latents
    batch = check_index("rows", rows)
    check_index("context_lengths", context_lengths, batch)
    _check_key(key, batch, rank + rotary, cache.dtype)
    window, score_scale, cap = check_options(scaling, sliding_window, softcap, chunk)
    if config is None:
        config = default_latent_config(batch, heads, query.dtype, query.device)
    splits = config.splits
    if not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"config must have from 1 to {MAX_SPLITS} splits, got {splits}")
    output = _output(out, query, zeros=False)
    if batch == 0:
        return output
    # With one split the kernel writes the output itself, and the partial results are never used.
    partial = output if splits == 1 else query.new_empty((batch, heads, splits, rank), dtype=torch.float32)
    log_sum = output if splits == 1 else query.new_empty((batch, heads, splits), dtype=torch.float32)
    early = {"launch_pdl": True} if config.pdl else {}
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        latent_decode_kernel[(triton.cdiv(heads, config.m), splits, batch)](
            query, query_rotary, key, cache, page_table, rows, context_lengths, output, partial, log_sum,
            page_table.shape[1], query.stride(0), query.stride(1), query_rotary.stride(0), query_rotary.stride(1),
            key.stride(0), score_scale, cap, query if sinks is None else sinks, splits,
            max(1, config.tokens_per_split // config.n), int(beside_prefill), SPLIT=splits > 1, PDL=config.pdl,
            HEADS=heads, RANK=rank, ROTARY=rotary, PAGE_SIZE=cache.shape[1], WINDOW=window,
            HAS_CAP=softcap is not None, HAS_SINKS=sinks is not None, BLOCK_M=config.m, BLOCK_N=config.n,
            BLOCK_R=power_of_two(rank), BLOCK_P=power_of_two(rotary), num_warps=config.warps,
            num_stages=config.stages, **early,
        )  # fmt: skip
        if splits > 1:
            block = min(128, power_of_two(rank))
            latent_combine_kernel[(batch * heads, triton.cdiv(rank, block))](
                partial, log_sum, output, splits, PDL=config.pdl, RANK=rank, BLOCK_S=power_of_two(splits, at_least=2),
                BLOCK_R=block, num_warps=4, **early,
            )  # fmt: skip
    return output


def prefill_latents(
    latents: Latents,
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
    """Causal attention of packed queries to the latents of their rows; tiles are those of `prefill_attention`.

    What pages keep of the query tokens must be written already.

    Args:
        latents: The queries of all tiles, packed, and the pages.
        tile_rows: [N], int32.
        tile_query_starts: [N], int32.
        tile_query_lengths: [N], int32.
        tile_first_positions: [N], int32.
        scaling: Multiplies the scores; positive.
        sliding_window: As in `decode_attention`.
        softcap: As in `decode_attention`.
        chunk: As in `decode_attention`.
        sinks: As in `decode_attention`.
        config: Block sizes of one program; None asks `latent_prefill_sizes`.
        out: [T, heads, rank], contiguous, the dtype of the queries, for the result; None for a new tensor.

    Returns:
        [T, heads, rank]. Tokens outside all tiles are zeros in a new tensor, and unchanged in `out`.

    Raises:
        ValueError: A shape, stride, dtype or option is wrong; the message names the argument.
    """
    heads, rank, rotary = _check(latents, sinks)
    query, query_rotary, cache, page_table = latents
    tiles = check_index("tile_rows", tile_rows)
    check_index("tile_query_starts", tile_query_starts, tiles)
    check_index("tile_query_lengths", tile_query_lengths, tiles)
    check_index("tile_first_positions", tile_first_positions, tiles)
    window, score_scale, cap = check_options(scaling, sliding_window, softcap, chunk)
    output = _output(out, query, zeros=True)
    if tiles == 0:
        return output
    sizes = config or latent_prefill_sizes(heads, query.dtype, query.device)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        latent_prefill_kernel[(tiles * triton.cdiv(PREFILL_TILE * heads, sizes.m),)](
            query, query_rotary, cache, page_table, tile_rows, tile_query_starts, tile_query_lengths,
            tile_first_positions, output, page_table.shape[1], query.stride(0), query.stride(1),
            query_rotary.stride(0), query_rotary.stride(1), score_scale, cap, query if sinks is None else sinks,
            EARLY=supports_pdl(query.device), TILE=PREFILL_TILE, HEADS=heads, RANK=rank, ROTARY=rotary,
            PAGE_SIZE=cache.shape[1], WINDOW=window, HAS_CAP=softcap is not None, HAS_SINKS=sinks is not None,
            BLOCK_M=sizes.m, BLOCK_N=sizes.n, BLOCK_R=power_of_two(rank), BLOCK_P=power_of_two(rotary),
            num_warps=sizes.warps, num_stages=sizes.stages,
        )  # fmt: skip
    return output


def major(device: torch.device) -> int:
    """Major compute capability; 0 for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _output(out: torch.Tensor | None, query: torch.Tensor, *, zeros: bool) -> torch.Tensor:
    if out is None:
        # Zeros, because empty memory may hold NaN, which would spread from padding tokens to page 0.
        return query.new_zeros(query.shape) if zeros else query.new_empty(query.shape)
    if out.shape != query.shape or out.dtype != query.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {query.dtype} {tuple(query.shape)}, got {out.dtype} {tuple(out.shape)}"
        )
    return out


def _check(latents: Latents, sinks: torch.Tensor | None) -> tuple[int, int, int]:
    """Return the number of heads, the rank, and the size of the rotary part."""
    query, query_rotary, cache, page_table = latents
    _check_pages(cache, page_table)
    if query.dim() != 3 or query_rotary.dim() != 3 or query.shape[:2] != query_rotary.shape[:2]:
        raise ValueError(
            f"query and query_rotary must be [tokens, heads, size], got {query.shape}, {query_rotary.shape}"
        )
    heads, rank, rotary = query.shape[1], query.shape[2], query_rotary.shape[2]
    if rank + rotary != cache.shape[3] or not 1 <= rank <= MOST_RANK or rotary > MOST_ROTARY:
        raise ValueError(f"query has {rank} and {rotary} numbers a head, where cache has {cache.shape[3]}")
    for name, tensor in (("query", query), ("query_rotary", query_rotary)):
        if tensor.dtype != cache.dtype or (tensor.shape[2] and tensor.stride(2) != 1):
            raise ValueError(f"{name} must be {cache.dtype} with a last stride of 1, got {tensor.dtype}")
    check_sinks(sinks, heads)
    return heads, rank, rotary


def _check_pages(cache: torch.Tensor, page_table: torch.Tensor) -> None:
    if cache.dim() != 4 or cache.shape[2] != 1 or not cache.is_contiguous() or cache.dtype not in _DTYPES:
        raise ValueError(f"cache must be contiguous [num_pages, page_size, 1, width], got {cache.shape}")
    page_size = cache.shape[1]
    if not 16 <= page_size <= 256 or page_size & (page_size - 1):
        raise ValueError(f"cache must have a page size of 16, 32, 64, 128 or 256, got {page_size}")
    if page_table.dim() != 2 or page_table.dtype != torch.int32 or not page_table.is_contiguous():
        raise ValueError(f"page_table must be contiguous int32, got {page_table.dtype} {page_table.shape}")


def _check_key(key: torch.Tensor, tokens: int, width: int, dtype: torch.dtype) -> None:
    if key.shape != (tokens, width) or key.dtype != dtype or key.stride(1) != 1:
        raise ValueError(f"key must be {dtype} {(tokens, width)}, got {key.dtype} {tuple(key.shape)}")
