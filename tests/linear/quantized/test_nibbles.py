"""Products with 4-bit weights in Triton's interpreter, against float64 and against bitsandbytes."""

import os

os.environ.setdefault("TRITON_INTERPRET", "0" if __import__("torch").cuda.is_available() else "1")

import pytest
import torch

pytest.importorskip("triton")

from hf_async_batching.linear.quantized.forms import FORMS
from hf_async_batching.linear.quantized.nibbles import NibbleSetting, candidates, default_setting, nibble_linear
from hf_async_batching.linear.quantized.weight import QuantizedWeight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_weight(n: int, k: int, *, nested: bool, form: str = "nf4", group: int = 64) -> QuantizedWeight:
    packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device=DEVICE)
    groups = n * k // group
    scales: tuple[torch.Tensor, ...] = (torch.rand(groups, device=DEVICE) + 0.1,)
    if nested:
        codes = torch.randint(0, 256, (groups,), dtype=torch.uint8, device=DEVICE)
        outer = torch.rand(-(-groups // 256), device=DEVICE)
        scales = codes, torch.linspace(-1, 1, 256, device=DEVICE), outer, torch.tensor(1.5, device=DEVICE)
    return QuantizedWeight(form, packed, scales, n, k, group)


@pytest.mark.parametrize(
    ("rows", "n", "k", "setting"),
    [
        (1, 64, 512, NibbleSetting("vector", 8, 256, 1, 4, 2)),
        (2, 40, 320, NibbleSetting("vector", 16, 256, 1, 4, 2)),  # neither side is a multiple of its block
        (3, 48, 512, NibbleSetting("vector", 8, 128, 4, 4, 2)),
        (5, 80, 192, NibbleSetting("sums", 32, 64, 1, 4, 2)),
        (17, 96, 320, NibbleSetting("sums", 64, 32, 3, 4, 2)),  # half a group at a time, in shares of unequal length
        (33, 48, 192, NibbleSetting("sums", 32, 64, 8, 4, 2)),  # more shares than blocks
        (2, 72, 320, NibbleSetting("weights", 32, 128, 2, 4, 2)),
        (64, 32, 256, NibbleSetting("rounded", 32, 128, 1, 4, 2)),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_equals_float64(rows: int, n: int, k: int, setting: NibbleSetting, nested: bool) -> None:
    weight, form = random_weight(n, k, nested=nested), FORMS["nf4"]
    x = torch.randn(rows, k, device=DEVICE, dtype=torch.float16)
    bias = torch.randn(n, device=DEVICE, dtype=torch.float16) if rows != 3 else None
    counters = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    want = x.double() @ form.values(weight).double().T + (0 if bias is None else bias.double())
    for _ in range(2):  # the second launch finds the counters as the first left them
        got = form.few(x, weight, bias, counters, setting, None)
        assert float((got.double() - want).norm() / want.norm()) < 1e-3
        assert not counters.any()


@pytest.mark.parametrize("setting", [NibbleSetting("vector", 8, 64, 2, 4, 2), NibbleSetting("sums", 32, 64, 1, 4, 2)])
def test_a_residual_is_added_to_the_rounded_product(setting: NibbleSetting) -> None:
    weight = random_weight(48, 192, nested=False)
    x = torch.randn(1, 2, 192, device=DEVICE, dtype=torch.float16)
    residual = 100 * torch.randn(1, 2, 48, device=DEVICE, dtype=torch.float16)
    counters = torch.zeros(48, dtype=torch.int32, device=DEVICE)
    product = nibble_linear(x, weight, "nf4", None, counters, setting, high_first=True)
    assert product.shape == (1, 2, 48)
    both = nibble_linear(x, weight, "nf4", None, counters, setting, residual, high_first=True)
    assert torch.equal(both, product + residual)


def test_the_low_half_can_be_the_first_column() -> None:
    weight = random_weight(32, 128, nested=False)
    swapped = weight._replace(packed=(weight.packed << 4) | (weight.packed >> 4))
    x, counters = torch.randn(2, 128, device=DEVICE).half(), torch.zeros(32, dtype=torch.int32, device=DEVICE)
    for setting in (NibbleSetting("vector", 8, 64, 1, 4, 2), NibbleSetting("sums", 32, 64, 1, 4, 2)):
        one = nibble_linear(x, weight, "fp4", None, counters, setting, high_first=True)
        assert torch.equal(one, nibble_linear(x, swapped, "fp4", None, counters, setting, high_first=False))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_reads_what_bitsandbytes_quantized(kind: str, nested: bool, blocksize: int) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    plain = torch.randn(48, 256, device=DEVICE, dtype=torch.float16)
    packed, state = functional.quantize_4bit(plain, quant_type=kind, compress_statistics=nested, blocksize=blocksize)
    outer = (state.state2.code, state.state2.absmax, state.offset) if nested else ()
    weight = QuantizedWeight(kind, packed, (state.absmax, *outer), 48, 256, blocksize)
    state.dtype = torch.float32
    want = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(FORMS[kind].values(weight), want, rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 256, device=DEVICE, dtype=torch.float16)
    own = FORMS[kind].own(x, weight, None)
    assert float((own.double() - x.double() @ want.double().T).norm() / own.double().norm()) < 1e-3
    counters = torch.zeros(48, dtype=torch.int32, device=DEVICE)
    for rows in (2, 16):
        setting = default_setting(rows, 48, 256, blocksize)
        got = FORMS[kind].few(x, weight, None, counters, setting, None)
        assert float((got.double() - own.double()).norm() / own.double().norm()) < 2e-3


@pytest.mark.parametrize("group", [64, 128])
def test_settings_fit(group: int) -> None:
    for rows in (1, 2, 4, 8, 16, 32, 64):
        for n, k in [(6144, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (960, 576)]:
            for setting in [default_setting(rows, n, k, group), *candidates(rows, n, k, group)]:
                within = setting.way == "sums"
                assert group % setting.block_k == 0 if within else setting.block_k % group == 0
                assert setting.splits == 1 or -(-n // setting.block_n) <= 8192
                assert setting.way != "vector" or rows <= 4
