"""Products with GPTQ's and AWQ's 4-bit integers in Triton's interpreter, against float64."""

import os

os.environ.setdefault("TRITON_INTERPRET", "0" if __import__("torch").cuda.is_available() else "1")

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from support.packed_linear import PackedLinear, pack

from hf_async_batching.linear.quantized.forms import FORMS
from hf_async_batching.linear.quantized.weight import QuantizedWeight
from hf_async_batching.linear.quantized.word_form import awq_weight_of, gptq_weight_of
from hf_async_batching.linear.quantized.words import WordSetting, candidates, default_setting

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# AWQ's packing order: the column that each place of a word holds.
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


def random_layer(form: str, n: int, k: int, group: int) -> tuple[Any, torch.Tensor]:
    """A layer with these attributes, and its weight [n, k] in float64."""
    numbers = torch.randint(0, 16, (k, n), dtype=torch.int32)
    zeros = torch.randint(0, 16, (k // group, n), dtype=torch.int32)
    scales = torch.rand(k // group, n).half() + 0.1
    weight = ((numbers - zeros.repeat_interleave(group, 0)).double() * scales.repeat_interleave(group, 0).double()).t()
    if form == "gptq int4":
        packed, zero_words = pack(numbers, 0), pack(zeros, 1)
    else:
        packed, zero_words = (
            pack(one.view(len(one), -1, 8)[:, :, AWQ_COLUMNS].reshape(one.shape), 1) for one in (numbers, zeros)
        )
    layer = SimpleNamespace(
        qweight=packed.to(DEVICE), qzeros=zero_words.to(DEVICE), scales=scales.to(DEVICE), in_features=k,
        out_features=n, bits=4, group_size=group, g_idx=torch.arange(k, device=DEVICE) // group, adapter=None,
    )  # fmt: skip
    return layer, weight.to(DEVICE)


def weight_of(form: str, layer: Any) -> QuantizedWeight | None:
    return (gptq_weight_of if form == "gptq int4" else awq_weight_of)(layer)


@pytest.mark.parametrize("form", ["gptq int4", "awq int4"])
@pytest.mark.parametrize(
    ("rows", "n", "k", "group", "setting"),
    [
        (1, 128, 256, 128, WordSetting("dot", 64, 128, 1, 4, 2)),
        (5, 64, 384, 128, WordSetting("dot", 64, 64, 4, 4, 2)),  # half a group at a time, in shares of unequal length
        (33, 64, 128, 32, WordSetting("dot", 64, 32, 2, 4, 2)),
    ],
)
def test_equals_float64(form: str, rows: int, n: int, k: int, group: int, setting: WordSetting) -> None:
    layer, want_weight = random_layer(form, n, k, group)
    weight = weight_of(form, layer)
    assert weight is not None
    kind = FORMS[form]
    assert torch.equal(kind.values(weight).double(), want_weight.float().double())
    x = torch.randn(rows, k, device=DEVICE).half() * 0.1
    bias = torch.randn(n, device=DEVICE).half()
    want = x.double() @ want_weight.T + bias.double()
    counters = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        got = kind.few(x, weight, bias, counters, setting, None)
        assert float((got.double() - want).norm() / want.norm()) < 1e-3
        assert not counters.any()
    assert float((kind.own(x, weight, bias).double() - want).norm() / want.norm()) < 2e-3
    residual = torch.randn(rows, n, device=DEVICE).half()
    assert torch.equal(kind.few(x, weight, bias, counters, setting, residual), got + residual)


def test_a_packed_layer_of_another_author() -> None:
    layer: Any = PackedLinear(nn.Linear(128, 64, bias=False)).to(DEVICE)
    layer.in_features, layer.out_features, layer.bits, layer.group_size = 128, 64, 4, 32
    weight = gptq_weight_of(layer)
    assert weight is not None
    x = torch.randn(3, 128, device=DEVICE)
    torch.testing.assert_close(x @ FORMS["gptq int4"].values(weight).t(), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["gptq int4", "awq int4"])
def test_what_is_not_known(form: str) -> None:
    layer, _ = random_layer(form, 64, 256, 128)
    for name, value in (
        ("bits", 8),
        ("adapter", object()),
        ("planar", True),
        ("qweight", layer.qweight.t()),
        ("qzeros", layer.qzeros[:, :-1]),
        ("group_size", 64),
    ):
        assert weight_of(form, SimpleNamespace(**vars(layer) | {name: value})) is None, name
    permuted = SimpleNamespace(**vars(layer) | {"g_idx": layer.g_idx.flip(0)})
    assert gptq_weight_of(permuted) is None


@pytest.mark.parametrize("group", [32, 64, 128, 4096])
def test_settings_fit(group: int) -> None:
    for n, k in [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 12288)]:
        for setting in [default_setting(n, k, group), *candidates(n, k, group)]:
            assert n % setting.block_n == 0 and group % setting.block_k == 0 and setting.block_k >= 32
