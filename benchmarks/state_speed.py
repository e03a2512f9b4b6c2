"""How fast layers with states compute steps: microseconds and GB/s of each layer, beside the copy bandwidth.

python -m benchmarks.state_speed --rows 1,8,32,256
python -m benchmarks.state_speed --rows= --prompts 64,512,2048,8192   # one prompt of so many tokens
python -m benchmarks.state_speed --rows 31 --mixed 512                # a prompt beside rows that decode
python -m benchmarks.state_speed --rows= --prompts 512,2048 --layers delta --sweep
python -m benchmarks.state_speed --prompts 65,2048 --errors           # of chunks, against token by token

Prompts are measured in chunks (`_CHUNKS`) and token by token (`_PROMPT`). The shapes are one layer of Qwen3.5-9B
(gated delta rule), Nemotron-H-8B and Falcon-H1-7B (Mamba-2), with float32 states. `--sweep` tries other settings:
columns and warps of a program; chunk, columns, warps and stages for prompts in chunks. Bytes are those of the rows'
states, read and written once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_async_batching.attention.base import DecodeContext, MixedContext
from hf_async_batching.attention.triton_prefill import PREFILL_TILE
from hf_async_batching.bench.machine import look_at
from hf_async_batching.kv_cache.state_tables import StateShape, StateTables
from hf_async_batching.recurrent import triton_delta_rule, triton_mamba2
from hf_async_batching.recurrent.step import RecurrentStep
from hf_async_batching.recurrent.triton_tiles import ChunkSetting

_REPEATS = 20
_BY_TOKEN = list(itertools.product((8, 16, 32, 64), (1, 2, 4, 8)))
_IN_CHUNKS = [ChunkSetting(*one) for one in itertools.product((32, 64), (16, 32, 64), (4, 8), (1, 2, 3))]

Run = Callable[[], torch.Tensor]
Make = Callable[[RecurrentStep, torch.device], tuple[Run, int]]
Tables = Callable[[int], StateTables]


def main() -> None:
    def counts(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=counts, default=[1, 8, 32, 256])
    parser.add_argument("--prompts", type=counts, default=[])
    parser.add_argument("--mixed", type=counts, default=[], help="prompts beside the first of --rows")
    parser.add_argument("--layers", default="", help="only layers whose name has this part")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--matrix-warps", type=int, help="warps of the kernel that prepares chunks of the delta rule")
    parser.add_argument("--errors", action="store_true", help="errors of prompts in place of times")
    given = parser.parse_args()
    if given.matrix_warps:
        triton_delta_rule._MATRIX_WARPS = given.matrix_warps
    device = torch.device("cuda")
    machine = look_at(device)
    print(f"{machine.card}, copy {machine.copy_bandwidth / 1e9:.0f} GB/s")
    with torch.inference_mode():
        for name, (make, shape) in LAYERS.items():
            if given.layers not in name:
                continue
            shapes: dict[Hashable, StateShape] = {"scan": StateShape(shape, torch.float32)}

            def tables(rows: int, shapes: dict[Hashable, StateShape] = shapes) -> StateTables:
                return StateTables(rows + 1, device, shapes)

            if given.errors:
                for tokens in given.prompts:
                    _print_errors(name, make, tokens, tables)
                continue
            for rows in given.rows if not given.mixed else []:
                _measure(name, make, f"{rows} rows", "_DECODE", functools.partial(_decode, tables(rows)), given.sweep)
            for tokens, rows in [(one, 0) for one in given.prompts] + [(one, given.rows[0]) for one in given.mixed]:
                label = f"{tokens} tokens" + (f" beside {rows} rows" if rows else "")
                made = functools.partial(_mixed, tokens, tables(rows + 1))
                _measure(name, make, label, "_CHUNKS", made, given.sweep)
                if not given.sweep:
                    with _by_token(_module(make)):
                        _measure(name, make, label, "_PROMPT", made, sweep=False)


def _module(make: Make) -> Any:
    return triton_delta_rule if make is _delta_rule else triton_mamba2


@contextmanager
def _by_token(module: Any) -> Iterator[None]:
    """Prompts are computed token by token."""
    usual = module.in_chunks
    module.in_chunks = lambda *_: False
    try:
        yield
    finally:
        module.in_chunks = usual


def _measure(
    name: str, make: Make, label: str, attribute: str, step: Callable[[], RecurrentStep], sweep: bool
) -> None:
    """Print the times of a step, by the usual setting or by all of them."""
    module = _module(make)
    usual = getattr(module, attribute)
    choices: list[Any] = (_IN_CHUNKS if attribute == "_CHUNKS" else _BY_TOKEN) if sweep else [usual]
    for choice in choices:
        setattr(module, attribute, choice)
        try:
            seconds, moved = _time(make, step())
        except Exception as error:
            print(f"{name}, {label}, {tuple(choice)}: {type(error).__name__}", flush=True)
            continue
        finally:
            setattr(module, attribute, usual)
        mark = "*" if choice == usual else ""
        speed = f"{seconds * 1e6:.1f} us, {moved / seconds / 1e9:.0f} GB/s"
        print(f"{name}, {label}, {attribute} {tuple(choice)}{mark}: {speed}", flush=True)


def _time(make: Make, step: RecurrentStep) -> tuple[float, int]:
    """Seconds of one launch, and the bytes of states that it moves."""
    run, moved = make(step, step.context.rows.device)
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


def _print_errors(name: str, make: Make, tokens: int, tables: Tables) -> None:
    """Print the distance of results and states in chunks from the same token by token, for equal inputs.

    Token by token all sums are float32. What rounds results to bfloat16 is in both.
    """
    found = []
    for by_token in (False, True):
        torch.manual_seed(0)
        step = _mixed(tokens, tables(1))
        run, _ = make(step, step.context.rows.device)
        if by_token:
            with _by_token(_module(make)):
                out = run()
        else:
            out = run()
        found.append((out.float(), step.tables.table("scan", *step.tables.shapes["scan"])[1]))
    distances = [float((one - other).norm() / other.norm()) for one, other in zip(*found, strict=True)]
    print(f"{name}, {tokens} tokens: results {distances[0]:.2e}, states {distances[1]:.2e}", flush=True)


def _decode(tables: StateTables) -> RecurrentStep:
    """A step in which all rows decode."""
    index = torch.arange(1, tables.num_rows, dtype=torch.int32, device=_device_of(tables))
    return RecurrentStep(DecodeContext(index[:0], index, index * 0 + 9, index * 0 + 10), tables, {})


def _mixed(tokens: int, tables: StateTables) -> RecurrentStep:
    """A prompt of row 1 behind all other rows, which decode."""
    rows, device = tables.num_rows - 2, _device_of(tables)
    decodes = torch.arange(2, rows + 2, dtype=torch.int32, device=device)
    offsets = torch.arange(0, tokens, PREFILL_TILE, dtype=torch.int32, device=device)
    ones = torch.ones_like(decodes)
    context = MixedContext(
        ones[:0],
        torch.cat([decodes, torch.ones(tokens, dtype=torch.int32, device=device)]),
        torch.cat([ones * 9, torch.arange(tokens, dtype=torch.int32, device=device)]),
        torch.cat([decodes, torch.ones_like(offsets)]),
        torch.cat([decodes - 2, offsets + rows]),
        torch.cat([ones, (tokens - offsets).clamp(max=PREFILL_TILE)]),
        torch.cat([ones * 9, offsets]),
        ones * 10,
    )
    return RecurrentStep(context, tables, {})


def _device_of(tables: StateTables) -> torch.device:
    return tables.table("scan", *tables.shapes["scan"]).device


def _delta_rule(step: RecurrentStep, device: torch.device) -> tuple[Run, int]:
    tokens = step.context.rows.shape[0]
    query, key = (torch.randn(1, tokens, 16, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    value = torch.randn(1, tokens, 32, 128, device=device, dtype=torch.bfloat16)
    g, beta = -torch.rand(1, tokens, 32, device=device), torch.rand(1, tokens, 32, device=device).bfloat16()

    def run() -> torch.Tensor:
        return triton_delta_rule.row_delta_rule(step, "scan", query, key, value, g, beta, normalize=True)

    return run, 2 * 32 * 128 * 128 * 4 * (step.tables.num_rows - 1)


def _nemotron(step: RecurrentStep, device: torch.device) -> tuple[Run, int]:
    return _mamba2(step, device, heads=128, dim=64, groups=8, size=128)


def _falcon(step: RecurrentStep, device: torch.device) -> tuple[Run, int]:
    return _mamba2(step, device, heads=24, dim=128, groups=1, size=256)


def _mamba2(
    step: RecurrentStep, device: torch.device, *, heads: int, dim: int, groups: int, size: int
) -> tuple[Run, int]:
    tokens = step.context.rows.shape[0]
    hidden = torch.randn(1, tokens, heads, dim, device=device, dtype=torch.bfloat16)
    dt = torch.randn(1, tokens, heads, device=device, dtype=torch.bfloat16)
    B, C = (torch.randn(1, tokens, groups, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    A, D, bias = -torch.rand(heads, device=device), torch.rand(heads, device=device), torch.rand(heads, device=device)

    def run() -> torch.Tensor:
        return triton_mamba2.row_mamba2_scan(
            step, "scan", hidden, dt, A, B, C, D=D, dt_bias=bias, softplus=True, limit=(0.0, float("inf"))
        )

    return run, 2 * heads * dim * size * 4 * (step.tables.num_rows - 1)


LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "gated delta rule": (_delta_rule, (32, 128, 128)),
    "mamba-2, 128 x 64 x 128": (_nemotron, (128, 64, 128)),
    "mamba-2, 24 x 128 x 256": (_falcon, (24, 128, 256)),
}


if __name__ == "__main__":
    main()
