"""The kernels of layers with states, on small steps of every kind; no state that a step should not read is written."""

from __future__ import annotations

import itertools

import torch

from hf_async_batching.attention.base import DecodeContext, MixedContext
from hf_async_batching.kv_cache.state_tables import StateTables
from hf_async_batching.recurrent.step import RecurrentStep

_ROWS, _TILE = 6, 16
_PIECES = ((2, 40, 0), (4, 3, 7), (5, 1, 2))
"""Pieces of prompts: row, tokens, position of the first."""


def states(device: torch.device) -> None:
    """Rows decode alone, and one row begins. Then pieces of prompts come beside them, padded at the end."""
    steps = [_decode(device), _mixed(device)]
    _convolutions(steps, device)
    _delta_rules(steps, device)
    _mamba2_scans(steps, device)


def _decode(device: torch.device) -> RecurrentStep:
    rows, positions = _int32([1, 3, 0], device), _int32([9, 0, 0], device)
    return _step(DecodeContext(rows[:0], rows, positions, positions + 1), device)


def _mixed(device: torch.device) -> RecurrentStep:
    rows, positions, tiles = [1], [9], [(1, 0, 1, 9)]
    for row, count, begin in _PIECES:
        first = len(rows)
        tiles += [(row, first + i, min(_TILE, count - i), begin + i) for i in range(0, count, _TILE)]
        rows += [row] * count
        positions += range(begin, begin + count)
    rows, positions, tiles = [*rows, 0, 0], [*positions, 0, 0], [*tiles, (0, 0, 0, 0)]
    columns = [_int32([tile[i] for tile in tiles], device) for i in range(4)]
    context = MixedContext(
        columns[0][:0], _int32(rows, device), _int32(positions, device), *columns, decode_lengths=_int32([10], device)
    )
    return _step(context, device)


def _step(context: DecodeContext | MixedContext, device: torch.device) -> RecurrentStep:
    return RecurrentStep(context, StateTables(_ROWS, device), {})


def _convolutions(steps: list[RecurrentStep], device: torch.device) -> None:
    from hf_async_batching.recurrent.triton_conv import row_conv

    for width, activation, dtype in ((4, "silu", torch.bfloat16), (3, "", torch.float32)):
        weight, bias = _random(300, width, device=device).to(dtype), _random(300, device=device).to(dtype)
        for step in steps:
            hidden = _random(1, _tokens(step), 300, device=device).to(dtype).transpose(1, 2)
            out = row_conv(step, ("conv", width), hidden, weight, bias if width == 3 else None, activation)
            _check_finite(out)


def _delta_rules(steps: list[RecurrentStep], device: torch.device) -> None:
    from hf_async_batching.recurrent.triton_delta_rule import row_delta_rule

    # Prompts go in chunks, and token by token.
    for per_channel, dtype in ((False, torch.bfloat16), (False, torch.float32), (True, torch.bfloat16)):
        for step in steps:
            tokens, heads = _tokens(step), 2 if per_channel else 4
            query, key = (_random(1, tokens, 2, 100, device=device).to(dtype) for _ in range(2))
            value = _random(1, tokens, heads, 72, device=device).to(dtype)
            g = -_random(1, tokens, heads, *([100] if per_channel else []), device=device).abs()
            beta = _random(1, tokens, heads, device=device).sigmoid().bfloat16()
            name = ("delta", per_channel)
            _check_finite(row_delta_rule(step, name, query, key, value, g, beta, normalize=True))


def _mamba2_scans(steps: list[RecurrentStep], device: torch.device) -> None:
    from hf_async_batching.recurrent.triton_mamba2 import row_mamba2_scan

    for step, dtype in itertools.product(steps, (torch.bfloat16, torch.float32)):
        tokens = _tokens(step)
        hidden, dt = _random(1, tokens, 4, 40, device=device).to(dtype), _random(1, tokens, 4, device=device)
        B, C = (_random(1, tokens, 2, 100, device=device).to(dtype) for _ in range(2))
        A, D, bias = -_random(4, device=device).abs(), _random(4, device=device), _random(4, device=device)
        out = row_mamba2_scan(
            step, "scan", hidden, dt.to(dtype), A, B, C, D=D, dt_bias=bias, softplus=True, limit=(0.0, 10.0)
        )
        _check_finite(out)


def _tokens(step: RecurrentStep) -> int:
    return step.context.rows.shape[0]


def _random(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device)


def _int32(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _check_finite(out: torch.Tensor) -> None:
    if not out.isfinite().all():
        raise RuntimeError("a result is not finite")
