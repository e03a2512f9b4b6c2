"""Kernels that read MXFP4 weights, in Triton's interpreter where there is no GPU, against unpacked weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hf_async_batching.experts import reference, triton_experts
from hf_async_batching.experts.layer import ExpertWeights, GateForm
from hf_async_batching.experts.mxfp4 import LARGEST_SCALE, dequantize
from hf_async_batching.experts.settings import EXPANDED_TOKENS, FEW_TOKENS, ExpertSetting, ProductSetting
from hf_async_batching.experts.triton_experts import expand, experts, experts_by_kernel, experts_by_library
from hf_async_batching.linear.rounding import worst_relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter multiplies no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
GPT_OSS = GateForm(interleaved=True, alpha=1.702, limit=1.5, shift=1.0)


def packed(*sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random MXFP4 weights [..., inner]: all nibbles, and scales so that products are of size 1."""
    *outer, inner = sizes
    blocks = torch.randint(0, 256, (*outer, inner // 32, 16), dtype=torch.uint8, device=DEVICE)
    return blocks, torch.randint(120, 126, (*outer, inner // 32), dtype=torch.uint8, device=DEVICE)


def layer_of(experts: int, hidden: int, inner: int, dtype: torch.dtype) -> ExpertWeights:
    up, up_scales = packed(experts, 2 * inner, hidden)
    down, down_scales = packed(experts, hidden, inner)
    biases = [torch.randn(experts, size, device=DEVICE).to(dtype) for size in (2 * inner, hidden)]
    return ExpertWeights(up, biases[0], down, biases[1], False, up_scales, down_scales)


def inputs_of(tokens: int, choices: int, layer: ExpertWeights) -> Any:
    hidden = torch.randn(tokens, layer.hidden, device=DEVICE).to(layer.dtype)
    index = torch.rand(tokens, layer.experts, device=DEVICE).topk(choices).indices
    return hidden, index, torch.rand(tokens, choices, device=DEVICE)


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert worst_relative_error(got.float(), want.float()) < (2e-6 if want.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_byte_and_scale_is_unpacked_exactly(dtype: torch.dtype) -> None:
    # The interpreter drops subnormal numbers: those below 2 ** -126.
    scales = torch.arange(2, LARGEST_SCALE + 1, dtype=torch.uint8, device=DEVICE)
    count = len(scales)
    blocks = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 1, 16, 16).repeat(1, count, 1, 1)
    scales = scales[None, :, None].repeat(1, 1, 16)
    got, want = expand(blocks, scales, dtype), dequantize(blocks, scales, dtype)
    assert got.equal(want)
    assert got.signbit().equal(want.signbit()), "zeros, too"


@pytest.mark.filterwarnings("ignore:invalid value")
def test_larger_scales_show_themselves() -> None:
    blocks, scales = packed(1, 2, 64)
    scales[0, 1, 1] = LARGEST_SCALE + 1
    out = expand(blocks, scales, torch.float32)
    assert not out[0, 1, 32:].isfinite().any()
    assert out[0, 0].isfinite().all()
    assert out[0, 1, :32].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "setting",
    [
        None,
        ExpertSetting(16, ProductSetting(64, 32, 4, 2), ProductSetting(64, 64, 4, 2)),
        ExpertSetting(32, ProductSetting(64, 128, 4, 2), ProductSetting(64, 128, 4, 2)),
    ],
)
def test_the_kernels_equal_unpacked_weights(setting: ExpertSetting | None, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    # No side is a multiple of all blocks.
    layer = layer_of(4, 96, 160, dtype)
    for tokens in (1, 20):
        hidden, index, weights = inputs_of(tokens, 2, layer)
        want = reference.experts(hidden, index, weights, layer, GPT_OSS)
        got = experts_by_kernel(hidden, index, weights, layer, GPT_OSS, setting)
        assert_same(got, want)
        assert got.equal(experts_by_kernel(hidden, index, weights, layer, GPT_OSS, setting)), "a fixed order of sums"


def test_other_layouts_of_scales() -> None:
    """Strides are the tensor's own."""
    torch.manual_seed(2)
    layer = layer_of(4, 64, 32, torch.float32)
    assert layer.up_scales is not None
    moved = layer._replace(up_scales=layer.up_scales.transpose(1, 2).contiguous().transpose(1, 2))
    given = inputs_of(3, 2, layer)
    assert experts_by_kernel(*given, moved, GPT_OSS).equal(experts_by_kernel(*given, layer, GPT_OSS))


def test_strangers_add_nothing() -> None:
    torch.manual_seed(3)
    layer = layer_of(4, 64, 32, torch.float32)
    hidden, index, weights = inputs_of(5, 2, layer)
    index[::2, 1] = 4
    index[1, 0] = -1
    assert_same(experts_by_kernel(hidden, index, weights, layer, GPT_OSS),
                reference.experts(hidden, index, weights, layer, GPT_OSS))  # fmt: skip


def test_products_by_the_library() -> None:
    torch.manual_seed(4)
    layer = layer_of(6, 64, 96, torch.bfloat16)
    hidden, index, weights = inputs_of(20, 3, layer)
    want = reference.experts(hidden, index, weights, layer, GPT_OSS)
    assert_same(experts_by_library(hidden, index, weights, layer, GPT_OSS), want)


def test_only_many_tokens_unpack_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, int]] = []

    def watched(name: str) -> Any:
        def call(hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            used.append((name, hidden.shape[0]))
            return hidden

        return call

    monkeypatch.setattr(triton_experts, "experts_by_library", watched("library"))
    monkeypatch.setattr(triton_experts, "experts_by_kernel", watched("kernel"))
    for dtype, many in ((torch.bfloat16, "library"), (torch.float32, "kernel")):
        layer = layer_of(2, 32, 32, dtype)
        for tokens, name in ((FEW_TOKENS + 1, "kernel"), (EXPANDED_TOKENS - 1, "kernel"), (EXPANDED_TOKENS, many)):
            experts(*inputs_of(tokens, 1, layer), layer, GPT_OSS)
            assert used.pop() == (name, tokens)
    layer = layer_of(2, 32, 32, torch.bfloat16)
    # Unpacked weights of the first product: 2 experts, 64 outputs, 32 inputs, 2 bytes each.
    for most, name in ((8192, "library"), (8191, "kernel")):
        monkeypatch.setattr(triton_experts, "EXPANDED_BYTES", most)
        experts(*inputs_of(EXPANDED_TOKENS, 1, layer), layer, GPT_OSS)
        assert used.pop()[0] == name
