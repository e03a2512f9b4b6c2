"""Requests of models with states, by random schedules: tokens and log-probabilities of `generate` of each alone."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from support.pace import held
from transformers import PreTrainedModel

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.coverage.plain_reference import Reference, make_prompts, reference

FAMILIES = [
    "Qwen3_5ForCausalLM",
    "Lfm2ForCausalLM",
    "Mamba2ForCausalLM",
    "FalconH1ForCausalLM",
    "KimiLinearForCausalLM",
    "JambaForCausalLM",
]
LENGTHS = (14, 3, 1, 15, 30, 9, 16)
NEW = 18


@functools.cache
def known(class_name: str) -> tuple[PreTrainedModel, Reference]:
    model = tiny_model(class_name)
    return model, reference(model, make_prompts(190, LENGTHS, seed=3), NEW)


def check(result: Any, tokens: list[int], logprobs: list[float]) -> None:
    count = len(result.token_ids)
    assert list(result.token_ids) == tokens[:count]
    assert list(result.logprobs) == pytest.approx(logprobs[:count], abs=2e-3)


def up_to(tokens: list[int], eos: int | None) -> int:
    return tokens.index(eos) + 1 if eos in tokens else len(tokens)


# Every family at depth 2, one at the others; all of them in the slow form.
@pytest.mark.parametrize(
    ("class_name", "depth"),
    [
        pytest.param(name, depth, marks=[] if depth == 2 or name == FAMILIES[0] else pytest.mark.slow)
        for name in FAMILIES
        for depth in (1, 2, 3)
    ],
)
def test_random_schedules(class_name: str, depth: int) -> None:
    model, expected = known(class_name)
    rng = random.Random(f"{class_name} {depth}")
    # Three rows, and pages for less than two long requests: rows are taken over, and requests are computed again.
    config = BatchingConfig(
        page_size=16, num_pages=4, max_rows=3, max_batch_tokens=rng.choice([5, 8, 16]), max_sequence_length=64,
        depth=depth, attach_check=False, debug=True,
    )  # fmt: skip
    order = [*range(len(LENGTHS)), *range(len(LENGTHS))]
    rng.shuffle(order)
    late, cancelled = rng.sample(range(len(order)), 4), rng.sample(range(len(order)), 2)
    # Half of the requests end early, at a token that the engine knows of only after it has planned further steps.
    ends = [expected.tokens[i][rng.randrange(2, 9)] if rng.random() < 0.5 else None for i in order]

    with GenerationManager(model, config) as manager:
        handles: dict[int, Any] = {}

        def submit(number: int) -> None:
            handles[number] = manager.submit(
                expected.prompts[order[number]], max_new_tokens=NEW, do_sample=False, eos_token_id=ends[number],
                logprobs=True,
            )  # fmt: skip

        with held(manager):
            for number in range(len(order)):
                if number not in late:
                    submit(number)
        for number in late:
            next(iter(handles[rng.choice(sorted(handles))]))
            submit(number)
        for number in cancelled:
            next(iter(handles[number]))
            handles[number].cancel()
        results = {number: handle.result(120) for number, handle in handles.items()}
        assert manager.assembly is not None
        assert manager.assembly.forward.route == "packed, row states"
        stats = manager.stats()
        assert stats.pages_in_use == stats.rows_in_use == 0
    for number, result in results.items():
        tokens, logprobs = expected.tokens[order[number]], expected.logprobs[order[number]]
        check(result, tokens, logprobs)
        if number not in cancelled:
            assert len(result.token_ids) == up_to(tokens, ends[number])
    assert stats.finished == len(order) + 1, "all of them, and the one that starts an engine"
    assert stats.preemptions > 0, "page shortage was not exercised"
    assert expected.distinct_tokens > 8


@pytest.mark.parametrize("class_name", ["Qwen3_5ForCausalLM", "Mamba2ForCausalLM"])
def test_rows_of_states_continue_from_their_last_token_alone(class_name: str) -> None:
    """No drafts, since a rejected one could not be taken back, and no pages whose states were not kept."""
    model, expected = known(class_name)
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "logprobs": True}
    number = 4  # 30 tokens: a full page
    repeated = expected.prompts[number] + expected.prompts[number]
    want = reference(model, [repeated], NEW)
    with GenerationManager(model, BatchingConfig(page_size=16, attach_check=False, debug=True)) as manager:
        for _ in range(2):
            for prompt, tokens, logprobs in (
                (expected.prompts[number], expected.tokens[number], expected.logprobs[number]),
                (repeated, want.tokens[0], want.logprobs[0]),
            ):
                result = manager.submit(prompt, prompt_lookup_num_tokens=4, **arguments).result(60)
                assert len(result.token_ids) == NEW
                check(result, tokens, logprobs)
        stats = manager.stats()
    assert (stats.drafted_tokens, stats.accepted_tokens) == (0, 0)
    assert stats.prefix_hit_tokens == 0
