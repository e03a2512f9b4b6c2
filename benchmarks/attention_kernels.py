"""Times the paged attention kernels on a GPU: bytes of KV per second for decoding, and prefill against torch SDPA.

Shape of Llama-3.1-8B by default. Each figure comes from CUDA events around replays of one CUDA graph, which runs over
several KV caches in turn, together larger than the L2 cache, and stands beside the error of that configuration.
"""

import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--contexts", type=numbers, default=[512, 4096], help="comma-separated")
    parser.add_argument("--page-sizes", type=numbers, default=[16, 64, 256], help="comma-separated")
    parser.add_argument("--splits", type=numbers, default=[0, 1, 2, 3, 4, 8], help="comma-separated; 0: the default")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--sweep", action="store_true", help="also try other block sizes, at the first page size")
    return parser.parse_args()


def seconds_each(work: list[Callable[[], object]], replays: int = 10) -> float:
    """Seconds of one piece of work, from replays of a graph of them all."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for piece in work[:2]:
            piece()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for piece in work:
            piece()
    for _ in range(3):
        graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / replays / len(work)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


class Caches:
    """Enough KV caches of `batch` rows to fill 1 GB, over one shuffled page table; row and page 0 are scratch."""

    def __init__(self, arguments: argparse.Namespace, batch: int, context: int, page_size: int):
        per_row = -(-context // page_size)
        pages = batch * per_row + 1
        shape = (pages, page_size, arguments.kv_heads, arguments.head_dim)
        dtype = getattr(torch, arguments.dtype)
        self.bytes_read = 2 * batch * context * arguments.kv_heads * arguments.head_dim * dtype.itemsize
        count = max(2, -(-(2**30) // self.bytes_read))
        self.pairs = [
            (torch.randn(shape, dtype=dtype, device="cuda"), torch.randn(shape, dtype=dtype, device="cuda"))
            for _ in range(count)
        ]
        ids = torch.randperm(pages - 1, dtype=torch.int32, device="cuda") + 1
        self.table = torch.cat([ids.new_zeros(1, per_row), ids.view(batch, per_row)])
        self.rows = int32(list(range(1, batch + 1)))
        self.lengths = int32([context] * batch)
        self.context = context

    def row(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one row of the first cache, [1, kv_heads, context, head_dim]."""
        key, value = (cache[self.table[row].long()].flatten(0, 1)[: self.context] for cache in self.pairs[0])
        return key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def main() -> None:
    arguments = parse()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA GPU.")
    from hf_async_batching.attention import triton_kernels as kernels
    from hf_async_batching.attention.triton_decode import BlockSizes
    from hf_async_batching.bench.machine import copy_bandwidth

    torch.manual_seed(0)
    heads, batch, size = arguments.heads, arguments.batch, arguments.head_dim
    dtype, scaling = getattr(torch, arguments.dtype), arguments.head_dim**-0.5
    copy = copy_bandwidth(torch.device("cuda", torch.cuda.current_device()))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {kernels.triton.__version__}")
    print(f"{heads} heads, {arguments.kv_heads} kv heads, head size {size}, {arguments.dtype}, batch {batch}")
    print(f"copy bandwidth {copy / 1e9:.0f} GB/s\n")

    def decode_row(caches: Caches, splits: int | None, label: str) -> None:
        query = torch.randn(batch, heads, size, dtype=dtype, device="cuda")

        def decode(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return kernels.decode_attention(
                query, key, value, caches.table, caches.rows, caches.lengths, scaling=scaling, num_splits=splits
            )

        key, value = caches.row(batch)
        expected = F.scaled_dot_product_attention(
            query[-1:, :, None].float(), key.float(), value.float(), scale=scaling, enable_gqa=True
        )
        error = relative_error(decode(*caches.pairs[0])[-1], expected[0, :, 0])
        seconds = seconds_each([lambda pair=pair: decode(*pair) for pair in caches.pairs])  # type: ignore[misc]
        speed = caches.bytes_read / seconds
        print(f"{label} {seconds * 1e6:9.1f} {speed / 1e9:7.0f} {speed / copy:8.0%} {error:9.1e}", flush=True)

    print("decode  context  page  splits        us    GB/s  of copy     error")
    for context, page_size in itertools.product(arguments.contexts, arguments.page_sizes):
        caches = Caches(arguments, batch, context, page_size)
        for splits in arguments.splits:
            shown = splits or f"={kernels.default_num_splits(batch, arguments.kv_heads, 'cuda')}"
            decode_row(caches, splits or None, f"        {context:7d} {page_size:5d} {shown:>7}")

    if arguments.sweep:
        print("\nsweep   context  tokens  warps  stages        us    GB/s  of copy     error")
        rule = kernels.decode_block_sizes
        for context in arguments.contexts:
            caches = Caches(arguments, batch, context, arguments.page_sizes[0])
            for tokens, warps, stages in itertools.product((16, 32, 64), (1, 2, 4), (2, 3, 4, 5)):
                sizes = BlockSizes(rule(size, size, heads // arguments.kv_heads, dtype).m, tokens, warps, stages)
                kernels.decode_block_sizes = lambda *_, sizes=sizes: sizes  # type: ignore[assignment, misc]
                decode_row(caches, None, f"        {context:7d} {tokens:7d} {warps:6d} {stages:7d}")
        kernels.decode_block_sizes = rule

    print("\nprefill                               page        us  TFLOP/s     error")
    tokens = arguments.prefill
    flops = 2 * tokens * tokens * size * heads  # two products, half of the square
    query = torch.randn(tokens, heads, size, dtype=dtype, device="cuda")
    starts = list(range(0, tokens, kernels.PREFILL_TILE))
    tile_lengths = [min(kernels.PREFILL_TILE, tokens - start) for start in starts]
    tiles = [int32(column) for column in ([1] * len(starts), starts, tile_lengths, starts)]
    for page_size in arguments.page_sizes:
        caches = Caches(arguments, 1, tokens, page_size)
        key, value = caches.row(1)

        def sdpa(key: torch.Tensor = key, value: torch.Tensor = value) -> torch.Tensor:
            return F.scaled_dot_product_attention(
                query.transpose(0, 1)[None], key, value, is_causal=True, scale=scaling, enable_gqa=True
            )

        def prefill(cache: tuple[torch.Tensor, torch.Tensor], table: torch.Tensor = caches.table) -> torch.Tensor:
            return kernels.prefill_attention(query, *cache, table, *tiles, scaling=scaling)

        if page_size == arguments.page_sizes[0]:
            seconds = seconds_each([sdpa] * 8)
            print(
                f"        torch SDPA, {tokens:5d} tokens        - {seconds * 1e6:9.1f} {flops / seconds / 1e12:8.0f}"
            )
        error = relative_error(prefill(caches.pairs[0]).transpose(0, 1)[None], sdpa())
        seconds = seconds_each([lambda pair=pair: prefill(pair) for pair in caches.pairs[:8]])  # type: ignore[misc]
        print(
            f"        prefill_attention, {tokens:5d} tokens {page_size:4d} {seconds * 1e6:9.1f} "
            f"{flops / seconds / 1e12:8.0f} {error:9.1e}"
        )

    print("\nmixed step: decoding rows as tiles of one token\n        context  page        us    GB/s  of copy")
    query = torch.randn(batch, heads, size, dtype=dtype, device="cuda")
    page_size = arguments.page_sizes[0]
    for context in arguments.contexts:
        caches = Caches(arguments, batch, context, page_size)
        tiles = [caches.rows, int32(list(range(batch))), int32([1] * batch), caches.lengths - 1]

        def decode_tiles(
            cache: tuple[torch.Tensor, torch.Tensor], caches: Caches = caches, tiles: list[torch.Tensor] = tiles
        ) -> torch.Tensor:
            return kernels.prefill_attention(query, *cache, caches.table, *tiles, scaling=scaling)

        seconds = seconds_each([lambda pair=pair: decode_tiles(pair) for pair in caches.pairs])  # type: ignore[misc]
        speed = caches.bytes_read / seconds
        print(f"        {context:7d} {page_size:5d} {seconds * 1e6:9.1f} {speed / 1e9:7.0f} {speed / copy:8.0%}")


if __name__ == "__main__":
    main()
