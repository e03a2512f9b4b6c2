"""A sequence in random pieces and single tokens, beside another row, is computed as the family's function does it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from recurrent.step_cases import Case, context_of
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from hf_async_batching.kv_cache.state_tables import StateTables
from hf_async_batching.recurrent import reference
from hf_async_batching.recurrent.step import RecurrentStep

ROWS = 6
LENGTHS = {4: 29, 2: 18}
"""Tokens of the sequences in two rows."""

Tensors = tuple[torch.Tensor, ...]


class Layer(NamedTuple):
    """A function of a layer.

    Attributes:
        tokens: Makes the inputs of a number of tokens.
        token_dim: The dimension of tokens in inputs and results.
        ours: Computes a step.
        whole: Computes a sequence at once.
    """

    tokens: Callable[[int], Tensors]
    token_dim: int
    ours: Callable[[RecurrentStep, Tensors], torch.Tensor]
    whole: Callable[[Tensors], torch.Tensor]


def convolution(width: int, activation: str | None, *, has_bias: bool) -> Layer:
    weight, bias = torch.randn(12, width), torch.randn(12) if has_bias else None
    return Layer(
        lambda count: (torch.randn(1, 12, count),),
        2,
        lambda step, given: reference.causal_conv(
            step, "conv", qwen.causal_conv1d_fn, *given, weight, bias, activation=activation
        ),
        lambda given: qwen.causal_conv1d_fn(*given, weight, bias, activation=activation),
    )


def delta_rule(chunk: Callable[..., Any], key_heads: int, *, per_channel: bool, normalize: bool) -> Layer:
    heads, key_dim, dim = 4, 6, 10

    def tokens(count: int) -> Tensors:
        keys = [torch.randn(1, count, key_heads, key_dim) * (1 if normalize else 0.4) for _ in range(2)]
        g = -torch.rand(1, count, heads, *([key_dim] if per_channel else [])) / 4
        return (*keys, torch.randn(1, count, heads, dim), g, torch.rand(1, count, heads))

    def whole(given: Tensors) -> torch.Tensor:
        *states, g, beta = given
        out: torch.Tensor = chunk(*states, g=g, beta=beta, use_qk_l2norm_in_kernel=normalize)[0]
        return out

    def ours(step: RecurrentStep, given: Tensors) -> torch.Tensor:
        query, key, value, g, beta = given
        return reference.delta_rule(step, "scan", chunk, query, key, value, g, beta, normalize=normalize)

    return Layer(tokens, 1, ours, whole)


def mamba2_scan(*, softplus: bool) -> Layer:
    heads, dim, groups, size = 4, 10, 2, 6
    A, D, bias = -torch.rand(heads) / 4, torch.randn(heads) if softplus else None, torch.rand(heads)

    def tokens(count: int) -> Tensors:
        B, C = (torch.randn(1, count, groups, size) for _ in range(2))
        dt = torch.randn(1, count, heads)
        return torch.randn(1, count, heads, dim), dt if softplus else dt.abs() / 4, B, C

    def ours(step: RecurrentStep, given: Tensors) -> torch.Tensor:
        x, dt, B, C = given
        return reference.mamba2_scan(
            step, "scan", mamba2.mamba2_chunk_scan, x, dt, A, B, C,
            D=D, dt_bias=bias, softplus=softplus, chunk_size=4,
        )  # fmt: skip

    def whole(given: Tensors) -> torch.Tensor:
        x, dt, B, C = given
        out: torch.Tensor = mamba2.mamba2_chunk_scan(x, dt, A, B, C, 4, D=D, dt_bias=bias, dt_softplus=softplus)
        return out

    return Layer(tokens, 1, ours, whole)


def mamba_scan(*, full: bool) -> Layer:
    channels, size = 12, 6
    A = -torch.rand(channels, size) / 4
    D, bias = (torch.randn(channels), torch.rand(channels)) if full else (None, None)

    def tokens(count: int) -> Tensors:
        x, dt, z = (torch.randn(1, channels, count) for _ in range(3))
        B, C = (torch.randn(1, size, count) for _ in range(2))
        return x, dt if full else dt.abs() / 4, B, C, z

    def ours(step: RecurrentStep, given: Tensors) -> torch.Tensor:
        x, dt, B, C, z = given
        gate = z if full else None
        return reference.mamba_scan(step, "scan", x, dt, A, B, C, D=D, z=gate, dt_bias=bias, softplus=full)

    def whole(given: Tensors) -> torch.Tensor:
        x, dt, B, C, z = given
        out: torch.Tensor = mamba.mamba_selective_scan(
            x, dt, A, B, C, D=D, z=z if full else None, delta_bias=bias, delta_softplus=full
        )
        return out

    return Layer(tokens, 2, ours, whole)


LAYERS: dict[str, Callable[[], Layer]] = {
    "convolution": lambda: convolution(4, "silu", has_bias=True),
    "narrow convolution": lambda: convolution(2, None, has_bias=False),
    "gated delta rule": lambda: delta_rule(qwen.torch_chunk_gated_delta_rule, 2, per_channel=False, normalize=True),
    "Kimi's": lambda: delta_rule(kimi.chunk_kimi_delta_attention, 4, per_channel=True, normalize=True),
    "Kimi's, not normalized": lambda: delta_rule(
        kimi.chunk_kimi_delta_attention, 4, per_channel=True, normalize=False
    ),
    "mamba2": lambda: mamba2_scan(softplus=True),
    "mamba2, plain": lambda: mamba2_scan(softplus=False),
    "mamba": lambda: mamba_scan(full=True),
    "mamba, plain": lambda: mamba_scan(full=False),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def random_case(rng: random.Random, done: dict[int, int]) -> Case:
    """Tokens of rows that have more, as decoding rows or as pieces; `done` counts them."""
    decodes: list[tuple[int, int]] = []
    pieces: list[tuple[int, int, int]] = []
    for row in rng.sample(sorted(LENGTHS), len(LENGTHS)):
        left = LENGTHS[row] - done[row]
        count = min(left, rng.choice([0, 1, 1, 1, 2, 3, 7]))
        if count == 1 and rng.random() < 0.8:
            decodes.append((row, done[row]))
        elif count:
            pieces.append((row, count, done[row]))
        done[row] += count
    decodes += [(0, 0)] * rng.choice([0, 0, 2])  # padding rows
    if not decodes and not pieces:
        return random_case(rng, done)
    return Case(decodes, pieces or None, rng.choice([0, 3]) if pieces else 0)


def run_rows(layer: Layer, sequences: dict[int, Tensors], tables: StateTables, rng: random.Random) -> Tensors:
    """The results of the rows, in the order of `LENGTHS`, computed step by step."""
    done = dict.fromkeys(LENGTHS, 0)
    out: dict[int, list[torch.Tensor]] = {row: [] for row in LENGTHS}
    while any(done[row] < length for row, length in LENGTHS.items()):
        context = context_of(random_case(rng, done), rng.randint(1, 5))
        tokens = list(zip(context.rows.tolist(), context.positions.tolist(), strict=True))
        junk = layer.tokens(1)
        given = tuple(
            torch.cat(
                [
                    sequences[row][i].narrow(layer.token_dim, position, 1) if row else junk[i]
                    for row, position in tokens
                ],
                layer.token_dim,
            )
            for i in range(len(junk))
        )
        result = layer.ours(RecurrentStep(context, tables, {}), given)
        for (row, _), token in zip(tokens, result.split(1, layer.token_dim), strict=True):
            if row:
                out[row].append(token)
    return tuple(torch.cat(out[row], layer.token_dim) for row in LENGTHS)


@each_layer
@pytest.mark.parametrize("seed", range(4))
def test_a_sequence_in_pieces(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    layer, tables = LAYERS[name](), StateTables(ROWS, torch.device("cpu"))
    rng = random.Random(seed)
    # The second sequences of the rows begin where the tables hold what cannot be mistaken for nothing.
    for _ in range(2):
        sequences = {row: layer.tokens(length) for row, length in LENGTHS.items()}
        got = run_rows(layer, sequences, tables, rng)
        for row, result in zip(LENGTHS, got, strict=True):
            torch.testing.assert_close(result, layer.whole(sequences[row]), atol=1e-4, rtol=1e-4)
        for key, (shape, dtype) in tables.shapes.items():
            tables.table(key, shape, dtype).fill_(torch.nan)


@each_layer
def test_rows_that_are_not_in_a_step_keep_their_states(name: str) -> None:
    torch.manual_seed(9)
    layer, tables = LAYERS[name](), StateTables(ROWS, torch.device("cpu"))
    everything = Case([(1, 0)], [(3, 5, 0), (2, 4, 0), (5, 2, 0)])
    for case in (everything, Case([(2, 4)], [(3, 2, 5)]), Case([(3, 7), (2, 5), (0, 0)])):
        before = [tables.table(key, *shape).clone() for key, shape in tables.shapes.items()]
        context = context_of(case)
        layer.ours(RecurrentStep(context, tables, {}), layer.tokens(context.rows.shape[0]))
        after = [tables.table(key, *shape) for key, shape in tables.shapes.items()]
        rows = {row for row, *_ in (*case.decodes, *(case.pieces or []))}
        for old, new in zip(before, after, strict=len(before) == len(after)):
            for row in range(1, ROWS):
                assert torch.equal(old[row], new[row]) != (row in rows)


@each_layer
@pytest.mark.parametrize(
    "case", [Case([(3, 5), (2, 1)]), Case([(1, 4)], [(4, 6, 0), (5, 3, 2)])], ids=["rows", "mixed"]
)
def test_a_frozen_step_computes_the_same_and_writes_nothing(name: str, case: Case) -> None:
    torch.manual_seed(4)
    layer, tables = LAYERS[name](), StateTables(ROWS, torch.device("cpu"))
    context = context_of(case)
    given = layer.tokens(context.rows.shape[0])
    layer.ours(RecurrentStep(context, tables, {}, frozen=True), given)  # makes the table
    ((key, shape),) = tables.shapes.items()
    table = tables.table(key, *shape)
    assert not table.any()
    table.normal_(0, 0.3)
    before = table.clone()
    first = layer.ours(RecurrentStep(context, tables, {}, frozen=True), given)
    assert torch.equal(table, before)
    assert torch.equal(layer.ours(RecurrentStep(context, tables, {}), given), first)
    assert not torch.equal(table, before)


@each_layer
def test_a_piece_without_a_row_has_no_result(name: str) -> None:
    torch.manual_seed(4)
    layer, tables = LAYERS[name](), StateTables(ROWS, torch.device("cpu"))
    context = context_of(Case([], [(1, 3, 0)], padding=4))
    out = layer.ours(RecurrentStep(context, tables, {}), layer.tokens(7))
    assert out.isfinite().all()
    assert all(not tables.table(key, *shape)[0].any() for key, shape in tables.shapes.items())
