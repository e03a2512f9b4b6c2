"""The Triton kernels of layers with states compute what the reference in PyTorch does, and leave the same states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrent.step_cases import CASES, Case, context_of, states_of, step_of
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from hf_async_batching.linear.rounding import relative_error
from hf_async_batching.recurrent import reference
from hf_async_batching.recurrent.step import RecurrentStep

pytest.importorskip("triton")

from support.interpreter import widen_bfloat16_products

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs Triton's interpreter: its tensors are on the CPU"
)

ROWS = 6
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

Run = Callable[[RecurrentStep], torch.Tensor]


@pytest.fixture(autouse=True)
def bfloat16_products_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    widen_bfloat16_products(monkeypatch)


def compare(case: Case, states: dict[object, torch.Tensor], plain: Run, kernel: Run, *, tolerance: float) -> None:
    context = context_of(case)
    mine = [i for i, row in enumerate(context.rows.tolist()) if row]
    steps = [step_of(context, states) for _ in range(2)]
    want, got = plain(steps[0]), kernel(steps[1])
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    token_dim = 2 if want.dim() == 3 else 1
    assert got.isfinite().all()
    assert_near(got.movedim(token_dim, 0)[mine], want.movedim(token_dim, 0)[mine], tolerance)
    for key, state in states_of(steps[0]).items():
        assert_near(states_of(steps[1])[key], state, tolerance)
    frozen = step_of(context, states)
    frozen.frozen = True
    assert kernel(frozen).equal(got)
    assert all(state.equal(states[key][1:]) for key, state in states_of(frozen).items())


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    if got.dtype is torch.float32 and tolerance < 1e-2:
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    else:  # Triton's interpreter cuts bfloat16 off where a GPU rounds
        assert relative_error(got.float(), want.float()) < tolerance


def tokens_in(case: Case) -> int:
    return context_of(case).rows.shape[0]


@each_case
@pytest.mark.parametrize(
    ("width", "activation", "has_bias", "dtype"),
    [(4, "silu", False, torch.float32), (3, "", True, torch.float32), (2, "swish", True, torch.bfloat16)],
)
def test_convolutions(case: Case, width: int, activation: str, has_bias: bool, dtype: torch.dtype) -> None:
    from hf_async_batching.recurrent.triton_conv import row_conv

    torch.manual_seed(1)
    channels, tokens = 300, tokens_in(case)
    weight = torch.randn(channels, width).to(dtype)
    bias = torch.randn(channels).to(dtype) if has_bias else None
    # As layers pass it: channels lie next to each other.
    hidden = torch.randn(1, tokens, 2 * channels).to(dtype).transpose(1, 2)[:, :channels]
    states: dict[object, torch.Tensor] = {"conv": torch.randn(ROWS, channels, width - 1).to(dtype)}
    for row, position in [*case.decodes, *((row, position) for row, _, position in case.pieces or [])]:
        states["conv"][row, :, : max(0, width - 1 - position)] = 0  # a row begins with zeros
    compare(
        case,
        states,
        lambda step: reference.causal_conv(
            step, "conv", qwen.causal_conv1d_fn, hidden, weight, bias, activation=activation or None
        ),
        lambda step: row_conv(step, "conv", hidden, weight, bias, activation),
        tolerance=2e-2 if dtype is torch.bfloat16 else 1e-5,
    )


def test_an_activation_without_a_kernel_is_named() -> None:
    from hf_async_batching.recurrent.triton_conv import row_conv

    step = step_of(context_of(CASES["one row"]), {"conv": torch.zeros(ROWS, 4, 1)})
    with pytest.raises(NotImplementedError, match="'gelu'"):
        row_conv(step, "conv", torch.zeros(1, 4, 1), torch.zeros(4, 2), None, "gelu")


@each_case
@pytest.mark.parametrize(
    ("per_channel", "normalize", "dtype"),
    [(False, True, torch.float32), (True, False, torch.float32), (False, False, torch.bfloat16),
     (True, True, torch.bfloat16)],
    ids=["head", "channel", "head, bfloat16", "channel, bfloat16"],
)  # fmt: skip
def test_delta_rules(case: Case, per_channel: bool, normalize: bool, dtype: torch.dtype) -> None:
    from hf_async_batching.recurrent.triton_delta_rule import row_delta_rule

    torch.manual_seed(2)
    tokens, key_heads, heads, key_dim, dim = tokens_in(case), 2, 2 if per_channel else 4, 6, 10
    mixed = torch.randn(1, tokens, 2 * key_heads * key_dim + heads * dim) * (1 if normalize else 0.4)
    query, key, value = mixed.split([key_heads * key_dim, key_heads * key_dim, heads * dim], dim=-1)
    query, key = (one.reshape(1, tokens, key_heads, key_dim).to(dtype) for one in (query, key))
    value = value.reshape(1, tokens, heads, dim).to(dtype)
    g = -torch.rand(1, tokens, heads, *([key_dim] if per_channel else []))
    beta = torch.rand(1, tokens, heads)
    chunk = kimi.chunk_kimi_delta_attention if per_channel else qwen.torch_chunk_gated_delta_rule
    given: Any = (query, key, value, g, beta)
    compare(
        case,
        {"scan": torch.randn(ROWS, heads, key_dim, dim)},
        lambda step: reference.delta_rule(step, "scan", chunk, *given, normalize=normalize),
        lambda step: row_delta_rule(step, "scan", *given, normalize=normalize),
        tolerance=1e-4 if dtype is torch.float32 else 2e-2,
    )


@each_case
@pytest.mark.parametrize(
    ("has_d", "has_bias", "softplus", "dtype"),
    [(True, True, True, torch.float32), (True, True, True, torch.bfloat16), (False, False, False, torch.float32)],
)
def test_mamba2_scans(case: Case, has_d: bool, has_bias: bool, softplus: bool, dtype: torch.dtype) -> None:
    from hf_async_batching.recurrent.triton_mamba2 import row_mamba2_scan

    torch.manual_seed(3)
    tokens, heads, dim, groups, size = tokens_in(case), 4, 10, 2, 6
    hidden = torch.randn(1, tokens, heads, dim).to(dtype)
    dt = torch.randn(1, tokens, 2 * heads)[..., :heads]
    dt = (dt * 3 if softplus else dt.abs() * 0.3).to(dtype)
    B, C = (torch.randn(1, tokens, groups, size).to(dtype) for _ in range(2))
    A = -torch.rand(heads)
    options: Any = {
        "D": torch.randn(heads) if has_d else None,
        "dt_bias": torch.randn(heads) if has_bias else None,
        "softplus": softplus,
    }
    compare(
        case,
        {"scan": torch.randn(ROWS, heads, dim, size)},
        lambda step: reference.mamba2_scan(
            step, "scan", mamba2.mamba2_chunk_scan, hidden, dt, A, B, C,
            chunk_size=4, dt_limit=(0.01, 2.0), **options,
        ),
        lambda step: row_mamba2_scan(step, "scan", hidden, dt, A, B, C, limit=(0.01, 2.0), **options),
        tolerance=1e-4 if dtype is torch.float32 else 2e-2,
    )  # fmt: skip
