"""Products by the vendor's library, with a bias of zeros where that is faster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_async_batching.linear import engine_linear, library
from hf_async_batching.linear.library import gains_by_bias, library_linear, zeros_for

pytest.importorskip("triton")

from hf_async_batching.linear import skinny, skinny_settings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def no_zeros_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_zeros", {})


def gains(rows: int, n: int, k: int, both: torch.dtype = torch.bfloat16, **changes: Any) -> bool:
    """As on a card of the kind that was measured."""
    dtype = both
    x = SimpleNamespace(is_cuda=True, dtype=dtype, device="h100", numel=lambda: rows * k)
    weight = SimpleNamespace(shape=(n, k), dtype=dtype)
    for name, value in changes.items():
        setattr(x, name, value)
    return gains_by_bias(x, weight)  # type: ignore[arg-type]


def test_which_products_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_chooses_so", lambda device: device == "h100")
    assert gains(128, 4096, 14336)
    assert gains(511, 4096, 14336)
    assert not gains(512, 4096, 14336), "both choose the same"
    assert not gains(1, 4096, 14336), "cuBLASLt is not used for one row"
    assert not gains(128, 4096, 4096)
    assert not gains(128, 28672, 14336), "not long beside the outputs"
    assert not gains(128, 40000, 90000), "more outputs than zeros"
    assert gains(128, 2048, 8192)
    assert not gains(128, 2048, 8191), "short"
    assert not gains(128, 4096, 14336, dtype=torch.float16), "of another dtype than the weight"
    assert not gains(128, 4096, 14336, both=torch.float32)
    assert not gains(128, 4096, 14336, is_cuda=False)
    assert not gains(128, 4096, 14336, device="a100")


def test_on_which_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for major in (8, 9, 10):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, major=major: (major, 0))
        library._chooses_so.cache_clear()
        found.append(library._chooses_so(torch.device("cuda", 0)))
    library._chooses_so.cache_clear()
    assert found == [False, True, False], "those that were measured"


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_the_product_is_the_same(gained: bool, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "gains_by_bias", lambda *_: gained)
    x = torch.randn(3, 5, 64, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(48, 64, device=DEVICE, dtype=torch.bfloat16) / 8
    bias = torch.randn(48, device=DEVICE, dtype=torch.bfloat16) if given else None
    got = library_linear(x, weight, bias)
    want = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=1e-2)
    assert bool(library._zeros) == (gained and not given)


@pytest.mark.parametrize("gained", [False, True])
def test_a_sum_behind_the_product(gained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (library, engine_linear):
        monkeypatch.setattr(module, "gains_by_bias", lambda *_: gained)
    x = torch.randn(70, 64, device=DEVICE, dtype=torch.bfloat16)
    weight, residual = (torch.randn(n, 64, device=DEVICE, dtype=torch.bfloat16) / 8 for n in (64, 70))
    counters = torch.zeros(engine_linear.MAX_STRIPS, dtype=torch.int32, device=DEVICE)
    kept = residual.clone()
    got = engine_linear._linear_add(x, weight, None, counters, residual)
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T + kept.double(), atol=2e-2, rtol=1e-2)
    assert torch.equal(residual, kept), "others read it, too"


def test_products_beyond_our_kernel_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    for module in (engine_linear, skinny_settings):
        monkeypatch.setattr(module, "library_linear", lambda *a: calls.append(a) or torch.nn.functional.linear(*a))
    x, weight = torch.randn(70, 64, device=DEVICE), torch.randn(48, 64, device=DEVICE)
    counters = torch.zeros(engine_linear.MAX_STRIPS, dtype=torch.int32, device=DEVICE)
    engine_linear._linear(x, weight, None, counters)
    engine_linear._linear_add(x, weight, None, counters, torch.zeros(70, 48, device=DEVICE))
    layer = torch.nn.Linear(64, 48, device=DEVICE)
    engine_linear.convert(layer, counters, skinny=False)
    layer(x)
    assert len(calls) == 3
    skinny_settings._products([weight], 70, counters)(skinny.LIBRARY)()
    assert len(calls) > 3, "what is measured is what serves"


def test_zeros_are_made_once_and_not_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.empty(2, 64, dtype=torch.float16, device=DEVICE), torch.empty(48, 64, device=DEVICE)
    fake: Any = SimpleNamespace(is_cuda=True, device=x.device, dtype=x.dtype)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert zeros_for(fake, weight) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    zeros = zeros_for(x, weight)
    assert zeros is not None
    assert zeros.shape == (48,) and zeros.dtype == x.dtype and not zeros.any()
    other = zeros_for(torch.empty(2, 64, dtype=torch.bfloat16, device=DEVICE), weight)
    assert other is not None
    assert other.dtype == torch.bfloat16, "of each dtype"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    again = zeros_for(fake, weight)
    assert again is not None
    assert again.data_ptr() == zeros.data_ptr(), "captured graphs go on reading them"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_a_graph() -> None:
    x, weight = torch.randn(128, 8192, device=DEVICE).bfloat16(), torch.randn(256, 8192, device=DEVICE).bfloat16()
    assert gains_by_bias(x, weight) == (torch.cuda.get_device_capability()[0] == 9)
    expected = library_linear(x, weight, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = library_linear(x, weight, None)
    graph.replay()
    assert torch.equal(got, expected)
