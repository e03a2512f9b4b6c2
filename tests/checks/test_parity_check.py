"""How the check of a model brings its two sides together; what it refuses is tested with the families."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from packaging.version import parse
from support.tiny_models import tiny_model

from hf_async_batching.attention.base import AttentionBackend
from hf_async_batching.attention.select import make_backend
from hf_async_batching.checks import parity_check as module
from hf_async_batching.checks.parity_check import check_parity
from hf_async_batching.checks.reference_attention import FlashFirst
from hf_async_batching.checks.reference_logits import Expected
from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.model.forward.cache_forward import MODES, CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward

CPU = torch.device("cpu")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the check does, with its jobs in threads as on a GPU; the plain forward waits a little for the engine's."""
    log: list[str] = []
    engine_runs = threading.Event()
    plain, engine, ready = module.reference_logits, module._engine_logits, AttentionBackend.ready

    def in_threads(jobs: list[Callable[[], object]], device: torch.device) -> None:
        def run(job: Callable[[], object]) -> None:
            with torch.inference_mode():
                job()

        with ThreadPoolExecutor(len(jobs)) as pool:
            for done in [pool.submit(run, job) for job in jobs]:
                done.result()

    def run_plain(*args: Any) -> Any:
        log.append("plain begins")
        engine_runs.wait(0.5)
        found = plain(*args)
        log.append("plain ends")
        return found

    def run_engine(*args: Any) -> Any:
        log.append("engine")
        engine_runs.set()
        return engine(*args)

    def compile_kernels(self: AttentionBackend, *args: Any, **options: Any) -> None:
        log.append("kernels")
        ready(self, *args, **options)

    monkeypatch.setattr(module, "run_parallel", in_threads)
    monkeypatch.setattr(module, "reference_logits", run_plain)
    monkeypatch.setattr(module, "_engine_logits", run_engine)
    monkeypatch.setattr(type(make_backend("auto", CPU)), "ready", compile_kernels)
    return log


def test_the_engine_runs_beside_the_plain_forward_once_its_kernels_are_there(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[object] = []

    def wait(job: Callable[[], object]) -> Callable[[], object]:
        waited.append(job)
        return job

    monkeypatch.setattr(module, "after_compiler_start", wait)
    model = tiny_model("Llama")
    check_parity(model, PackedForward(model), make_backend("auto", CPU))
    assert log.index("kernels") < log.index("engine") < log.index("plain ends")
    assert len(waited) == 3, "every kernel waits for the compiler, the plain forward does not"


@pytest.mark.parametrize("why", ["ranks", "another route", "quantized", "code of others"])
def test_what_must_not_run_at_the_same_time_runs_in_turn(
    log: list[str], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    model = tiny_model("Llama")
    if why == "ranks":
        monkeypatch.setattr(module, "parallel_modules", lambda view: [view.lm_head])
    elif why == "quantized":
        monkeypatch.setattr(module, "is_quantized", lambda view: True)
    elif why == "code of others":
        model.model.norm = _Norm(model.model.norm)
    forward = CacheForward(model) if why == "another route" else PackedForward(model)
    check_parity(model, forward, make_backend("auto", CPU))
    assert log.index("plain ends") < log.index("engine")


class _Norm(torch.nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("packed", [True, False])
def test_flash_kernels_are_for_a_check_of_other_kernels(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes with `generate`'s own is compared more strictly than kernels may differ."""
    modes: list[bool] = []
    plain = module.reference_logits

    def seen(*args: Any) -> Expected:
        stack = torch.overrides._get_current_function_mode_stack()
        modes.append(any(isinstance(mode, FlashFirst) for mode in stack))
        return plain(*args)

    monkeypatch.setattr(module, "reference_logits", seen)
    model = tiny_model("Llama")
    view = check_parity(model, PackedForward(model) if packed else CacheForward(model), make_backend("auto", CPU))
    assert modes == [packed]
    assert view is not model and view.lm_head.weight is model.lm_head.weight


def test_a_plain_forward_that_fails_holds_nobody_up(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(module, "reference_logits", fail)
    model = tiny_model("Llama")
    with pytest.raises(UnsupportedModelError, match="no such thing"):
        check_parity(model, CacheForward(model), make_backend("auto", CPU))
    assert log == ["engine"]


@pytest.mark.parametrize(
    ("route", "noise", "served"),
    [("packed", 0.0, True), ("row by row", 0.0, True), ("padded", 1e-3, False), ("padded", 2e-2, True)],
)
def test_rounding_of_16_bits_hides_nothing_where_the_kernels_are_the_same(
    route: str, noise: float, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of 2e-2: rounding may be as much between other kernels, and of the same where it was seen to be."""
    if route == "padded" and parse(transformers.__version__) < parse("5.24"):
        pytest.skip("the masks of older releases of transformers bear no batch beside this cache")
    model = tiny_model("Llama").to(torch.bfloat16)
    forward: PackedForward | CacheForward = PackedForward(model)
    if route != "packed":
        forward = CacheForward(model) if route == "row by row" else CacheForward(model, *MODES[0])
    plain = module.reference_logits

    def expected(*args: Any) -> Expected:
        logits = {label: one + 2e-2 * one.roll(1) for label, one in plain(*args).logits.items()}
        return Expected(logits, noise)

    monkeypatch.setattr(module, "reference_logits", expected)
    with nullcontext() if served else pytest.raises(UnsupportedModelError, match="differ from plain `generate`'s"):
        check_parity(model, forward, make_backend("auto", CPU))
