"""Settings of the skinny product: by rule, by measurement, and remembered."""

import os

os.environ.setdefault("TRITON_INTERPRET", "0" if __import__("torch").cuda.is_available() else "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from hf_async_batching.devices.shared_memory import shared_memory_limit
from hf_async_batching.linear import engine_linear, skinny_settings
from hf_async_batching.linear.engine_linear import MAX_STRIPS, convert, products
from hf_async_batching.linear.skinny import LIBRARY, SkinnySetting, default_setting
from hf_async_batching.linear.skinny_settings import SkinnySettings
from hf_async_batching.runtime.autotune import Tuning

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RULE = default_setting(16, 64, 64, shared_memory_limit(DEVICE))


def counters() -> torch.Tensor:
    return torch.zeros(MAX_STRIPS, dtype=torch.int32, device=DEVICE)


def settings(folder: Path, times: Callable[[int], float]) -> SkinnySettings:
    """Whose timer answers `times(n)` at the n-th measurement, after running what it measures."""
    calls = iter(range(1000))

    def timer(launch: Callable[[], None]) -> float:
        launch()
        return times(next(calls))

    return SkinnySettings(DEVICE, Tuning(DEVICE, folder, timer))


def weight(n: int = 64, k: int = 64) -> torch.Tensor:
    return torch.randn(n, k, dtype=torch.float16, device=DEVICE)


def test_the_rule_where_nothing_was_measured(tmp_path: Path) -> None:
    known = settings(tmp_path, lambda n: 1.0)
    assert known.choose(3, weight()) == known.choose(16, weight()) == RULE


def test_the_fastest_is_chosen_and_remembered(tmp_path: Path) -> None:
    known = settings(tmp_path, lambda n: 0.5 if n == 2 else 1.0)
    assert known.choose(16, weight()) == RULE
    known.tune([weight(), weight(), weight(32)], [1, 16, 100], counters())
    chosen = known.choose(16, weight())
    assert chosen not in (RULE, LIBRARY)
    later = settings(tmp_path, lambda n: 1.0)
    assert later.choose(2, weight()) == chosen, "another process finds it"
    assert later.choose(17, weight()) != LIBRARY, "of other sizes nothing is known"


def test_the_library_can_win(tmp_path: Path) -> None:
    known = settings(tmp_path, lambda n: 0.5 if n == 1 else 1.0)
    known.tune([weight()], [8], counters())
    assert known.choose(8, weight()) == LIBRARY


def test_layers_take_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(64, 64, device=DEVICE).half()
    convert(layer, counters(), skinny=True)
    taken: list[SkinnySetting | None] = []
    from hf_async_batching.linear import skinny

    def run(
        x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, c: torch.Tensor, setting: SkinnySetting, added: None
    ) -> torch.Tensor:
        taken.append(setting)
        return torch.nn.functional.linear(x, w, b)

    monkeypatch.setattr(skinny, "skinny_linear", run)
    known = settings(tmp_path, lambda n: 0.5 if n == 1 else 1.0)
    monkeypatch.setattr(skinny_settings, "settings_for", lambda device: known)
    x = torch.randn(4, 64, device=DEVICE).half()
    assert engine_linear._few_rows(x, layer.weight, layer.bias, counters()) is not None
    assert taken == [RULE]
    known.tune([layer.weight], [4], counters())
    assert engine_linear._few_rows(x, layer.weight, layer.bias, counters()) is None, "the library was measured faster"
    assert engine_linear._few_rows(torch.randn(4, 64, device=DEVICE), layer.weight.float(), None, counters()) is None


def test_products_of_a_view() -> None:
    first, second, alone = (torch.nn.Linear(4, 4) for _ in range(3))
    view = torch.nn.ModuleList([first, second, alone, torch.nn.Linear(4, 4)])
    for layer in (first, second, alone):
        convert(layer, counters(), skinny=False)
    engine_linear.bundle_together([first, second], torch.zeros(8, 4), None)
    assert [tuple(w.shape) for w, _, _ in products(view)] == [(8, 4), (4, 4)], "what is no engine layer is not ours"
