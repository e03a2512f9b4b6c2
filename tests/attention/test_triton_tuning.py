"""Settings of the attention kernels: the rule until measured, then the fastest, shared by neighbouring batches."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from hf_async_batching.attention.base import AttentionOptions
from hf_async_batching.attention.triton_kernels import DecodeConfig, default_decode_config
from hf_async_batching.attention.triton_prefill import prefill_block_sizes
from hf_async_batching.attention.triton_tuning import Problem, TritonSettings
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.runtime.autotune import Tuning

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = AttentionOptions(0.25)

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


class LaterIsFaster:
    """A timer that runs each launch and likes the last best."""

    def __init__(self) -> None:
        self.seconds = 1.0

    def __call__(self, launch: Callable[[], None]) -> float:
        launch()
        self.seconds *= 0.5
        return self.seconds


def problem(dtype: torch.dtype = torch.float32, size: int = 16) -> Problem:
    return Problem(4, 2, size, size, 16, dtype, None, False)


def default(rows: int) -> DecodeConfig:
    return default_decode_config(rows, 2, 2, 16, 16, torch.float32, DEVICE)


def test_the_rule_answers_without_measurements(tmp_path: Path) -> None:
    for tuning in (None, Tuning(DEVICE, tmp_path)):
        settings = TritonSettings(DEVICE, tuning)
        assert settings.decode(problem(), 0, OPTIONS, 4) == default(4)
        assert settings.prefill(problem(), 0, OPTIONS) == prefill_block_sizes(16, 16, 2, torch.float32)


def test_measured_settings_are_taken_and_remembered(tmp_path: Path) -> None:
    """Batches share them up to the next power of two; another problem goes by its rule."""
    cache = PagedCache([LayerShape(2, 16, 16, torch.float32)], num_pages=8, page_size=16, device=DEVICE)
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    counters = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    settings = TritonSettings(DEVICE, Tuning(DEVICE, tmp_path, LaterIsFaster()))
    settings.decode(problem(), 0, OPTIONS, 3)
    settings.prefill(problem(), 0, OPTIONS)
    settings.tune(cache, counters, batches=[3, 4], context=40, prompt=20)
    best = settings.decode(problem(), 0, OPTIONS, 4)
    assert best.splits > 1, "of full precision, only the number of splits is tried"
    assert best != default(4)
    assert not counters.any()
    assert all(torch.equal(*pair) for pair in zip((*cache.keys, *cache.values), before, strict=True))
    again = TritonSettings(DEVICE, Tuning(DEVICE, tmp_path))
    for each in (settings, again):
        assert each.decode(problem(), 0, OPTIONS, 3) == best
        assert each.decode(problem(), 0, OPTIONS, 2) == default(2)
        assert each.decode(problem()._replace(window=8), 0, OPTIONS, 4) == default(4)


def test_every_candidate_is_one_that_the_kernels_take() -> None:
    """On a card, what is too large for it fails when it is measured; here the shapes must be right."""
    for dtype, size in ((torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 128)):
        posed, settings = problem(dtype, size), TritonSettings(DEVICE, None)
        rule, candidates = settings._decode_choices(posed, 8)
        assert len({rule, *candidates}) == len(candidates) + 1
        assert all(1 <= config.splits <= 64 and config.n >= 16 for config in candidates)
        sizes, choices = settings._prefill_choices(posed)
        assert len({sizes, *choices}) == len(choices) + 1
        assert all(choice.m <= 256 for choice in choices), "a tile has 128 tokens of 2 heads"
        assert len(choices) >= (4 if dtype != torch.float32 else 0)
