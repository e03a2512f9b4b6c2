"""Autocast of the calling thread: the engine's forward runs under it, and nobody else's does."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.tiny_models import greedy_alone, ragged_prompts, tiny_model

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.runtime.autocast import Autocast

PROMPTS = ragged_prompts(8, 30, seed=5)
CONFIG = BatchingConfig(page_size=16, max_batch_tokens=64, debug=True)
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Qwen3")


def expected(model: Any, dtype: torch.dtype | None) -> list[list[int]]:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return [greedy_alone(model, prompt, 12, eos_token_id=None) for prompt in PROMPTS]


def right(model: Any, got: list[list[int]], dtype: torch.dtype | None) -> bool:
    """Whether tokens are `generate`'s, but for ties: processors that multiply bfloat16 themselves (AVX-512 BF16, AMX)
    sum in an order that depends on the batch. Then each must be within two roundings of the largest logit.
    """
    want = expected(model, dtype)
    for prompt, tokens, wanted in zip(PROMPTS, got, want, strict=True):
        if tokens == wanted:
            continue
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].float()
        gaps = logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        if dtype != torch.bfloat16 or len(tokens) != len(wanted) or gaps.max() > 2 * 2**-7 * logits.abs().max():
            return False
    return True


def served(manager: GenerationManager) -> list[list[int]]:
    handles = [manager.submit(prompt, **GREEDY) for prompt in PROMPTS]
    return [handle.result(60).token_ids for handle in handles]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_equal_to_generate_under_the_same_autocast(model: Any, dtype: torch.dtype) -> None:
    want = expected(model, dtype)
    assert want != expected(model, None), "rounding changes nothing: this test would prove nothing"
    with GenerationManager(model, CONFIG) as manager:
        with torch.autocast("cpu", dtype):
            got = served(manager)
        assert right(model, got, dtype)
        assert got != expected(model, None)
        assert manager.assembly is not None
        assert {layer.dtype for layer in manager.assembly.forward.layers} == {dtype}


def test_the_same_through_generate(model: Any) -> None:
    ids = torch.tensor([PROMPTS[-1]])
    with torch.autocast("cpu", torch.bfloat16):
        want = model.generate(ids, **GREEDY)
        got = model.generate(ids, custom_generate=hf_async_batching.generate, **GREEDY)
        again = model.generate(ids, custom_generate=hf_async_batching.generate, **GREEDY)
    assert torch.equal(got, want)
    assert torch.equal(again, want)
    plain = model.generate(ids, custom_generate=hf_async_batching.generate, **GREEDY)
    assert torch.equal(plain, model.generate(ids, **GREEDY))


def test_states_alternate_and_do_not_mix(model: Any) -> None:
    """Callers under different states wait for each other: no batch and no cache holds requests of both."""
    dtypes = [None, torch.bfloat16, torch.float16]
    answers: list[tuple[torch.dtype | None, list[list[int]]]] = []

    def caller(dtype: torch.dtype | None) -> None:
        for _ in range(3):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                handles = [manager.submit(prompt, **GREEDY) for prompt in PROMPTS]
            # Waiting needs no autocast: the state is that of the submission.
            answers.append((dtype, [handle.result(120).token_ids for handle in handles]))

    with GenerationManager(model, CONFIG) as manager:
        threads = [threading.Thread(target=caller, args=(dtype,)) for dtype in dtypes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 9
    plain = expected(model, None)
    assert [dtype for dtype, got in answers if not right(model, got, dtype) or (got == plain) != (dtype is None)] == []


def test_live_requests_end_as_they_began(model: Any) -> None:
    with GenerationManager(model, CONFIG) as manager:
        long = manager.submit(PROMPTS[-1], **{**GREEDY, "max_new_tokens": 200})
        with torch.autocast("cpu", torch.bfloat16):
            got = served(manager)
        assert right(model, got, torch.bfloat16) and got != expected(model, None)
        assert long.done, "the other state's engine started while this one's was still running"
        assert long.result(60).token_ids == greedy_alone(model, PROMPTS[-1], 200, eos_token_id=None)


@pytest.mark.parametrize(
    "settings",
    [{"fuse_weights": True}, pytest.param({"compile": True, "fuse_weights": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_fused_and_compiled(settings: dict[str, Any]) -> None:
    model = tiny_model("Qwen3")
    config = BatchingConfig(page_size=16, max_batch_tokens=64, **settings)
    with GenerationManager(model, config) as manager, torch.autocast("cpu", torch.bfloat16):
        manager.warmup()
        assert manager.assembly is not None
        assert manager.assembly.forward.packed_groups
        got = served(manager)
    # What is compiled rounds in other places, too.
    assert right(model, got, torch.bfloat16) and got != expected(model, None)


def test_weights_cast_by_one_thread_are_not_seen_by_another() -> None:
    """torch keeps casts of weights for all threads; the engine must neither read nor leave any."""
    model = tiny_model("Llama")
    ids = torch.tensor([PROMPTS[3]])
    with GenerationManager(model, CONFIG) as manager, torch.autocast("cpu", torch.bfloat16):
        first = served(manager)
        # A training step under the same autocast: its casts must not be the engine's, which nobody can train on.
        model(ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.sign(parameter.grad), alpha=-0.05)
        manager.weights_updated()
        second = served(manager)
    assert second != first
    assert right(model, second, torch.bfloat16)


def test_what_is_captured() -> None:
    assert Autocast.of_this_thread("cpu") == Autocast("cpu", None)
    with torch.autocast("cpu", torch.bfloat16):
        state = Autocast.of_this_thread("cpu")
        assert state == Autocast("cpu", torch.bfloat16)
        assert str(state) == "torch.bfloat16"
        with torch.autocast("cpu", enabled=False):
            assert Autocast.of_this_thread("cpu").dtype is None
        with Autocast("cpu")():
            assert not torch.is_autocast_enabled("cpu"), "a forward without autocast stays without"
        assert Autocast.of_this_thread("cuda").dtype is None, "the model is not there"
    with state():
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()
