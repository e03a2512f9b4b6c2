"""The kernels of experts, in Triton's interpreter where there is no GPU, against the reference in PyTorch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_async_batching.experts import reference, triton_experts
from hf_async_batching.experts.layer import ExpertWeights, GateForm
from hf_async_batching.experts.settings import FEW_TOKENS, ExpertSetting, ProductSetting, most_blocks
from hf_async_batching.experts.triton_experts import experts, experts_by_kernel, experts_by_library, group
from hf_async_batching.linear.rounding import worst_relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter multiplies no bfloat16.
HALVES = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float16]

SILU = GateForm()
CLAMPED = GateForm(interleaved=True, alpha=1.702, limit=1.5, shift=1.0)
# Form, transposed, biases.
LAYOUTS: dict[str, tuple[GateForm, bool, bool]] = {
    "qwen": (SILU, False, False),
    "gpt-oss": (CLAMPED, True, True),
    "aria": (SILU, True, False),
    "biased": (SILU, False, True),
    "interleaved": (CLAMPED._replace(limit=0.0), False, False),
    "limited": (GateForm(limit=0.7), False, False),
    "nemotron": (GateForm("relu2", gated=False), False, False),
    "gelu": (GateForm("gelu"), False, False),
    "gelu_tanh": (GateForm("gelu_tanh"), True, True),
    "relu": (GateForm("relu", gated=False), True, True),
}
SMALL = ExpertSetting(16, ProductSetting(16, 32, 4, 2), ProductSetting(32, 16, 4, 2))


def layer_of(
    form: GateForm, transposed: bool, biased: bool, *, experts: int, hidden: int, inner: int, dtype: torch.dtype
) -> ExpertWeights:
    outputs = inner * (1 + form.gated)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=DEVICE) * hidden**-0.5).to(dtype)

    up, down = randn(experts, outputs, hidden), randn(experts, hidden, inner)
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = (randn(experts, outputs), randn(experts, hidden)) if biased else (None, None)
    return ExpertWeights(up, biases[0], down, biases[1], transposed)


def routing(kind: str, tokens: int, choices: int, experts: int) -> torch.Tensor:
    if kind == "one":  # all tokens choose the same experts
        return torch.arange(choices, device=DEVICE).repeat(tokens, 1) % experts
    if kind == "few":  # most experts are not hit
        return torch.rand(tokens, max(choices, experts // 3), device=DEVICE).topk(choices).indices
    if kind == "strangers":  # experts of other ranks
        return torch.randint(-1, experts + 2, (tokens, choices), device=DEVICE)
    return torch.rand(tokens, experts, device=DEVICE).topk(choices).indices


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    tolerance = 2e-6 if want.dtype == torch.float32 else 2e-2
    assert worst_relative_error(got.float(), want.float()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    form, transposed, biased = LAYOUTS[layout]
    # Neither side is a multiple of its block.
    layer = layer_of(form, transposed, biased, experts=5, hidden=56, inner=40, dtype=dtype)
    for tokens in (1, 7):
        hidden = torch.randn(tokens, 56, device=DEVICE).to(dtype)
        index = routing("all", tokens, 2, 5)
        weights = torch.rand(tokens, 2, device=DEVICE)
        want = reference.experts(hidden, index, weights, layer, form)
        assert_same(experts_by_kernel(hidden, index, weights, layer, form, SMALL), want)


@pytest.mark.parametrize("kind", ["all", "one", "few", "strangers"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 33, 100])
def test_routings_and_tokens(tokens: int, kind: str) -> None:
    torch.manual_seed(tokens)
    layer = layer_of(SILU, False, False, experts=9, hidden=32, inner=32, dtype=torch.float32)
    wide = torch.randn(tokens, 64, device=DEVICE)
    index = routing(kind, tokens, 3, 9)
    weights = torch.rand(tokens, 3, device=DEVICE)
    hidden = wide[:, :32]  # rows that do not lie next to each other
    want = reference.experts(hidden, index, weights, layer, SILU)
    got = experts_by_kernel(hidden, index, weights, layer, SILU)
    assert got.isfinite().all()
    assert_same(got, want)
    assert got.equal(experts_by_kernel(hidden, index, weights, layer, SILU)), "the order of sums is fixed"


@pytest.mark.parametrize("dtype", HALVES)
def test_settings_by_rule(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    layer = layer_of(CLAMPED, True, True, experts=4, hidden=192, inner=72, dtype=dtype)
    hidden = torch.randn(40, 192, device=DEVICE).to(dtype)
    index, weights = routing("all", 40, 2, 4), torch.rand(40, 2, device=DEVICE).to(dtype)
    want = reference.experts(hidden, index, weights, layer, CLAMPED)
    assert_same(experts_by_kernel(hidden, index, weights, layer, CLAMPED), want)


@pytest.mark.parametrize("kind", ["all", "one", "strangers"])
@pytest.mark.parametrize("layout", ["qwen", "gpt-oss", "biased", "nemotron", "interleaved"])
def test_products_by_the_library(layout: str, kind: str) -> None:
    torch.manual_seed(3)
    form, transposed, biased = LAYOUTS[layout]
    layer = layer_of(form, transposed, biased, experts=6, hidden=64, inner=48, dtype=torch.bfloat16)
    hidden = torch.randn(20, 64, device=DEVICE).bfloat16()
    index, weights = routing(kind, 20, 3, 6), torch.rand(20, 3, device=DEVICE)
    want = reference.experts(hidden, index, weights, layer, form)
    got = experts_by_library(hidden, index, weights, layer, form)
    assert got.isfinite().all()
    assert_same(got, want)


@pytest.mark.parametrize("by_library", [False, True])
def test_a_residual_is_added_to_the_rounded_sum(by_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    monkeypatch.setattr(triton_experts, "FEW_TOKENS", 0 if by_library else FEW_TOKENS)
    layer = layer_of(
        SILU, False, True, experts=6, hidden=64, inner=48, dtype=torch.bfloat16 if by_library else HALVES[-1]
    )
    hidden, residual = (torch.randn(20, 64, device=DEVICE).to(layer.up.dtype) * size for size in (1, 8))
    index, weights = routing("all", 20, 3, 6), torch.rand(20, 3, device=DEVICE)
    plain = experts(hidden, index, weights, layer, SILU)
    if torch.cuda.is_available() or not by_library:
        assert torch.equal(experts(hidden, index, weights, layer, SILU, residual), plain + residual)
    assert_same(experts(hidden, index, weights, layer, SILU, residual), plain + residual)
    none = experts(hidden[:0], index[:0], weights[:0], layer, SILU, residual[:0])
    assert none.shape == (0, 64)
    lonely = experts_by_kernel(hidden, index[:, :0], weights[:, :0], layer, SILU, residual=residual)
    assert torch.equal(lonely, residual), "tokens without experts keep the residual"


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize(("tokens", "choices", "experts"), [(1, 8, 64), (3, 2, 7), (40, 4, 6), (300, 8, 20)])
@pytest.mark.parametrize("kind", ["all", "one", "strangers"])
def test_grouping(kind: str, tokens: int, choices: int, experts: int, size: int) -> None:
    torch.manual_seed(4)
    index = routing(kind, tokens, choices, experts)
    for ids in (index, index.int())[: 1 + (experts < 10)]:
        order, places, ends, blocks = group(ids.contiguous(), experts, size, filled=True)
        flat = index.flatten()
        known = ((flat >= 0) & (flat < experts)).nonzero()[:, 0]
        want = known[flat[known].argsort(stable=True)]
        assert order[: len(known)].tolist() == want.tolist()
        assert not order[len(known) :].any()
        assert order[places[known].long()].tolist() == known.tolist()
        counts = flat[known].bincount(minlength=experts)
        assert ends.tolist() == counts.cumsum(0).tolist()
        assert len(blocks) == most_blocks(flat.numel(), experts, size)
        expected = [
            [expert, first, min(first + size, int(ends[expert]))]
            for expert in range(experts)
            for first in range(int(ends[expert] - counts[expert]), int(ends[expert]), size)
        ]
        used = [block for block in blocks.tolist() if block[0] >= 0]
        assert used == expected
        assert blocks.tolist()[: len(used)] == expected, "unused blocks are last"


def test_a_single_row_with_any_stride() -> None:
    layer = layer_of(SILU, False, False, experts=3, hidden=32, inner=32, dtype=torch.float32)
    hidden = torch.randn(32, device=DEVICE).as_strided((1, 32), (1, 1))
    index, weights = routing("all", 1, 2, 3), torch.rand(1, 2, device=DEVICE)
    want = reference.experts(hidden, index, weights, layer, SILU)
    assert_same(experts_by_kernel(hidden, index, weights, layer, SILU), want)


def test_inputs_that_do_not_lie_in_order() -> None:
    layer = layer_of(SILU, False, False, experts=3, hidden=32, inner=32, dtype=torch.float32)
    hidden, index = torch.randn(32, 6, device=DEVICE).T, routing("all", 6, 2, 3).T.contiguous().T
    weights = torch.rand(2, 6, device=DEVICE).T
    want = reference.experts(hidden, index, weights, layer, SILU)
    assert_same(experts(hidden, index, weights, layer, SILU), want)


def test_many_tokens_go_to_the_library_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def watched(hidden: torch.Tensor, *_: object) -> torch.Tensor:
        used.append(hidden.shape[0])
        return hidden

    monkeypatch.setattr(triton_experts, "experts_by_library", watched)
    for dtype, inner, served in (
        (torch.bfloat16, 32, True),
        (torch.float32, 32, False),  # it would read sizes on the host
        (torch.bfloat16, 36, False),  # rows that do not begin at multiples of 16 bytes
    ):
        layer = layer_of(SILU, False, False, experts=2, hidden=32, inner=inner, dtype=dtype)
        for tokens in (FEW_TOKENS, FEW_TOKENS + 1):
            index, weights = routing("all", tokens, 1, 2), torch.rand(tokens, 1, device=DEVICE)
            out = experts(torch.zeros(tokens, 32, device=DEVICE).to(dtype), index, weights, layer, SILU)
            assert out.shape == (tokens, 32)
            assert used == ([tokens] if served and tokens > FEW_TOKENS else [])
            used.clear()


def test_no_token() -> None:
    layer = layer_of(SILU, False, False, experts=2, hidden=16, inner=16, dtype=torch.float32)
    nothing = torch.zeros(0, 2, device=DEVICE)
    assert experts_by_kernel(torch.zeros(0, 16, device=DEVICE), nothing.long(), nothing, layer, SILU).shape == (0, 16)


def test_nan_reaches_its_token_only() -> None:
    layer = layer_of(CLAMPED, True, True, experts=4, hidden=32, inner=32, dtype=torch.float32)
    hidden = torch.randn(5, 32, device=DEVICE)
    hidden[2, 3] = float("nan")
    out = experts_by_kernel(hidden, routing("one", 5, 2, 4), torch.rand(5, 2, device=DEVICE), layer, CLAMPED)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize(("major", "served"), [(7, False), (8, False), (9, True), (10, True), (12, False)])
def test_the_library_computes_prompts_where_it_reads_nothing_back(
    major: int, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's grouped products loop over the experts on the host, except on compute capabilities 9 and 10."""
    layer = triton_experts.ExpertWeights(
        torch.zeros(4, 64, 32, dtype=torch.bfloat16), None, torch.zeros(4, 32, 32, dtype=torch.bfloat16), None, False
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))

    class OnCuda(torch.Tensor):
        is_cuda = True

    hidden = torch.zeros(300, 32, dtype=torch.bfloat16).as_subclass(OnCuda)
    assert triton_experts._library_serves(hidden, layer) == served
