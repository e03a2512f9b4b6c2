"""Rows from which nothing can be drawn, and rows of logits that are not finite: marked, in every way to a token."""

from __future__ import annotations

import importlib.util
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from hf_async_batching.core import outcomes
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Features, NewRow, Plan
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.runner import staging
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.outcome_marks import marked, tokens_of, without_token
from hf_async_batching.sampling.sampler import Sampler
from hf_async_batching.sampling.token_history import TokenHistory
from hf_async_batching.scheduler.sequence import Sequence
from hf_async_batching.scheduler.step_features import features_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 700

pytestmark = [
    # Triton 3.9 announces a change of a compiler default that makes no difference here.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    # The interpreter's arithmetic is numpy's, which warns of NaN.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

WAYS = [
    pytest.param(False, id="torch"),
    pytest.param(
        True, id="kernels", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
    ),
]


def lines() -> dict[str, torch.Tensor]:
    usual = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    made = {name: usual.clone() for name in ("usual", "some minus inf", "one nan", "nan", "inf", "minus inf", "last")}
    made["some minus inf"][::3] = -math.inf
    made["one nan"][345] = math.nan
    made["nan"][:] = math.nan
    made["inf"][123] = math.inf
    made["minus inf"][:] = -math.inf
    made["last"][-1] = math.nan
    return made


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "free": {"do_sample": True, "seed": 3},
    "top_p": {"do_sample": True, "seed": 3, "top_p": 0.8},
    "min_p": {"do_sample": True, "seed": 3, "min_p": 0.02, "temperature": 0.5},
    "top_k": {"do_sample": True, "seed": 3, "top_k": 20},
    "top_k 200, top_p": {"do_sample": True, "seed": 3, "top_k": 200, "top_p": 0.8},
}
RARE: dict[str, dict[str, Any]] = {
    "typical": {"do_sample": True, "seed": 3, "typical_p": 0.8},
    "top_h": {"do_sample": True, "seed": 3, "top_h": 0.5},
    "epsilon": {"do_sample": True, "seed": 3, "epsilon_cutoff": 0.001},
    "eta": {"do_sample": True, "seed": 3, "eta_cutoff": 0.001},
}


def rows_of(requests: list[Request]) -> tuple[SamplingMetadata, Features]:
    count = len(requests)
    plan = Plan(0, (), new_rows=tuple(NewRow(i + 1, request) for i, request in enumerate(requests)))
    staged = np.zeros(100 * count, np.int32)
    sections = staging.encode(plan, staged, bucket=0, send_decode_rows=False, tile_size=1)
    params = torch.from_numpy(staged[: sections.total].copy()).to(DEVICE).view(count, -1)[:, 1:]
    memory = TokenHistory(max_rows=count, max_length=8, vocab_size=VOCAB, device=DEVICE)
    memory.ensure(words=False, seen=True)
    assert memory.seen is not None
    memory.seen[:, 1::2] = 1
    owners = torch.arange(1, count + 1, dtype=torch.int32, device=DEVICE)
    rows = SamplingMetadata(params, torch.full((count,), 5, device=DEVICE), owners, memory)
    sequences = [Sequence(request, 0) for request in requests]
    for sequence in sequences:
        sequence.num_computed = 1
    return rows, features_of(sequences, [])


def drawable(logits: torch.Tensor) -> bool:
    """As plain `generate` finds out."""
    try:
        torch.multinomial(logits.softmax(-1), 1)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("fused", WAYS)
def test_rows_of_all_kinds_in_one_step(fused: bool, penalty: float) -> None:
    kinds = {**KINDS, **({} if fused else RARE)}
    cases = list(itertools.product(kinds, lines()))
    logits = torch.stack([lines()[line] for _, line in cases]).to(DEVICE)
    changes = LogitsParams(repetition_penalty=penalty)
    rows, features = rows_of(
        [Request("r", (1,), 9, sampling=SamplingParams(**kinds[kind]), logits=changes) for kind, _ in cases]
    )
    sampler = Sampler(fused=fused)
    got, _ = sampler(logits, rows, sampler.as_run(features))
    for (kind, line), outcome, own in zip(cases, got.tolist(), logits.cpu(), strict=True):
        where = f"{kind}, {line}: {outcome}"
        draws, finite = kind != "greedy", bool(own.amax().isfinite())
        assert outcomes.is_undrawable(outcome) == (draws and not drawable(own)), where
        assert outcomes.is_unsound(outcome) == (not finite), where
        assert 0 <= outcomes.token_of(outcome) < VOCAB, where
        if not draws and (penalty == 1.0 or not finite):
            assert outcomes.token_of(outcome) == int(own.argmax()), where
    usual = [i for i, (_, line) in enumerate(cases) if line in ("usual", "some minus inf")]
    alone, features = rows_of(
        [Request("r", (1,), 9, sampling=SamplingParams(**kinds[cases[i][0]]), logits=changes) for i in usual]
    )
    want, _ = sampler(logits[usual], alone, sampler.as_run(features))
    assert want.tolist() == [got[i] for i in usual], "rows beside them notice nothing"


def test_scores_that_leave_nothing_over_logits_that_are_sound() -> None:
    """As where all tokens are suppressed, or a processor makes NaN."""
    sampler = Sampler(fused=False)
    sampling = [SamplingParams(do_sample=True, seed=1), SamplingParams()] * 3
    rows, features = rows_of([Request("r", (1,), 9, sampling=one) for one in sampling])
    logits = torch.randn(6, VOCAB, device=DEVICE)
    scores = logits.clone()
    scores[:2], scores[2:4] = -math.inf, math.nan
    got = sampler.choose(scores, rows, features, logits).tolist()
    assert got[::2][:2] == [outcomes.UNDRAWABLE] * 2
    assert got[1::2] == scores.argmax(-1).tolist()[1::2], "greedily there is always a token"
    assert got[4] >= 0


@pytest.mark.parametrize("logprobs", [False, True])
def test_the_arg_max_alone(logprobs: bool) -> None:
    made = lines()
    logits = torch.stack(list(made.values())).to(DEVICE)
    got, scores = Sampler(fused=False)(logits, None, Features(logprobs=logprobs))
    assert tokens_of(got).tolist() == logits.argmax(-1).tolist()
    assert (got < 0).tolist() == [not bool(line.amax().isfinite()) for line in made.values()]
    assert not logprobs or (scores is not None and bool(scores[:2].isfinite().all()))


def test_marks_are_the_same_on_host_and_device() -> None:
    tokens = torch.tensor([0, 5, 2**30, 0, 5, 7], dtype=torch.int32)
    flags = torch.tensor([False, False, False, True, True, True])
    none = torch.tensor([False, True, False, False, False, True])
    made = marked(tokens, undrawable=none, unsound=flags)
    assert made.dtype == torch.int32
    assert made.tolist() == [0, outcomes.UNDRAWABLE, 2**30, -3, -8, outcomes.UNDRAWABLE_UNSOUND]
    assert [outcomes.token_of(one) for one in made.tolist()] == tokens_of(made).tolist() == [0, 0, 2**30, 0, 5, 0]
    assert [outcomes.is_undrawable(one) for one in made.tolist()] == without_token(made).tolist() == none.tolist()
    assert [outcomes.is_unsound(one) for one in made.tolist()] == flags.tolist()
