"""The sampling kernels draw the tokens that the torch code draws, whatever rows share a step.

On the GPU where there is one, else in Triton's interpreter. Numbers are drawn on the CPU, so that both see the same.
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Features, NewRow, Plan
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.runner import staging
from hf_async_batching.sampling import triton_sampler as fused
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.sampler import Sampler
from hf_async_batching.sampling.token_history import TokenHistory
from hf_async_batching.scheduler.sequence import Sequence
from hf_async_batching.scheduler.step_features import features_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Triton 3.9 announces a change of a compiler default that makes no difference here.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def asks(sampling: SamplingParams, penalty: float = 1.0) -> Request:
    return Request("r", (1,), 9, sampling=sampling, logits=LogitsParams(repetition_penalty=penalty))


def drawn(**fields: Any) -> SamplingParams:
    return SamplingParams(do_sample=True, **fields)


def rows_of(requests: list[Request], vocab: int, seed: int = 0) -> tuple[SamplingMetadata, Features]:
    """Rows that have seen a third of all tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = len(requests)
    plan = Plan(0, (), new_rows=tuple(NewRow(i + 1, request) for i, request in enumerate(requests)))
    staged = np.zeros(100 * count, np.int32)
    sections = staging.encode(plan, staged, bucket=0, send_decode_rows=False, tile_size=1)
    params = torch.from_numpy(staged[: sections.total].copy()).to(DEVICE).view(count, -1)[:, 1:]
    memory = TokenHistory(max_rows=count, max_length=8, vocab_size=vocab + 3, device=DEVICE)
    memory.ensure(words=False, seen=True)
    assert memory.seen is not None
    memory.seen.copy_(torch.rand(memory.seen.shape, generator=generator) < 0.3)
    positions = torch.randint(1, 3000, (count,), generator=generator).to(DEVICE)
    owners = torch.arange(1, count + 1, dtype=torch.int32, device=DEVICE)
    rows = SamplingMetadata(params, positions, owners, memory)
    sequences = [Sequence(request, 0) for request in requests]
    for sequence in sequences:
        sequence.num_computed = 1
    return rows, features_of(sequences, [])


def check(requests: list[Request], logits: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The tokens, on the CPU."""
    logits = logits.to(DEVICE)
    rows, features = rows_of(requests, logits.shape[1], seed)
    assert fused.serves(features)
    before = logits.clone()
    sampler = Sampler(fused=True)
    got, _ = sampler(logits, rows, sampler.as_run(features))
    want, _ = Sampler(fused=False)(logits, rows, features)
    wrong = [
        f"{request.sampling} penalty {request.logits.repetition_penalty}: {a}, not {b}"
        for request, a, b in zip(requests, got.tolist(), want.tolist(), strict=True)
        if a != b
    ]
    assert not wrong, wrong
    assert torch.equal(logits, before)
    assert got.dtype == torch.int32
    return got.cpu()


def random_requests(rng: random.Random, count: int) -> list[Request]:
    return [
        asks(
            drawn(
                temperature=rng.uniform(0.3, 2.5),
                top_k=rng.choice([0, 0, 1, 5, 50, 64, 200]),
                top_p=rng.choice([1.0, 0.9, 0.5, 0.05]),
                min_p=rng.choice([0.0, 0.0, 0.1, 0.01]),
                seed=rng.randrange(2**63),
            )
            if rng.random() < 0.85
            else SamplingParams(),
            rng.choice([1.0, 1.3, 0.8]),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(("vocab", "dtype"), [(97, "float32"), (1000, "bfloat16"), (4097, "bfloat16")])
def test_rows_of_all_kinds_in_one_step(vocab: int, dtype: str, spread: float) -> None:
    rng = random.Random(vocab + int(10 * spread))
    logits = spread * torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab))
    requests = [*random_requests(rng, 6), asks(drawn(top_p=0.7, seed=1), 1.2)]
    check(requests, logits.to(getattr(torch, dtype)), seed=vocab)


@pytest.mark.parametrize("top_p", [0.02, 0.3, 0.95])
def test_the_nucleus_of_a_flat_row_is_found_by_rejection(top_p: float) -> None:
    """Nearly equal logits: the maxima bound nothing, and a small nucleus rejects most of the race."""
    logits = 0.05 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(3))
    got = check([asks(drawn(top_p=top_p, seed=i)) for i in range(6)], logits)
    ranks = (logits > logits.gather(1, got[:, None].long())).sum(1)
    assert (ranks <= 3000 * (top_p + 0.05)).all()


def test_large_logits_that_stand_together() -> None:
    """More than the capacity of the candidates in a single run of the vocabulary, none equal."""
    logits = torch.zeros(3, 20_000)
    logits[:, 5000:11_000] = 5 + torch.rand(3, 6000, generator=torch.Generator().manual_seed(1))
    check([asks(drawn(top_k=60, seed=1)), asks(drawn(top_k=1, seed=2)), asks(drawn(top_k=33, seed=3))], logits)


def test_ties_with_the_kth_are_kept_up_to_the_capacity() -> None:
    logits = torch.zeros(40, 5000)
    logits[:, 100:900] = 3.0
    got = check([asks(drawn(top_k=2, seed=i)) for i in range(40)], logits)
    assert ((got >= 100) & (got < 900)).all()
    assert len(set(got.tolist())) > 30
    flat, features = rows_of([asks(drawn(top_k=2, seed=i)) for i in range(5)], 5000)
    beyond = fused.choose(torch.zeros(5, 5000, device=DEVICE), flat, features)
    assert ((beyond >= 0) & (beyond < 1024)).all(), "more equal ones than there is room for: the first ones"


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((6, 700), float("-inf"))
    logits[:, 650] = -3.0
    logits[:, 651] = -90.0
    kinds = [drawn(seed=1), drawn(seed=2, top_k=5), drawn(seed=3, top_p=0.9), drawn(seed=4, min_p=0.5)]
    got = check([asks(kind) for kind in [*kinds, SamplingParams(), drawn(seed=5, temperature=1e-6)]], logits)
    assert got.tolist() == [650] * 6


def test_a_tiny_temperature_is_the_arg_max() -> None:
    logits = 3 * torch.randn(4, 2000, generator=torch.Generator().manual_seed(5))
    rows = [drawn(seed=i, temperature=1e-7, **fields) for i, fields in enumerate([{}, {"top_k": 9}, {"top_p": 0.8}])]
    got = check([*map(asks, rows), asks(SamplingParams())], logits)
    assert got.tolist() == logits.argmax(-1).tolist()


def test_a_penalty_without_draws() -> None:
    logits = torch.randn(5, 1500, generator=torch.Generator().manual_seed(6)).bfloat16().to(DEVICE)
    rows, features = rows_of([asks(SamplingParams(), 4.0) for _ in range(5)], 1500)
    assert features == Features(seen=True, penalty=True)
    got, _ = Sampler(fused=True)(logits, rows, features)
    want, _ = Sampler(fused=False)(logits, rows, features)
    assert torch.equal(got, want)
    assert not torch.equal(got.long(), logits.argmax(-1)), "nothing was penalized"


def test_what_both_draw_follows_the_distribution() -> None:
    """From a nucleus, the penalty in force. Of the kernels, which draw the same, a few rows under the interpreter."""
    count, vocab = 4000, 32
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(8))
    requests = [asks(drawn(top_p=0.8, temperature=0.7, seed=i), 1.3) for i in range(count)]
    rows, features = rows_of(requests, vocab)
    assert rows.memory is not None and rows.memory.seen is not None
    rows.memory.seen[:] = (torch.arange(vocab + 3, device=DEVICE) % 3 == 0).to(torch.uint8)
    on_device = logits.to(DEVICE)
    tokens, _ = Sampler(fused=False)(on_device.expand(count, -1), rows, features)
    few = replace(rows, params=rows.params[:20], positions=rows.positions[:20])
    assert torch.equal(Sampler(fused=True)(on_device.expand(20, -1), few, features)[0], tokens[:20])
    penalized = torch.where(torch.arange(vocab) % 3 == 0, torch.where(logits < 0, logits * 1.3, logits / 1.3), logits)
    probabilities = (penalized / 0.7).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    kept = order[ordered.cumsum(0) - ordered < 0.8]
    expected = torch.zeros(vocab).index_put_((kept,), probabilities[kept])
    expected = expected / expected.sum() * count
    counts = torch.bincount(tokens.cpu().long(), minlength=vocab).float()
    assert not counts[expected == 0].any()
    used = expected > 0
    statistic = float(((counts - expected)[used] ** 2 / expected[used]).sum())
    freedom = int(used.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_marks_of_a_decode_step() -> None:
    seen = torch.zeros(5, 300, dtype=torch.uint8, device=DEVICE)
    seen[2, 7] = 2
    rows = torch.tensor([3, 0, 2, 0], dtype=torch.int32, device=DEVICE)
    fused.mark_seen(rows, torch.tensor([299, 5, 7, 6], device=DEVICE), seen)
    expected = torch.zeros_like(seen)
    expected[3, 299], expected[2, 7] = 1, 3
    assert torch.equal(seen, expected)


def test_steps_that_the_kernels_run_alike_share_a_graph() -> None:
    sampler = Sampler(fused=True)
    kinds = [drawn(), drawn(top_p=0.9), drawn(min_p=0.1), drawn(top_p=0.9, min_p=0.2)]
    needs = [rows_of([asks(kind)], 300)[1] for kind in kinds]
    assert len({features.candidates for features in needs}) == 3
    assert {sampler.as_run(features) for features in needs} == {Features(sampling=True, seen=False)}
    assert [Sampler(fused=False).as_run(features) for features in needs] == needs, "torch's code asks for it"
    # Other kernels, or none of them.
    few, many = rows_of([asks(drawn(top_k=5))], 300)[1], rows_of([asks(drawn(top_k=500))], 300)[1]
    assert len({sampler.as_run(features) for features in (*needs, few, many)}) == 3
    for kind in (drawn(top_k=5000), drawn(typical_p=0.5)):
        features = rows_of([asks(kind)], 300)[1]
        assert sampler.as_run(features) == features
    assert sampler.as_run(Features()) == Features()
