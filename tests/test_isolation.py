"""Odd values, odd surroundings and odd endings: what a review found, each once."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_threads import engine_threads
from support.pace import slowed
from support.tiny_models import greedy_alone, ragged_prompts, tiny_model

from hf_async_batching import BatchingConfig, EngineClosedError, GenerationManager
from hf_async_batching.attention.probe import _sees
from hf_async_batching.request import Request

PROMPTS = ragged_prompts(4, 30, seed=8)
CONFIG = BatchingConfig(page_size=16, max_batch_tokens=64, debug=True)
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"max_new_tokens": 4, "do_sample": True, "top_k": 2**40, "eos_token_id": None}, 4),
        ({"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 2, "eos_token_id": [2**40, -7, 5000]}, 4),
        ({"max_new_tokens": 3.5, **GREEDY}, 4),
        ({"max_new_tokens": 4, "do_sample": True, "temperature": 1e-45, "eos_token_id": None}, 4),
    ],
    ids=str,
)
def test_odd_values_are_served_and_hurt_nobody(model: Any, arguments: dict[str, Any], count: int) -> None:
    with GenerationManager(model, CONFIG) as manager:
        innocent = manager.submit(PROMPTS[1], max_new_tokens=40, **GREEDY)
        odd = manager.submit(PROMPTS[2], **arguments)
        assert len(odd.result(60).token_ids) == count
        assert innocent.result(60).token_ids == greedy_alone(model, PROMPTS[1], 40, eos_token_id=None)
        if "temperature" in arguments:
            assert odd.result().token_ids == greedy_alone(model, PROMPTS[2], 4, eos_token_id=None)


def test_requests_made_by_hand_are_checked(model: Any) -> None:
    with GenerationManager(model, CONFIG) as manager:
        twins = [Request("twin", (5, 6), 2), Request("twin", (5, 6), 2)]
        with pytest.raises(ValueError, match="must differ"):
            manager.submit_requests(twins)
        assert len(manager.submit_request(twins[0]).result(60).token_ids) == 2
    with pytest.raises(ValueError, match="must be an integer"):
        Request("half", (5,), 2.5)  # type: ignore[arg-type]


def test_cancelling_an_ended_handle_leaves_its_successor_alone(model: Any) -> None:
    with GenerationManager(model, CONFIG) as manager:
        first = manager.submit([5], max_new_tokens=1, request_id="same", **GREEDY)
        first.result(60)
        second = manager.submit([5], max_new_tokens=30, request_id="same", **GREEDY)
        first._cancel(first)  # as if it had been on its way when the request ended
        assert second.result(60).finish_reason == "length"


def test_chunks_are_no_window() -> None:
    def window(b: int, h: int, q: Any, k: Any) -> Any:
        return (k <= q) & (k > q - 16)

    def chunks(b: int, h: int, q: Any, k: Any) -> Any:
        return (k <= q) & (k // 16 == q // 16)

    assert _sees(window, 16, chunked=False)
    assert _sees(lambda b, h, q, k: k <= q, None, chunked=False)
    assert not _sees(chunks, 16, chunked=False)
    assert not _sees(window, 15, chunked=False)
    assert not _sees(window, None, chunked=False)
    assert not _sees(lambda b, h, q, k: k >= 0, None, chunked=False)
    assert _sees(chunks, 16, chunked=True)
    assert not _sees(chunks, 15, chunked=True)
    assert not _sees(window, 16, chunked=True)


def test_defaults_of_the_caller_do_not_leak_in(model: Any) -> None:
    expected = greedy_alone(model, PROMPTS[1], 6, eos_token_id=None)
    before = torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with GenerationManager(model, CONFIG) as manager:
            result = manager.submit(PROMPTS[1], max_new_tokens=6, logprobs=True, **GREEDY).result(60)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert result.token_ids == expected
    assert result.logprobs is not None
    rounded = torch.tensor(result.logprobs).bfloat16().float().tolist()
    assert result.logprobs != pytest.approx(rounded, abs=1e-9), "log-probabilities went through bfloat16"


def test_a_dropped_manager_finishes_and_goes(model: Any) -> None:
    before = engine_threads()
    manager = GenerationManager(model, BatchingConfig(page_size=16, idle_timeout=None))
    handle = manager.submit(PROMPTS[1], max_new_tokens=30, **GREEDY)
    (thread,) = engine_threads() - before
    del manager
    gc.collect()
    assert len(handle.result(60).token_ids) == 30
    deadline = time.monotonic() + 60
    while thread.is_alive():
        assert time.monotonic() < deadline, "the thread of a manager that nobody holds goes on"
        time.sleep(0.02)


def test_weights_moved_under_a_live_request_end_it_with_the_reason() -> None:
    model = tiny_model("Llama")
    with GenerationManager(model, CONFIG) as manager:
        with slowed(manager):
            handle = manager.submit(PROMPTS[1], max_new_tokens=400, **GREEDY)
            next(iter(handle))
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        after = manager.submit(PROMPTS[2], max_new_tokens=5, **GREEDY)
        with pytest.raises(EngineClosedError, match="weights were moved"):
            handle.result(60)
        assert after.result(60).token_ids == greedy_alone(model, PROMPTS[2], 5, eos_token_id=None)


def test_replaced_buffers_are_noticed() -> None:
    model = tiny_model("Llama")
    with GenerationManager(model, CONFIG) as manager:
        manager.submit(PROMPTS[2], max_new_tokens=3, **GREEDY).result(60)
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.37
        got = manager.submit(PROMPTS[2], max_new_tokens=8, **GREEDY).result(60).token_ids
    assert got == greedy_alone(model, PROMPTS[2], 8, eos_token_id=None)


@pytest.mark.parametrize("family", ["Phi3"])
def test_no_length_beyond_what_positions_reach(family: str) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128,
        "partial_rotary_factor": 1.0,
    }
    model = tiny_model(family, rope_parameters=rope, original_max_position_embeddings=128)
    config = BatchingConfig(max_sequence_length=512)
    with GenerationManager(model, config) as manager, pytest.raises(ValueError, match="beyond the 128 tokens"):
        manager.warmup()


def test_exit_waits_for_no_long_step() -> None:
    code = textwrap.dedent(
        """
        import threading, time, torch
        from support.tiny_models import tiny_model
        import hf_async_batching
        model = tiny_model("Llama")
        hf_async_batching.generate(model, torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
        manager = hf_async_batching.get_manager(model)
        engine = manager.assembly.engine
        step, engine.step = engine.step, lambda: time.sleep(900) or step()
        manager.submit([5], max_new_tokens=4)
        time.sleep(0.3)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
