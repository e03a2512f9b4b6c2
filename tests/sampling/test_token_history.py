"""Histories and marks of rows, against plain Python."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_model

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Chunk, Features, NewRow, Plan
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.core.row_layout import HISTORY_START, RULE_WORDS, Rule, RuleKind
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.runner.staging import encode
from hf_async_batching.sampling.sampler import Sampler

VOCAB = 50
ROWS = 5

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


def make_state(fused: bool = False) -> RowTables:
    return RowTables(
        max_rows=ROWS, max_pages_per_row=1, device=torch.device("cpu"), fused=fused, max_length=60, vocab_size=VOCAB
    )


def step(state: RowTables, plan: Plan, features: Features, sampled: list[int]) -> None:
    """What the runner does, but for the forward."""
    out = np.zeros(20_000, np.int32)
    sections = encode(plan, out, bucket=len(plan.decode_rows), send_decode_rows=True, tile_size=4)
    staged = torch.from_numpy(out)
    state.memory.ensure(words=features.memory, seen=features.seen)
    state.apply_updates(staged, sections)
    if plan.chunks:
        inputs = state.mixed_inputs(staged, sections, len(plan.decode_rows))
    else:
        inputs = state.decode_inputs(len(plan.decode_rows))
    state.note(inputs, features)
    state.commit(inputs, torch.tensor(sampled, dtype=torch.int32), None)


def rows_hold(state: RowTables, live: dict[int, tuple[Request, list[int]]]) -> None:
    """Every live row has its padding, prompt and completion, all but the token that was sampled last."""
    assert state.memory.words is not None and state.memory.seen is not None
    for row, (request, tokens) in live.items():
        history = [*request.padding, *tokens]
        assert state.memory.histories_of(torch.tensor([row]), len(history))[0].tolist() == history
        prompt, occurred = {*request.prompt, *request.padding}, set(tokens)
        expected = [(token in occurred) + 2 * (token in prompt) for token in range(VOCAB)]
        assert state.memory.seen[row].tolist() == expected


@pytest.mark.parametrize(
    ("fused", "memory"),
    [(False, True), pytest.param(True, True, marks=needs_triton), pytest.param(True, False, marks=needs_triton)],
)
def test_rows_come_and_go(fused: bool, memory: bool) -> None:
    """Prompts in pieces, found pages, padding, rows that come back after a preemption with their completions."""
    for seed in range(4):
        rng = random.Random(seed)
        state = make_state(fused)
        features = Features(seen=True, memory=memory)
        live: dict[int, tuple[Request, list[int]]] = {}
        last: dict[int, int] = {}
        for number in range(12):
            chunks, new_rows, sampled = [], [], []
            decoding = tuple(row for row in live if rng.random() < 0.8)
            for row in decoding:
                live[row][1].append(last[row])
                last[row] = rng.randrange(VOCAB)
                sampled.append(last[row])
            free = [row for row in range(1, ROWS + 1) if row not in live]
            if free and rng.random() < 0.7:
                row = rng.choice(free)
                prompt = [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 6))]
                tokens = prompt + [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 3]))]
                known = rng.randint(0, len(tokens) - 1)
                padding = (0,) * rng.choice([0, 3])
                request = Request("r", tuple(prompt), 40, padding=padding)
                new_rows.append(NewRow(row, request, known, tuple(tokens[:known])))
                chunks.append(Chunk(row, tuple(tokens[known:]), True))
                last[row] = rng.randrange(VOCAB)
                sampled.append(last[row])
                live[row] = request, tokens
            if not chunks and not decoding:
                continue
            step(state, Plan(number, decoding, tuple(chunks), tuple(new_rows)), features, sampled)
            if memory:
                rows_hold(state, live)
            else:
                state.memory.ensure(words=True, seen=True)
                assert state.memory.seen is not None
                for row, (_, tokens) in live.items():
                    assert ((state.memory.seen[row] & 1).nonzero().flatten().tolist()) == sorted(set(tokens))
                state.memory.words = None
            if live and rng.random() < 0.3:
                live.pop(rng.choice(list(live)))


def test_tables_are_made_when_they_are_needed_and_never_again() -> None:
    state = make_state()
    assert state.memory.words is None and state.memory.seen is None
    state.memory.ensure(words=False, seen=True)
    seen = state.memory.seen
    state.memory.ensure(words=True, seen=True)
    words = state.memory.words
    state.memory.ensure(words=True, seen=True)
    assert state.memory.seen is seen and state.memory.words is words


def test_rules_of_the_row_before_are_gone() -> None:
    state = make_state()
    features = Features(memory=True, seen=True)
    rules = tuple(Rule(RuleKind.SUPPRESS, token) for token in range(5))
    ruled = Request("a", (3, 4), 9, logits=LogitsParams(rules))
    plain = Request("b", (5,), 9, logits=LogitsParams(rules[:1]))
    step(state, Plan(0, (), (Chunk(2, (3, 4), True),), (NewRow(2, ruled),)), features, [7])
    assert state.memory.rules_of(torch.tensor([2]), 5)[0, :, 0].tolist() == [RuleKind.SUPPRESS] * 5
    step(state, Plan(1, (), (Chunk(2, (5,), True),), (NewRow(2, plain),)), features, [8])
    assert state.memory.rules_of(torch.tensor([2]), 5)[0, :, 0].tolist() == [RuleKind.SUPPRESS, 0, 0, 0, 0]
    assert state.memory.words is not None
    assert state.memory.words[2, RULE_WORDS:HISTORY_START].any().item() is False


@needs_triton
def test_the_kernels_in_an_engine() -> None:
    """Row tables, marks and sampling by the kernels, under the interpreter: the tokens of the torch code."""
    model = tiny_model("Llama")
    kinds: list[dict[str, Any]] = [
        {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.5, "seed": 1},
        {"do_sample": True, "top_k": 0, "top_p": 0.8, "seed": 2},
        {"do_sample": False, "repetition_penalty": 2.0},
        {"do_sample": False},
    ]

    def tokens(fused: bool) -> list[list[int]]:
        with GenerationManager(model, BatchingConfig(page_size=16, depth=2)) as manager:
            manager.warmup()
            assembly: Any = manager.assembly
            assembly.runner._sampler = Sampler(fused=fused)
            assembly.runner._state._fused = fused
            handles = [manager.submit([5, 6, 7], max_new_tokens=8, eos_token_id=None, **kind) for kind in kinds]
            return [handle.result(120).token_ids for handle in handles]

    assert tokens(True) == tokens(False)


def test_a_request_with_rules_beyond_the_row_is_not_made() -> None:
    rules = tuple(Rule(RuleKind.SUPPRESS, token) for token in range(300))
    with pytest.raises(ValueError, match="at most 256 rules"):
        LogitsParams(rules)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        LogitsParams((Rule(RuleKind.BAN, 3, tuple(range(9))),))
    with pytest.raises(ValueError, match="`padding` holds at most 64"):
        Request("a", (1,), 3, padding=(0,) * 65)
    assert SamplingParams().stages == 0
