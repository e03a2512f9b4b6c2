"""How fast layers with states read and write them: GB/s of each kernel's decode step, beside the copy bandwidth.

python -m benchmarks.state_speed --rows 1,8,32,256
python -m benchmarks.state_speed --prompts 64,512,2048   # one prompt of so many tokens

The shapes are one layer of Qwen3.5-9B (gated delta rule), Nemotron-H-8B and Falcon-H1-7B (Mamba-2), with float32
states. Other states lie between the rows' states of this layer, as in an engine: `--beside` MiB per row, or 0.
`--sweep` tries other numbers of columns and warps for each program.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch

from hf_async_batching.attention.base import DecodeContext, MixedContext
from hf_async_batching.bench.machine import look_at
from hf_async_batching.kv_cache.state_tables import StateShape, StateTables
from hf_async_batching.recurrent import triton_delta_rule, triton_mamba2
from hf_async_batching.recurrent.step import RecurrentStep

_TILE, _REPEATS = 64, 20
_CHOICES = list(itertools.product((8, 16, 32, 64), (1, 2, 4, 8)))


def main() -> None:
    def counts(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=counts, default=[1, 8, 32, 256])
    parser.add_argument("--prompts", type=counts, default=[])
    parser.add_argument("--beside", type=int, default=48, help="MiB of other states per row")
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args()
    device = torch.device("cuda")
    machine = look_at(device)
    print(f"{machine.card}, copy {machine.copy_bandwidth / 1e9:.0f} GB/s")
    with torch.inference_mode():
        for name, make, shape in (
            ("gated delta rule", _delta_rule, (32, 128, 128)),
            ("mamba-2, 128 x 64 x 128", _nemotron, (128, 64, 128)),
            ("mamba-2, 24 x 128 x 256", _falcon, (24, 128, 256)),
        ):
            beside = StateShape((given.beside << 18,), torch.float32)
            shapes = {"beside": beside, "scan": StateShape(shape, torch.float32)}
            module = triton_delta_rule if make is _delta_rule else triton_mamba2
            for attribute, sizes in (("_DECODE", given.rows), ("_PROMPT", given.prompts)):
                for size in sizes:
                    decodes = attribute == "_DECODE"
                    tables = StateTables(size + 1 if decodes else 2, device, shapes)
                    step = _decode(size, tables, device) if decodes else _prompt(size, tables, device)
                    usual = getattr(module, attribute)
                    for choice in _CHOICES if given.sweep else [usual]:
                        setattr(module, attribute, choice)
                        try:
                            seconds, moved = _time(make, step, device)
                        except Exception as error:
                            print(f"{name}, {size}, {choice}: {type(error).__name__}")
                            continue
                        mark = "*" if choice == usual else ""
                        speed = f"{seconds * 1e6:.1f} us, {moved / seconds / 1e9:.0f} GB/s"
                        print(f"{name}, {attribute} {size}, {choice}{mark}: {speed}", flush=True)
                    setattr(module, attribute, usual)


def _time(
    make: Callable[..., tuple[Callable[[], object], int]], step: RecurrentStep, device: torch.device
) -> tuple[float, int]:
    """Seconds of one launch, and the bytes of states that it moves."""
    run, moved = make(step, device)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_REPEATS):
            run()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / _REPEATS, moved


def _decode(rows: int, tables: StateTables, device: torch.device) -> RecurrentStep:
    index = torch.arange(1, rows + 1, dtype=torch.int32, device=device)
    return RecurrentStep(DecodeContext(index[:0], index, index * 0 + 9, index * 0 + 10), tables, {})


def _prompt(tokens: int, tables: StateTables, device: torch.device) -> RecurrentStep:
    first = torch.arange(0, tokens, _TILE, dtype=torch.int32, device=device)
    ones = torch.ones(tokens, dtype=torch.int32, device=device)
    context = MixedContext(
        ones[:0], ones, torch.arange(tokens, dtype=torch.int32, device=device), torch.ones_like(first), first,
        (tokens - first).clamp(max=_TILE), first, ones[:0],
    )  # fmt: skip
    return RecurrentStep(context, tables, {})


def _delta_rule(step: RecurrentStep, device: torch.device) -> tuple[Callable[[], object], int]:
    tokens = step.context.rows.shape[0]
    query, key = (torch.randn(1, tokens, 16, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    value = torch.randn(1, tokens, 32, 128, device=device, dtype=torch.bfloat16)
    g, beta = -torch.rand(1, tokens, 32, device=device), torch.rand(1, tokens, 32, device=device).bfloat16()

    def run() -> object:
        return triton_delta_rule.row_delta_rule(step, "scan", query, key, value, g, beta, normalize=True)

    return run, 2 * 32 * 128 * 128 * 4 * (step.tables.num_rows - 1)


def _nemotron(step: RecurrentStep, device: torch.device) -> tuple[Callable[[], object], int]:
    return _mamba2(step, device, heads=128, dim=64, groups=8, size=128)


def _falcon(step: RecurrentStep, device: torch.device) -> tuple[Callable[[], object], int]:
    return _mamba2(step, device, heads=24, dim=128, groups=1, size=256)


def _mamba2(
    step: RecurrentStep, device: torch.device, *, heads: int, dim: int, groups: int, size: int
) -> tuple[Callable[[], object], int]:
    tokens = step.context.rows.shape[0]
    hidden = torch.randn(1, tokens, heads, dim, device=device, dtype=torch.bfloat16)
    dt = torch.randn(1, tokens, heads, device=device, dtype=torch.bfloat16)
    B, C = (torch.randn(1, tokens, groups, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    A, D, bias = -torch.rand(heads, device=device), torch.rand(heads, device=device), torch.rand(heads, device=device)

    def run() -> object:
        return triton_mamba2.row_mamba2_scan(
            step, "scan", hidden, dt, A, B, C, D=D, dt_bias=bias, softplus=True, limit=(0.0, float("inf"))
        )

    return run, 2 * heads * dim * size * 4 * (step.tables.num_rows - 1)


if __name__ == "__main__":
    main()
