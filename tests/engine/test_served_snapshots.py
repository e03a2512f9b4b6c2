"""The prefix cache of models with states: a chat's next turn starts behind its history, as `generate` answers it."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from support.pace import held
from transformers import PreTrainedModel

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.coverage.plain_reference import Reference, reference
from hf_async_batching.kv_cache import kv_cache_manager
from hf_async_batching.scheduler import waiting_queue

FAMILIES = [
    "Qwen3_5ForCausalLM",
    "Qwen3NextForCausalLM",
    "Lfm2ForCausalLM",
    "Mamba2ForCausalLM",
    "NemotronHForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "FalconH1ForCausalLM",
    "JambaForCausalLM",
]
VOCAB = 190


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, VOCAB) for _ in range(count)]


def check(result: Any, want: list[int], logprobs: list[float]) -> None:
    count = len(result.token_ids)
    assert list(result.token_ids) == want[:count]
    assert list(result.logprobs) == pytest.approx(logprobs[:count], abs=2e-3)


def each_depth_of(quick: str, class_names: list[str]) -> Any:
    """Every family at depth 2, one at the others; all of them in the slow form."""
    return pytest.mark.parametrize(
        ("class_name", "depth"),
        [
            pytest.param(name, depth, marks=[] if depth == 2 or name == quick else pytest.mark.slow)
            for name in class_names
            for depth in (1, 2, 3)
        ],
    )


SYSTEM = tokens(290, 1)
TURN = 72


@functools.cache
def chat(class_name: str) -> tuple[PreTrainedModel, list[tuple[list[int], list[int], list[float]]]]:
    """Prompts, tokens and log-probabilities: a first turn, the next one, and two other chats with the same system."""
    model = tiny_model(class_name)
    first = reference(model, [[*SYSTEM, *tokens(9, 2)]], TURN)
    second = [*first.prompts[0], *first.tokens[0], *tokens(11, 3)]
    others = [[*SYSTEM, *tokens(n, n)] for n in (15, 22)]
    rest = reference(model, [second, *others], 12)
    both = [*zip(first.prompts, first.tokens, first.logprobs), *zip(rest.prompts, rest.tokens, rest.logprobs)]
    return model, both


@each_depth_of("Lfm2ForCausalLM", FAMILIES)
def test_the_next_turn_starts_behind_its_history(class_name: str, depth: int) -> None:
    model, turns = chat(class_name)
    config = BatchingConfig(
        page_size=16, max_rows=3, max_batch_tokens=128, max_sequence_length=480, depth=depth, attach_check=False,
        debug=True,
    )  # fmt: skip
    found = []
    with GenerationManager(model, config) as manager:
        for prompt, want, logprobs in turns:
            before = manager.stats().prefix_hit_tokens
            result = manager.submit(
                prompt, max_new_tokens=len(want), do_sample=False, eos_token_id=None, logprobs=True
            ).result(120)  # fmt: skip
            check(result, want, logprobs)
            assert len(result.token_ids) == len(want)
            found.append(manager.stats().prefix_hit_tokens - before)
        assert manager.assembly is not None
        assert manager.assembly.forward.route == "packed, row states"
        assert manager.stats().pages_in_use == 0
    # The first answer crosses borders of pages at 304 and 368; the end of the system prompt is found out with the
    # second chat.
    assert found == [0, 368, 0, 288]


@functools.cache
def conversations(class_name: str) -> tuple[PreTrainedModel, Reference]:
    model = tiny_model(class_name)
    system = tokens(34, 7)
    prompts = [[*system, *tokens(count, count)] for count in (1, 14, 15, 20, 3)]
    first = reference(model, prompts, 30)
    longer = [
        [*prompt, *answer[:cut], 9, 8] for prompt, answer, cut in zip(prompts, first.tokens, (30, 17, 29, 6, 12))
    ]
    second = reference(model, longer, 30)
    return model, Reference(
        first.prompts + second.prompts, first.tokens + second.tokens, first.logprobs + second.logprobs
    )


@each_depth_of(
    "Lfm2ForCausalLM", ["Qwen3_5ForCausalLM", "Mamba2ForCausalLM", "FalconH1ForCausalLM", "Lfm2ForCausalLM"]
)
def test_random_schedules(class_name: str, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortage of pages and of places, ends that the host learns of late, cancels, prompts that share a beginning."""
    monkeypatch.setattr(kv_cache_manager, "WORTH_A_PIECE", 16)
    monkeypatch.setattr(kv_cache_manager, "WORTH_A_COPY", 16)
    monkeypatch.setattr(waiting_queue, "WORTH_WAITING", 16)
    model, expected = conversations(class_name)
    rng = random.Random(f"{class_name} {depth}")
    config = BatchingConfig(
        page_size=16, num_pages=9, max_rows=3, max_batch_tokens=rng.choice([8, 40]),
        max_sequence_length=128, depth=depth, attach_check=False, debug=True,
    )  # fmt: skip
    order = [*range(10), *range(10), *range(10)]
    rng.shuffle(order)
    cancelled = set(rng.sample(range(len(order)), 3))
    ends = [expected.tokens[i][rng.randrange(2, 25)] if rng.random() < 0.5 else None for i in order]
    with GenerationManager(model, config) as manager:
        handles: dict[int, Any] = {}
        with held(manager):
            for number, request in enumerate(order):
                handles[number] = manager.submit(
                    expected.prompts[request], max_new_tokens=30, do_sample=False, eos_token_id=ends[number],
                    logprobs=True,
                )  # fmt: skip
        for number in cancelled:
            next(iter(handles[number]))
            handles[number].cancel()
        for number, handle in handles.items():
            result = handle.result(120)
            want = expected.tokens[order[number]]
            check(result, want, expected.logprobs[order[number]])
            if number not in cancelled:
                assert len(result.token_ids) == (want.index(ends[number]) + 1 if ends[number] in want else 30)
        stats = manager.stats()
        assert stats.pages_in_use == stats.rows_in_use == 0
    assert stats.preemptions
    assert stats.prefix_hit_tokens > 200


def test_without_the_prefix_cache_there_are_no_snapshots() -> None:
    model = tiny_model("Mamba2ForCausalLM")
    config = BatchingConfig(page_size=16, max_rows=2, max_sequence_length=480, prefix_cache=False, attach_check=False)
    prompt = torch.tensor([SYSTEM])
    with GenerationManager(model, config) as manager:
        for _ in range(3):
            manager.submit(prompt, max_new_tokens=2).result(60)
        assert manager.assembly is not None and manager.assembly.config.num_snapshots == 0
        assert manager.stats().prefix_hit_tokens == 0
