"""Odd values, odd surroundings and odd endings: what a review found, each once."""

from __future__ import annotations

import gc
import textwrap
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from support.engine_threads import engine_threads
from support.forked_python import run_python
from support.pace import slowed
from support.tiny_models import greedy_alone, ragged_prompts, tiny_model

from hf_async_batching import BatchingConfig, EngineClosedError, EngineFailedError, GenerationManager
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.core.row_layout import Rule, RuleKind
from hf_async_batching.engine.engine_thread import _clear_frames
from hf_async_batching.model.forward.attention_probe import _sees

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


@pytest.mark.parametrize(
    "odd",
    [
        {"no_repeat_ngram_size": 2**31},
        {"encoder_no_repeat_ngram_size": 2**31},
        {"exponential_decay_length_penalty": (2**31, 1.5)},
        {"exponential_decay_length_penalty": (-(2**40), 1.0001)},
        {"suppress_tokens": [2**31, 2**40, -5]},
        {"begin_suppress_tokens": [2**31]},
        {"sequence_bias": [[[5], 1e39]]},
        {"repetition_penalty": 1e39},
        {"do_sample": True, "top_k": 1, "temperature": 1e-42, "output_scores": True, "return_dict_in_generate": True},
        {"do_sample": True, "top_p": 0.0},
        {"prompt_lookup_num_tokens": 2**31, "max_matching_ngram_size": 2**31},
        {"bad_words_ids": [[]]},
    ],
    ids=lambda odd: str(next(iter(odd.items()))),
)
def test_numbers_beyond_a_buffer_hurt_nobody(model: Any, odd: dict[str, Any]) -> None:
    arguments = {"max_new_tokens": 6, **GREEDY, "eos_token_id": 2, **odd}
    with GenerationManager(model, CONFIG) as manager:
        innocent = manager.submit(PROMPTS[1], max_new_tokens=40, **GREEDY)
        got = manager.submit(PROMPTS[2], **arguments).result(60).token_ids
        assert innocent.result(60).token_ids == greedy_alone(model, PROMPTS[1], 40, eos_token_id=None)
    if odd.get("temperature"):
        arguments = {"max_new_tokens": 6, **GREEDY, "eos_token_id": 2}
    if odd.get("encoder_no_repeat_ngram_size"):
        arguments["encoder_no_repeat_ngram_size"] = len(PROMPTS[2]) + 1
    if odd.get("exponential_decay_length_penalty", (0,))[0] < 0:
        return  # `generate` fails at its own power
    plain: Any = model.generate(torch.tensor([PROMPTS[2]]), **arguments)
    assert got == getattr(plain, "sequences", plain)[0, len(PROMPTS[2]) :].tolist()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Request("r", (5, "x"), 2), "input_ids"),
        (lambda: Request("r", (5, 2.5), 2), "input_ids"),
        (lambda: Request("r", (5, 2**70), 2), "input_ids"),
        (lambda: Request("r", (5, -1), 2), "input_ids"),
        (lambda: Request("r", (5,), 2, padding=(2**31,)), "padding"),
        (lambda: Request("r", (5,), 2, padding=(97,)), "padding"),
        (lambda: Request("r", (5,), 2**31), "max_sequence_length"),
        (lambda: Request("r", (5,), 2, lookup_tokens=2.5), "lookup_tokens"),
        (lambda: Request("r", (5,), 2, lookup_tokens=2, lookup_ngram=2.5), "lookup_ngram"),
        (lambda: Request("r", (5,), 2, eos_token_ids=("x",)), "eos_token_ids"),
        (lambda: Request("r", (5,), 2, prompt_embeddings=[[1.0]]), "inputs_embeds"),
        (lambda: Request("r", (5,), 2, prompt_embeddings=torch.zeros(2, 64)), "inputs_embeds"),
        (lambda: Request("r", (5,), 2, prompt_embeddings=torch.zeros(1, 64).to_sparse()), "inputs_embeds"),
        (lambda: Request("r", (5,), 2, prompt_embeddings=torch.zeros(1, 64, device="meta")), "inputs_embeds"),
        (lambda: SamplingParams(do_sample=True, seed=2**63), "seed"),
        (lambda: SamplingParams(do_sample=True, seed=1.5), "seed"),
        (lambda: SamplingParams(do_sample=True, top_k=2**31), "top_k"),
        (lambda: SamplingParams(do_sample=True, top_p=float("nan")), "top_p"),
        (lambda: SamplingParams(do_sample=True, temperature="x"), "temperature"),
        (lambda: SamplingParams(do_sample=True, temperature=1e39), "temperature"),
        (lambda: LogitsParams(no_repeat_ngram_size=65), "no_repeat_ngram_size"),
        (lambda: LogitsParams(encoder_no_repeat_ngram_size=2**31), "encoder_no_repeat_ngram_size"),
        (lambda: LogitsParams(decay_start=2**31), "decay_start"),
        (lambda: LogitsParams(decay_factor=float("nan")), "decay_factor"),
        (lambda: LogitsParams(repetition_penalty="x"), "repetition_penalty"),
        (lambda: LogitsParams((Rule(RuleKind.SUPPRESS, 2**31),)), "suppress_tokens"),
        (lambda: LogitsParams((Rule(RuleKind.BIAS, 5, (2**31,), 1.0),)), "sequence_bias"),
        (lambda: LogitsParams((Rule(RuleKind.BIAS, 5, (), float("nan")),)), "sequence_bias"),
        (lambda: LogitsParams((Rule(RuleKind.FORCE, 5, position=2**31),)), "forced_bos_token_id"),
        (lambda: Request("r", (5,), 2, logits=LogitsParams((Rule(RuleKind.BAN, 97),))), "bad_words_ids"),
        (lambda: Request("r", (5,), 2, sampling=SamplingParams(do_sample="x")), "request r"),
    ],
)
def test_numbers_of_requests_made_by_hand_are_refused_before_they_are_queued(model: Any, make: Any, name: str) -> None:
    with GenerationManager(model, CONFIG) as manager:
        innocent = manager.submit(PROMPTS[1], max_new_tokens=20, **GREEDY)
        with pytest.raises((ValueError, TypeError), match=name):
            manager.submit_request(make())
        assert innocent.result(60).finish_reason == "length"


def test_tokens_that_a_called_processor_would_index_are_checked(model: Any) -> None:
    """Out of range, they may fail the whole device."""

    def own(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores

    with GenerationManager(model, CONFIG) as manager, pytest.raises(ValueError, match="forced_eos_token_id"):
        manager.submit([5], max_new_tokens=9, forced_eos_token_id=[500], logits_processor=[own])


@pytest.mark.parametrize("kind", ["list", "numpy", "numpy list", "int32"])
def test_prompts_may_be_arrays(model: Any, kind: str) -> None:
    ids = np.array(PROMPTS[2], np.uint16)
    given = {"list": PROMPTS[2], "numpy": ids, "numpy list": list(ids), "int32": torch.tensor(PROMPTS[2]).int()}[kind]
    with GenerationManager(model, CONFIG) as manager:
        got = manager.submit(given, max_new_tokens=5, **GREEDY).result(60).token_ids  # type: ignore[arg-type]
    assert got == greedy_alone(model, PROMPTS[2], 5, eos_token_id=None)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint32(3), torch.tensor(3)], ids=repr)
def test_seeds_may_be_numbers_of_numpy_and_torch(model: Any, seed: Any) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "eos_token_id": None}
    with GenerationManager(model, CONFIG) as manager:
        expected = manager.submit([5], seed=3, **arguments).result(60).token_ids
        assert manager.submit([5], seed=seed, **arguments).result(60).token_ids == expected
        rows = [[5], [5]]
        bound = manager.bind(seed=np.array([3, 3]))  # type: ignore[arg-type]
        out = model.generate(torch.tensor(rows), custom_generate=bound, **arguments)
        assert out[:, 1:].tolist() == [expected, expected]
        with pytest.raises(TypeError, match="seed"):
            manager.submit([5], seed=1.5, **arguments)  # type: ignore[arg-type]


def test_a_tiny_temperature_is_the_arg_max_whoever_wants_scores(model: Any) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None, "top_k": 0}
    with GenerationManager(model, CONFIG) as manager:
        scored = manager.submit([5], **arguments, return_dict_in_generate=True, output_scores=True)
        cold = [manager.submit(PROMPTS[2], temperature=t, **arguments) for t in (1e-39, 1e-42)]
        scored.result(60)
        for handle in cold:
            assert handle.result(60).token_ids == greedy_alone(model, PROMPTS[2], 6, eos_token_id=None)


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
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_errors_that_are_chained_in_a_circle_let_go_of_their_frames() -> None:
    tensors: list[Any] = []

    def fails(text: str) -> ValueError:
        held = torch.ones(5)
        tensors.append(weakref.ref(held))
        try:
            raise ValueError(text)
        except ValueError as error:
            return error

    first, second = fails("one"), fails("two")
    first.__cause__, second.__cause__ = second, first
    _clear_frames(first)
    assert [tensor() for tensor in tensors] == [None, None]


def test_a_failure_that_a_caller_keeps_holds_nothing_of_the_engine(model: Any) -> None:
    tensors: list[Any] = []

    def fails() -> None:
        held = torch.ones(5)
        tensors.append(weakref.ref(held))
        raise RuntimeError("a step failed")

    with GenerationManager(model, CONFIG) as manager:
        manager.warmup()
        assert manager.assembly is not None
        manager.assembly.engine.scheduler.plan = fails  # type: ignore[method-assign, assignment]
        with pytest.raises(EngineFailedError, match="a step failed") as caught:
            manager.submit(PROMPTS[1], max_new_tokens=3, **GREEDY).result(60)
    assert caught.value.__cause__ is not None
    assert tensors[0]() is None, "an error that is kept holds what the engine's frames held"
