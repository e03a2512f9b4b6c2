"""Prompts in chunks, as Triton kernels: against the recurrence token by token in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from recurrent.step_cases import NO_PAGES, Case, context_of, step_of
from torch.nn import functional
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from hf_async_batching.attention.base import AttentionContext, MixedContext
from hf_async_batching.recurrent import reference
from hf_async_batching.recurrent.step import RecurrentStep, decoding

pytest.importorskip("triton")

from support.interpreter import round_to_bfloat16, widen_bfloat16_products

from hf_async_batching.recurrent import triton_delta_rule, triton_mamba2, triton_tiles
from hf_async_batching.recurrent.triton_tiles import in_chunks

Tensors = dict[str, torch.Tensor]
Run = Callable[[RecurrentStep, Tensors], torch.Tensor]

ROWS = 16
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 133)
RAGGED = Case([(12, 7), (0, 0), (14, 0)], [(row, length, 0) for row, length in enumerate(LENGTHS, 1)], 5)
CONTINUED = RAGGED._replace(pieces=[(row, length, 9) for row, length in enumerate(LENGTHS, 1)])
LONG = Case([], [(3, 135, 0), (1, 37, 4)])  # both cross chunks, one crosses a tile
PAIR = Case([], [(3, 70, 0), (1, 21, 4)])  # both cross chunks
# For what no border of a tile can change.
SHORT_LENGTHS = (1, 17, 65, 20)
SHORT = Case([(12, 7), (0, 0), (14, 0)], [(row, length, 0) for row, length in enumerate(SHORT_LENGTHS, 1)], 5)
SHORT_CONTINUED = SHORT._replace(pieces=[(row, length, 9) for row, length in enumerate(SHORT_LENGTHS, 1)])


pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter: its tensors are on the CPU"),
]


@pytest.fixture(autouse=True)
def bfloat16_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    widen_bfloat16_products(monkeypatch)
    round_to_bfloat16(monkeypatch)


class Layer(NamedTuple):
    """A layer with states.

    Attributes:
        module: The module of its kernels.
        state: Shape of a row's state.
        tokens: Makes the inputs of a number of tokens.
        ours: Computes a step by kernels.
        family: Computes a step by the family's function.
        exact: State after a token in float64, and its result; the last argument says whether it decodes.
    """

    module: Any
    state: tuple[int, ...]
    tokens: Callable[[int], Tensors]
    ours: Run
    family: Run
    exact: Callable[[torch.Tensor, Tensors, int, bool], tuple[torch.Tensor, torch.Tensor]]


def delta_rule(heads: int = 2, key_heads: int = 1, key_dim: int = 32, dim: int = 24, alike: float = 0.0) -> Layer:
    def tokens(count: int) -> Tensors:
        # As layers pass them: queries, keys and values lie next to each other.
        mixed = torch.randn(1, count, 2 * key_heads * key_dim + heads * dim)
        mixed[..., : 2 * key_heads * key_dim] += alike * torch.randn(2 * key_heads * key_dim)
        q, k, v = mixed.bfloat16().split([key_heads * key_dim, key_heads * key_dim, heads * dim], -1)
        q, k = (one.reshape(1, count, key_heads, key_dim) for one in (q, k))
        g, beta = -torch.rand(1, count, heads) / 4, torch.rand(1, count, heads).bfloat16()
        return {"query": q, "key": k, "value": v.reshape(1, count, heads, dim), "g": g, "beta": beta}

    def exact(state: torch.Tensor, given: Tensors, token: int, _: bool) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g, beta = (given[name][0, token].double() for name in ("query", "key", "value", "g", "beta"))
        q, k = (one * torch.rsqrt((one * one).sum(-1, keepdim=True) + 1e-6) for one in (q, k))
        q, k = (one.repeat_interleave(heads // key_heads, 0)[..., None] for one in (q * key_dim**-0.5, k))
        state = state * g.exp()[:, None, None]
        state = state + k * ((v - (state * k).sum(1)) * beta[:, None])[:, None]
        return state, (state * q).sum(1)

    def family(step: RecurrentStep, given: Tensors) -> torch.Tensor:
        q, k, v, g, beta = given.values()
        chunk = qwen.torch_chunk_gated_delta_rule
        return reference.delta_rule(step, "scan", chunk, q, k, v, g, beta, normalize=True)

    def ours(step: RecurrentStep, given: Tensors) -> torch.Tensor:
        return triton_delta_rule.row_delta_rule(step, "scan", **given, normalize=True)

    return Layer(triton_delta_rule, (heads, key_dim, dim), tokens, ours, family, exact)


def mamba2_scan(heads: int = 2, groups: int = 1, dim: int = 24, size: int = 32, *, full: bool = True) -> Layer:
    A = -torch.rand(heads)
    D, bias = (torch.randn(heads), torch.randn(heads)) if full else (None, None)
    options: Any = {"D": D, "dt_bias": bias, "softplus": full}
    least, most = 0.01, 2.0

    def tokens(count: int) -> Tensors:
        dt = torch.randn(1, count, 2 * heads)[..., :heads]
        B, C = (torch.randn(1, count, groups, size).bfloat16() for _ in range(2))
        return {
            "hidden": torch.randn(1, count, heads, dim).bfloat16(),
            "dt": (dt * 3 if full else dt.abs() * 0.3).bfloat16(),
            "B": B,
            "C": C,
        }

    def exact(state: torch.Tensor, given: Tensors, token: int, decodes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, b, c = (given[name][0, token].double() for name in ("hidden", "B", "C"))
        b, c = (one.repeat_interleave(heads // groups, 0)[:, None] for one in (b, c))
        time = given["dt"][0, token]
        if bias is not None:
            time = functional.softplus(time + bias.bfloat16())
        time = (time if decodes else time.clamp(least, most)).double()
        state = state * (time * A.double()).exp()[:, None, None] + (time[:, None] * x)[..., None] * b
        result = (state * c).sum(-1)
        return state, result if D is None else result + D.double()[:, None] * x

    def family(step: RecurrentStep, given: Tensors) -> torch.Tensor:
        x, dt, B, C = given.values()
        return reference.mamba2_scan(
            step, "scan", mamba2.mamba2_chunk_scan, x, dt, A, B, C, chunk_size=64, dt_limit=(least, most), **options
        )

    def ours(step: RecurrentStep, given: Tensors) -> torch.Tensor:
        return triton_mamba2.row_mamba2_scan(step, "scan", **given, A=A, limit=(least, most), **options)

    return Layer(triton_mamba2, (heads, dim, size), tokens, ours, family, exact)


LAYERS: dict[str, Callable[[], Layer]] = {
    "delta rule": delta_rule,
    "delta rule, keys alike": functools.partial(delta_rule, alike=3.0),
    "narrow delta rule": functools.partial(delta_rule, 2, 2, 6, 34),
    "mamba2": mamba2_scan,
    "narrow mamba2": functools.partial(mamba2_scan, 2, 2, 34, 6, full=False),
}
each_kind = pytest.mark.parametrize("name", ["delta rule", "mamba2"])


def exact(layer: Layer, context: AttentionContext, given: Tensors, states: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Results of all tokens and states after the step, in float64; the padding row's mean nothing."""
    states, results, decodes = states.double(), [], decoding(context)
    for token, (row, position) in enumerate(zip(context.rows.tolist(), context.positions.tolist(), strict=True)):
        before = states[row] if position else torch.zeros_like(states[row])
        states[row], result = layer.exact(before, given, token, token < decodes)
        results.append(result)
    return torch.stack(results), states


def run(layer: Layer, case: Case, given: Tensors, states: torch.Tensor, by: str = "ours") -> Any:
    """Results [tokens, ...] and states of a step, in the tiles that engines plan."""
    step = step_of(context_of(case, 128), {"scan": states})
    out = getattr(layer, by)(step, given)
    return out[0], step.tables.table("scan", layer.state, torch.float32)


def made(name: str, case: Case) -> tuple[Layer, Tensors, torch.Tensor]:
    torch.manual_seed(sum(map(ord, name)))
    layer = LAYERS[name]()
    return layer, layer.tokens(context_of(case).rows.shape[0]), torch.randn(ROWS, *layer.state)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-9))


def use(monkeypatch: pytest.MonkeyPatch, layer: Layer, **changes: int) -> None:
    setting = layer.module._CHUNKS._replace(**changes)
    monkeypatch.setattr(layer.module, "_CHUNKS", setting)
    if layer.module is triton_delta_rule:
        monkeypatch.setattr(layer.module, "_FEW_CHUNKS", setting)


def test_chunks_fit_the_card() -> None:
    chunks_for = triton_delta_rule._chunks_for
    assert chunks_for(128, 163 * 1024) == chunks_for(64, 227 * 1024) == triton_delta_rule._CHUNKS
    assert chunks_for(128, 99 * 1024) == chunks_for(256, 227 * 1024) == triton_delta_rule._FEW_CHUNKS


def check(layer: Layer, case: Case, given: Tensors, states: torch.Tensor) -> None:
    """The errors are those of rounding results to bfloat16, which transformers' function has too."""
    context = context_of(case)
    mine = context.rows > 0
    want, want_states = exact(layer, context, given, states)
    got, got_states = run(layer, case, given, states)
    usual, _ = run(layer, case, given, states, "family")
    assert got.isfinite().all()
    assert error(got[mine], want[mine]) < 1.02 * error(usual[mine], want[mine]) + 1e-5
    for row in range(1, ROWS):  # row by row, lest a large state hide a small one
        assert error(got_states[row], want_states[row]) < 5e-5


@each_kind
@pytest.mark.parametrize(
    ("case", "chunk"),
    [
        pytest.param(RAGGED, 16, id="from nothing-16"),
        pytest.param(RAGGED, 32, id="from nothing-32"),
        pytest.param(RAGGED, 64, id="from nothing-64", marks=pytest.mark.slow),
        pytest.param(CONTINUED, 16, id="from a state-16", marks=pytest.mark.slow),
        pytest.param(CONTINUED, 32, id="from a state-32"),
        pytest.param(CONTINUED, 64, id="from a state-64"),
    ],
)
def test_ragged_pieces(name: str, chunk: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given, states = made(name, case)
    use(monkeypatch, layer, chunk=chunk)
    check(layer, case, given, states)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("delta rule", "mamba2")])
@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_other_shapes(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given, states = made(name, PAIR)
    use(monkeypatch, layer, chunk=chunk)
    check(layer, PAIR, given, states)


@each_kind
@pytest.mark.parametrize("columns", [16, 64])
def test_columns_of_a_program(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given, states = made(name, PAIR)
    use(monkeypatch, layer, columns=columns)
    check(layer, PAIR, given, states)


@pytest.mark.parametrize("tile", [20, 1 << 30])
@each_kind
def test_any_size_of_tiles(name: str, tile: int) -> None:
    layer, given, states = made(name, LONG)
    usual = run(layer, LONG, given, states)
    step = step_of(context_of(LONG, tile), {"scan": states})
    assert torch.equal(layer.ours(step, given)[0], usual[0])
    assert torch.equal(step.tables.table("scan", layer.state, torch.float32)[1:], usual[1][1:])


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("values", [(-20.0,), (-0.0,), (-20.0, 0.0, -1e-3, -1e4), (-0.01, -torch.inf)])
def test_strong_decays(values: tuple[float, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given, states = made("delta rule", PAIR)
    use(monkeypatch, layer, chunk=chunk)
    given["g"] = torch.tensor(values)[torch.randint(len(values), given["g"].shape)]
    context = context_of(PAIR)
    want, want_states = exact(layer, context, given, states)
    got, got_states = run(layer, PAIR, given, states)
    assert error(got, want) < 2e-3
    assert error(got_states[[1, 3]], want_states[[1, 3]]) < 1e-4


def test_strong_decays_of_mamba2() -> None:
    layer, given, states = made("mamba2", PAIR)
    given["dt"] = torch.where(torch.rand(given["dt"].shape) < 0.5, 1e4, -1e4).bfloat16()
    check(layer, PAIR, given, states)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_rates_of_updates(beta: float) -> None:
    layer, given, states = made("delta rule", PAIR)
    given["beta"] = torch.full_like(given["beta"], beta)
    if beta == 2.0:  # reflects a state that never decays
        given["g"] = torch.zeros_like(given["g"])
    check(layer, PAIR, given, states)


@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_the_same_key_again_and_again(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inverse is made without powers of its matrix: these grow to 10**17 here, and would leave no digit."""
    layer, given, states = made("delta rule", PAIR)
    use(monkeypatch, layer, chunk=chunk)
    given["key"] = given["key"][:, :1].expand(given["key"].shape)
    given["g"], given["beta"] = torch.zeros_like(given["g"]), torch.ones_like(given["beta"])
    check(layer, PAIR, given, states)


@each_kind
def test_a_piece_in_company(name: str) -> None:
    layer, given, states = made(name, SHORT_CONTINUED)
    got, got_states = run(layer, SHORT_CONTINUED, given, states)
    first, length = 3 + sum(SHORT_LENGTHS[:2]), SHORT_LENGTHS[2]
    alone = {key: one[:, first : first + length] for key, one in given.items()}
    out, out_states = run(layer, Case([], [(3, length, 9)]), alone, states)
    assert torch.equal(got[first : first + length], out)
    assert torch.equal(got_states[3], out_states[3])
    for row in {*range(1, ROWS)} - {3}:
        assert torch.equal(out_states[row], states[row])


@each_kind
def test_rows_that_decode_beside_prompts_are_computed_as_without_them(name: str) -> None:
    layer, given, states = made(name, SHORT_CONTINUED)
    got, got_states = run(layer, SHORT_CONTINUED, given, states)
    out, out_states = run(
        layer, Case(SHORT_CONTINUED.decodes), {key: one[:, :3] for key, one in given.items()}, states
    )
    assert torch.equal(got[[0, 2]], out[[0, 2]])
    assert torch.equal(got_states[[12, 14]], out_states[[12, 14]])


@each_kind
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_prompt_harms_no_other(name: str, value: float) -> None:
    layer, given, states = made(name, SHORT)
    usual, usual_states = run(layer, SHORT, given, states)
    first, length = 3 + sum(SHORT_LENGTHS[:2]), SHORT_LENGTHS[2]  # between other prompts
    for one in given.values():
        one[:, first : first + length] = value
    got, got_states = run(layer, SHORT, given, states)
    assert not got[first].isfinite().all()
    assert torch.equal(got[:first], usual[:first])
    assert torch.equal(got[first + length :], usual[first + length :])
    others = [row for row in range(1, ROWS) if row != 3]
    assert torch.equal(got_states[others], usual_states[others])


@each_kind
def test_tiles_of_the_padding_row_write_nothing(name: str) -> None:
    """They lie apart from one another, so what follows the first of them belongs to another row."""
    layer, given, states = made(name, Case([], [(1, 50, 0)]))
    usual, usual_states = run(layer, Case([], [(1, 50, 0)]), given, states)
    around = {key: functional.pad(one, (0, 0) * (one.dim() - 2) + (5, 5)) for key, one in given.items()}
    tiles = torch.tensor([(1, 0, 0), (5, 0, 55), (50, 5, 5), (0, 0, 0)], dtype=torch.int32)  # tiles are columns
    rows = functional.pad(torch.ones(50, dtype=torch.int32), (5, 5))
    positions = functional.pad(torch.arange(50, dtype=torch.int32), (5, 5))
    step = step_of(MixedContext(NO_PAGES, rows, positions, *tiles, rows[:0]), {"scan": states})
    assert torch.equal(layer.ours(step, around)[0, 5:55], usual)
    assert torch.equal(step.tables.table("scan", layer.state, torch.float32)[1:], usual_states[1:])


@each_kind
def test_a_row_that_begins_reads_nothing(name: str) -> None:
    layer, given, states = made(name, SHORT)
    usual = run(layer, SHORT, given, states)
    states[1 : len(SHORT_LENGTHS) + 1] = torch.nan
    got = run(layer, SHORT, given, states)
    assert torch.equal(got[0], usual[0])
    assert torch.equal(got[1][1:], usual[1][1:])


@each_kind
def test_frozen_states(name: str) -> None:
    layer, given, states = made(name, SHORT_CONTINUED)
    step = step_of(context_of(SHORT_CONTINUED, 128), {"scan": states})
    step.frozen = True
    assert torch.equal(layer.ours(step, given)[0], run(layer, SHORT_CONTINUED, given, states)[0])
    assert torch.equal(step.tables.table("scan", layer.state, torch.float32), states)


@each_kind
def test_a_sequence_in_pieces(name: str) -> None:
    layer, given, states = made(name, Case([], [(2, 150, 0)]))
    whole, after = run(layer, Case([], [(2, 150, 0)]), given, states)
    outs, done = [], 0
    for length in (70, 1, 33, 46):
        part = {key: one[:, done : done + length] for key, one in given.items()}
        case = Case([(2, done)]) if length == 1 else Case([], [(2, length, done)])
        if name == "mamba2" and length == 1:  # transformers bounds no time step of a token that decodes
            case = Case([], [(2, 1, done)])
        out, states = run(layer, case, part, states)
        outs.append(out)
        done += length
    assert error(torch.cat(outs), whole.double()) < 3e-3
    assert error(states[2], after[2].double()) < 1e-4


def test_what_is_computed_in_chunks() -> None:
    mixed, decode = context_of(LONG), context_of(Case([(1, 3)]))
    half = torch.zeros(2, dtype=torch.bfloat16)
    assert in_chunks(mixed, half, half)
    assert not in_chunks(decode, half)
    assert not in_chunks(mixed, half, half.float())
    assert not in_chunks(mixed, half.half())


def test_cards_without_products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        triton_tiles.multiplies_bfloat16.cache_clear()
        assert triton_tiles.multiplies_bfloat16(torch.device("cuda", 0)) is has
    triton_tiles.multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize("chunk", [16, 64])
def test_wide_keys(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    case, layer = Case([], [(3, 70, 5)]), delta_rule(1, 1, 160, 20)
    use(monkeypatch, layer, chunk=chunk)
    check(layer, case, layer.tokens(70), torch.randn(ROWS, *layer.state))


@each_kind
def test_prompts_in_float32_stay_exact(name: str) -> None:
    layer, given, states = made(name, PAIR)
    given = {key: one.float() for key, one in given.items()}
    want, _ = exact(layer, context_of(PAIR), given, states)
    if name == "delta rule":
        assert error(run(layer, PAIR, given, states)[0], want) < 1e-6
    else:
        usual = run(layer, PAIR, given, states, "family")[0]
        assert error(run(layer, PAIR, given, states)[0], usual.double()) < 2e-6
