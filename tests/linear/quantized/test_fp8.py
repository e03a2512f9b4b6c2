"""Products with blocks of 8-bit floats in Triton's interpreter, against what transformers' layer computes."""

import os

os.environ.setdefault("TRITON_INTERPRET", "0" if __import__("torch").cuda.is_available() else "1")

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from support.interpreter import round_to_float8

from hf_async_batching.linear.quantized import fp8_form
from hf_async_batching.linear.quantized.forms import recognise
from hf_async_batching.linear.quantized.fp8 import Fp8Setting, candidates, default_setting
from hf_async_batching.linear.quantized.fp8_form import Fp8Blocks, multiplies_float8, quantized_rows
from hf_async_batching.linear.quantized.weight import QuantizedWeight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cuda" and not multiplies_float8(DEVICE):
    pytest.skip("no tensor cores for 8-bit floats", allow_module_level=True)


def random_weight(n: int, k: int) -> QuantizedWeight:
    packed = torch.randn(n, k, device=DEVICE).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-n // 128), k // 128, device=DEVICE) + 0.1
    return QuantizedWeight("fp8 blocks", packed, (scales,), n, k, 128)


@pytest.mark.parametrize(
    ("rows", "n", "k", "setting"),
    [
        (1, 192, 256, Fp8Setting("dot", 64, 1, 4, 2)),
        (5, 200, 384, Fp8Setting("dot", 128, 2, 4, 2)),  # shares of unequal length; outputs are no multiple
        (17, 136, 128, Fp8Setting("dot", 64, 4, 4, 2)),  # more shares than blocks
        (64, 64, 256, Fp8Setting("dot", 32, 1, 4, 2)),
    ],
)
def test_equals_the_reference_with_quantized_activations(
    monkeypatch: pytest.MonkeyPatch, rows: int, n: int, k: int, setting: Fp8Setting
) -> None:
    if DEVICE.type == "cpu":
        round_to_float8(monkeypatch)
    weight, form = random_weight(n, k), Fp8Blocks()
    x = torch.randn(rows, k, device=DEVICE, dtype=torch.float16)
    x[0, :128] = 0  # nothing to divide by
    bias = torch.randn(n, device=DEVICE, dtype=torch.float16)
    counters = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    want = quantized_rows(x).double() @ form.values(weight).double().T + bias.double()
    for _ in range(2):
        got = form.few(x, weight, bias, counters, setting, None)
        assert float((got.double() - want).norm() / want.norm()) < 3e-3
        assert not counters.any()
    residual = torch.randn(rows, n, device=DEVICE, dtype=torch.float16)
    assert torch.equal(form.few(x, weight, bias, counters, setting, residual), got + residual)


def test_settings_fit() -> None:
    for n, k in [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (576, 640)]:
        for setting in [default_setting(n, k), *candidates(n, k)]:
            assert 128 % setting.block_n == 0 and setting.splits <= k // 128


def layer(**changes: Any) -> Any:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    arguments = {"in_features": 256, "out_features": 192, "block_size": (128, 128)} | changes
    return finegrained.FP8Linear(**arguments).requires_grad_(False)


def test_which_layers_are_known() -> None:
    weight = recognise(made := layer())
    assert weight is not None
    assert weight.form == "fp8 blocks" and weight.packed.data_ptr() == made.weight.data_ptr()
    assert (weight.outputs, weight.inputs) == (192, 256)
    for changes in ({"activation_scheme": "static"}, {"block_size": None}, {"block_size": (64, 128)}):
        assert recognise(layer(**changes)) is None, changes
    assert recognise(layer(in_features=192)) is None, "a block that is cut off"


def test_many_rows_are_the_layers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels come from the hub; here the reference stands for them."""
    made = layer()
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    monkeypatch.setattr(finegrained, "fp8_linear", lambda x, *rest: (x, *rest))
    weight = fp8_form.weight_of(made)
    assert weight is not None
    x = torch.randn(3, 256)
    got: Any = Fp8Blocks().own(x, weight, None)
    assert got[0] is x and got[1].data_ptr() == made.weight.data_ptr()
    assert got[3:] == ([128, 128], None, None)
