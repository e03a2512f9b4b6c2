"""The skinny product in Triton's interpreter, against float64."""

import os

os.environ.setdefault("TRITON_INTERPRET", "0" if __import__("torch").cuda.is_available() else "1")

import pytest
import torch

pytest.importorskip("triton")

from hf_async_batching.linear import skinny
from hf_async_batching.linear.engine_linear import MAX_STRIPS
from hf_async_batching.linear.skinny import SkinnySetting, candidates, default_setting, serves, skinny_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problem(rows: int, n: int, k: int, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x = torch.randn(rows, k, device=DEVICE, dtype=torch.float16)
    weight = torch.randn(n, k, device=DEVICE, dtype=torch.float16) * k**-0.5
    return x, weight, torch.randn(n, device=DEVICE, dtype=torch.float16) if bias else None


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got.double() - want).norm() / want.norm() < 1e-3)


@pytest.mark.parametrize(
    ("rows", "n", "k", "setting"),
    [
        (1, 64, 128, SkinnySetting(64, 64, 1, 4, 2)),
        (5, 208, 576, SkinnySetting(64, 128, 2, 4, 2)),  # neither side is a multiple of its block
        (17, 96, 256, SkinnySetting(32, 64, 4, 4, 2)),
        (33, 48, 320, SkinnySetting(64, 64, 3, 4, 2)),  # shares of unequal length
        (64, 80, 96, SkinnySetting(32, 64, 4, 4, 2)),  # more shares than blocks: some have nothing to do
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_float64(rows: int, n: int, k: int, setting: SkinnySetting, bias: bool) -> None:
    x, weight, b = problem(rows, n, k, bias)
    counters = torch.zeros(MAX_STRIPS, dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the second launch finds the counters as the first left them
        assert close(skinny_linear(x, weight, b, counters, setting), expected(x, weight, b))
        assert not counters.any()


def test_leading_dimensions_and_row_strides() -> None:
    x, weight, _ = problem(12, 64, 64, False)
    wide = torch.randn(12, 128, device=DEVICE, dtype=torch.float16)
    wide[:, :64] = x
    out = skinny_linear(
        wide[:, :64].view(1, 12, 64), weight, None, torch.zeros(MAX_STRIPS, dtype=torch.int32, device=DEVICE)
    )
    assert out.shape == (1, 12, 64)
    assert close(out[0], expected(x, weight, None))


def test_what_is_served() -> None:
    x, weight, _ = problem(64, 64, 64, False)
    assert serves(x, weight)
    assert not serves(torch.cat([x, x[:1]]), weight), "the library is faster for many rows"
    assert not serves(x[:0], weight)
    assert not serves(x.float(), weight.float()), "full precision has no tensor cores"
    assert not serves(x.bfloat16(), weight)
    assert not serves(x, weight.T), "not contiguous, or not transposed"
    assert not serves(x[:, :56], weight[:, :56].contiguous())


@pytest.mark.parametrize("memory", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_settings_fit_the_card(memory: int, rows: int) -> None:
    for n, k in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (960, 576), (576, 1536)]:
        for setting in [default_setting(rows, n, k, memory), *candidates(rows, n, k, memory)]:
            assert skinny.shared_memory(rows, setting) <= memory
            assert setting.stages >= 2
            assert setting.splits == 1 or k // setting.block_k >= 4 * setting.splits
            assert -(-n // setting.block_n) <= MAX_STRIPS


def test_small_weights_are_shared_out() -> None:
    assert default_setting(32, 1024, 3072, 227 * 1024).splits == 4
    assert default_setting(1, 2048, 2048, 227 * 1024).splits == 4
    assert default_setting(32, 4096, 4096, 227 * 1024).splits == 2, "a program for each multiprocessor"
    assert default_setting(32, 4096, 1024, 227 * 1024).splits == 1, "shares would be short"
    assert default_setting(32, 3072, 1024, 227 * 1024).splits == 1, "shares would be short"
    assert default_setting(1, 128, 1024, 227 * 1024).splits == 2, "few strips are divided all the same"
    assert default_setting(32, 5120, 4096, 227 * 1024).splits == 1, "enough strips"
    assert default_setting(32, 4096, 14336, 227 * 1024).splits == 2, "long ones"
    assert default_setting(32, 28672, 4096, 227 * 1024).splits == 1


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_residual_is_added_to_the_rounded_product(splits: int, bias: bool) -> None:
    x, weight, b = problem(5, 96, 256, bias)
    counters = torch.zeros(MAX_STRIPS, dtype=torch.int32, device=DEVICE)
    setting = SkinnySetting(64, 64, splits, 4, 2)
    residual = 100 * torch.randn(5, 96, device=DEVICE, dtype=torch.float16)
    product = skinny_linear(x, weight, b, counters, setting)
    assert torch.equal(skinny_linear(x, weight, b, counters, setting, residual), product + residual)
    assert not counters.any()
