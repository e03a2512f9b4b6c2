"""Sampling against transformers' own warpers, and its promise that a row depends on nothing but itself."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_async_batching.core import row_layout
from hf_async_batching.core.plan import Features, NewRow, Plan
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.runner.staging import encode
from hf_async_batching.sampling import gumbel
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.sampler import Sampler

VOCAB = 97
SMALL_VOCAB = 40
DRAWS = 20_000


def sample(
    logits: torch.Tensor, params: torch.Tensor | None, positions: torch.Tensor | None, features: Features
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = None if params is None or positions is None else SamplingMetadata(params, positions)
    return Sampler()(logits, rows, features)


def request(sampling: SamplingParams, *, prompt: int = 1, min_new: int = 0, eos: tuple[int, ...] = ()) -> Request:
    return Request("r", (1,) * prompt, 100, min_new, eos, sampling)


def params_of(requests: list[Request]) -> torch.Tensor:
    """Records as they reach the device."""
    plan = Plan(0, (), new_rows=tuple(NewRow(i + 1, one) for i, one in enumerate(requests)))
    staged = np.zeros(64 * len(requests), np.int32)
    sections = encode(plan, staged, bucket=0, send_decode_rows=False, tile_size=1)
    return torch.from_numpy(staged[: sections.total].copy()).view(len(requests), -1)[:, 1:]


class Operations(TorchDispatchMode):
    """Names of the operations that run, and the dtypes that they return; names of those with large outcomes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []
        self.large: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket.__name__, out.dtype))
        if out.numel() >= VOCAB:
            self.large.append(func.overloadpacket.__name__)
        return out


def test_a_plain_greedy_step_reads_the_logits_once() -> None:
    """No copy of them in float32 and no softmax: a large vocabulary costs one pass over what the model wrote."""
    logits = torch.randn(3, VOCAB).bfloat16()
    with Operations() as operations:
        tokens, logprobs = sample(logits, None, None, Features())
    assert not operations.large
    reductions = [name for name, _ in operations.seen if name in ("argmax", "amax", "max", "aminmax", "sum", "all")]
    assert reductions == ["argmax"], "whether the largest is finite, one look at it tells"
    assert torch.equal(tokens.long(), logits.argmax(-1))
    assert logprobs is None


def seeded(row: SamplingParams, seeds: list[int]) -> torch.Tensor:
    """The record of one row, once per seed."""
    params = params_of([request(row)]).repeat(len(seeds), 1)
    halves = torch.tensor(seeds, dtype=torch.int64).view(torch.int32).view(-1, 2)
    params[:, row_layout.SEED_LOW], params[:, row_layout.SEED_HIGH] = halves.unbind(1)
    return params


def drawn(**fields: float) -> SamplingParams:
    return SamplingParams(do_sample=True, **fields)  # type: ignore[arg-type]


def features_of(rows: list[SamplingParams], **changes: bool) -> Features:
    candidates = [row.candidates for row in rows if row.do_sample]
    most = -1 if -1 in candidates else max(candidates, default=0)
    return Features(sampling=bool(candidates), candidates=most, **changes)


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The logits of one row after transformers' own warpers, in the order of `generate`."""
    warpers = LogitsProcessorList()
    if params.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None])[0]


def random_params(rng: random.Random, candidates: int, vocab: int) -> SamplingParams:
    """Parameters that `candidates` candidates are enough for."""
    largest = {64: 64, 1024: 1024, -1: vocab + 30}[candidates]
    top_k = 0 if rng.random() < 0.3 else rng.randint(1, largest)
    top_p = 1.0 if rng.random() < 0.4 else rng.uniform(0.02, 0.99)
    if candidates > 0 and not top_k:
        top_p = 1.0
    min_p = 0.0 if rng.random() < 0.5 else 10 ** rng.uniform(-4, 0)
    params = drawn(temperature=rng.uniform(0.3, 2.5), top_k=top_k, top_p=top_p, min_p=min_p)
    assert params.candidates in {64: (0, 64), 1024: (0, 64, 1024), -1: (-1, 0, 64, 1024)}[candidates]
    return params


@pytest.mark.parametrize("candidates", [64, 1024, -1])
@pytest.mark.parametrize("vocab", [VOCAB, 40, 2500])
def test_filters_keep_what_transformers_keeps(candidates: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that prefers one token by far draws this token where the filters have left it, and no other way."""
    rng = random.Random(7 * candidates + vocab)
    generator = torch.Generator().manual_seed(vocab)
    rows: list[SamplingParams] = []
    logits: list[torch.Tensor] = []
    probes: list[int] = []
    kept: list[bool] = []
    sizes = set()
    for _ in range(60 if vocab > 100 else 40):
        params = random_params(rng, candidates, vocab)
        row = 3 * torch.randn(vocab, generator=generator)
        expected = warped(row, params) > -math.inf
        # All tokens of a small vocabulary; of a large one those next to the boundary, and some others.
        ranked = row.argsort(descending=True).tolist()
        size = int(expected.sum())
        sizes.add(size)
        near = ranked[max(0, size - 3) : size + 3] + rng.sample(ranked, 12)
        for token in near if vocab > 100 else range(vocab):
            rows.append(params)
            logits.append(row)
            probes.append(token)
            kept.append(bool(expected[token]))
    assert len(sizes) > 8, "the parameters hardly differ: this test would prove nothing"

    noise = torch.ones(len(rows), vocab)
    noise[torch.arange(len(rows)), torch.tensor(probes)] = 1e-30
    monkeypatch.setattr(gumbel, "exponential", lambda *_: noise)
    features = Features(sampling=True, candidates=candidates)
    positions = torch.zeros(len(rows), dtype=torch.long)
    tokens, _ = sample(torch.stack(logits), params_of([request(params) for params in rows]), positions, features)
    wrong = [
        f"{params}: token {probe} {'kept' if got == probe else 'dropped'}"
        for params, probe, got, want in zip(rows, probes, tokens.tolist(), kept, strict=True)
        if (got == probe) != want
    ]
    assert not wrong, f"{len(wrong)} of {len(rows)}: {wrong[:5]}"


def test_a_row_without_filters_keeps_its_tail_beside_a_row_with_top_k() -> None:
    """Wanted by others, the 64 candidates must not cut the rows that did not ask for it."""
    vocab = 300
    rows = [drawn(), drawn(top_k=50)]
    params = torch.stack([seeded(row, list(range(DRAWS // 2))) for row in rows], 1).flatten(0, 1)
    slope = torch.linspace(1, 0, vocab).expand(DRAWS, -1)
    tokens, _ = sample(slope, params, torch.zeros(DRAWS, dtype=torch.long), features_of(rows))
    assert len(set(tokens[0::2].tolist())) == vocab
    assert set(tokens[1::2].tolist()) == set(range(50))


def chi_square_fits(tokens: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Whether draws fit a distribution, at five standard deviations; nothing of probability 0 may be drawn."""
    counts = torch.bincount(tokens.long(), minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    if counts[probabilities == 0].sum():
        return False
    common = expected >= 8
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    used = wanted > 0
    statistic = ((observed - wanted)[used] ** 2 / wanted[used]).sum()
    freedom = max(1, int(used.sum()) - 1)
    return bool(statistic < freedom + 5 * math.sqrt(2 * freedom))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_draws_follow_the_distribution(fields: dict[str, float], over: str) -> None:
    logits = 2 * torch.randn(SMALL_VOCAB, generator=torch.Generator().manual_seed(3))
    row = drawn(**fields)
    if over == "seeds":
        params, positions = seeded(row, list(range(DRAWS))), torch.full((DRAWS,), 11)
    else:
        params, positions = seeded(row, [2**62 + 12345]).expand(DRAWS, -1), torch.arange(DRAWS)
    tokens, _ = sample(logits.expand(DRAWS, -1), params, positions, features_of([row]))
    assert chi_square_fits(tokens, warped(logits, row).softmax(-1))


def test_chi_square_sees_a_small_error() -> None:
    """The test above would notice a temperature that is off by a tenth."""
    logits = 2 * torch.randn(SMALL_VOCAB, generator=torch.Generator().manual_seed(3))
    row = drawn(temperature=1.1)
    params = seeded(row, list(range(DRAWS)))
    tokens, _ = sample(logits.expand(DRAWS, -1), params, torch.zeros(DRAWS, dtype=torch.long), features_of([row]))
    assert not chi_square_fits(tokens, logits.softmax(-1))


def joint_fits(first: torch.Tensor, second: torch.Tensor, vocab: int) -> bool:
    return chi_square_fits(first * vocab + second, torch.full((vocab * vocab,), 1 / vocab**2))


@pytest.mark.parametrize("difference", [1, 2, 2**16, 2**31, 2**32, 2**40, 2**62, 0x4F1BBCDCBFA53E0B])
def test_different_seeds_are_uncorrelated(difference: int) -> None:
    vocab = 8
    logits = torch.zeros(DRAWS, vocab)
    positions = torch.full((DRAWS,), 5)
    pair = []
    for shift in (0, difference):
        params = seeded(drawn(), [(3 * i + shift) % 2**63 for i in range(DRAWS)])
        pair.append(sample(logits, params, positions, features_of([drawn()]))[0])
    assert joint_fits(pair[0], pair[1], vocab)


@pytest.mark.parametrize("distance", [1, 2, 64, 4096])
def test_different_positions_are_uncorrelated(distance: int) -> None:
    vocab = 8
    logits = torch.zeros(DRAWS, vocab)
    row = drawn(seed=99)
    params = params_of([request(row)]).expand(DRAWS, -1)
    first, second = (sample(logits, params, torch.arange(DRAWS) + d, features_of([row]))[0] for d in (0, distance))
    assert joint_fits(first, second, vocab)


def test_same_seed_and_position_same_token() -> None:
    logits = torch.zeros(1, VOCAB)

    def draw(seed: int, position: int) -> int:
        row = drawn(seed=seed)
        return int(sample(logits, params_of([request(row)]), torch.tensor([position]), features_of([row]))[0])

    seen = [[draw(seed, position) for position in range(30)] for seed in (1, 2, 1)]
    assert seen[0] == seen[2]
    assert seen[0] != seen[1]
    assert len(set(seen[0])) > 10, "the position changes nothing"


def test_a_row_depends_on_no_other_row() -> None:
    rng = random.Random(5)
    rows = [random_params(rng, rng.choice([64, 1024, -1]), 1500) for _ in range(24)]
    rows = [
        SamplingParams(row.do_sample and i % 4 > 0, row.temperature, row.top_k, row.top_p, row.min_p, i)
        for i, row in enumerate(rows)
    ]
    requests = [request(row, min_new=5 * (i % 3), eos=(i, i + 1)) for i, row in enumerate(rows)]
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(len(rows), 1500, generator=generator)
    params = params_of(requests)
    positions = torch.randint(1, 12, (len(rows),), generator=generator)
    together, scores = sample(logits, params, positions, features_of(rows, min_length=True, logprobs=True))
    assert scores is not None
    order = torch.randperm(len(rows), generator=generator)
    shuffled, _ = sample(logits[order], params[order], positions[order], features_of(rows, min_length=True))
    assert torch.equal(shuffled, together[order])
    for i, row in enumerate(rows):
        one = slice(i, i + 1)
        features = features_of([row], min_length=True, logprobs=True)
        alone, score = sample(logits[one], params[one], positions[one], features)
        assert score is not None
        assert int(alone) == int(together[i]), f"{row} draws another token in company"
        torch.testing.assert_close(score[0], scores[i])


def test_greedy_rows_of_a_sampling_batch_take_the_arg_max() -> None:
    rows = [SamplingParams() if i % 2 else drawn(seed=i, temperature=5.0, top_k=60) for i in range(400)]
    logits = torch.randn(400, VOCAB, generator=torch.Generator().manual_seed(2))
    params = params_of([request(row) for row in rows])
    tokens, _ = sample(logits, params, torch.zeros(400, dtype=torch.long), features_of(rows))
    best = logits.argmax(-1)
    assert tokens[1::2].tolist() == best[1::2].tolist()
    assert (tokens[0::2] != best[0::2]).sum() > 100


@pytest.mark.parametrize("eos", [(5,), (0,), (2, 0), tuple(range(16)), (3, -1)])
@pytest.mark.parametrize("sampling", [SamplingParams(), drawn(seed=3, temperature=0.01, top_k=3)])
def test_min_length_masks_every_eos_until_its_position(eos: tuple[int, ...], sampling: SamplingParams) -> None:
    """Token by token what `MinLengthLogitsProcessor` allows, for logits whose favourites are the EOS tokens."""
    real = [token for token in eos if token >= 0]
    logits = torch.linspace(3, 0, VOCAB)
    logits[real] += 20
    served = request(sampling, prompt=4, min_new=3, eos=eos)
    processor = MinLengthLogitsProcessor(7, torch.tensor(real))
    positions = torch.arange(4, 10)
    params = params_of([served]).expand(len(positions), -1)
    features = features_of([sampling], min_length=True)
    tokens, _ = sample(logits.expand(len(positions), -1), params, positions, features)
    expected = [
        int(processor(torch.zeros(1, position, dtype=torch.long), logits[None])[0].argmax())
        for position in positions.tolist()
    ]
    if not sampling.do_sample:
        assert tokens.tolist() == expected
    assert [token in real for token in tokens.tolist()] == [token in real for token in expected]
    assert [token in real for token in expected] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("min_new", [0, 5])
def test_min_length_leaves_token_zero_alone(min_new: int) -> None:
    """Neither unused entries of the record nor rows without a minimum touch token 0."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 0] = 9
    served = request(SamplingParams(), min_new=min_new, eos=(7,) if min_new else (0,))
    tokens, _ = sample(logits, params_of([served]), torch.tensor([1]), Features(min_length=True))
    assert int(tokens) == 0


def test_eos_tokens_outside_of_the_vocabulary_mask_nothing() -> None:
    """As in transformers. On a GPU an index out of bounds would end the process for everybody."""
    logits = torch.zeros(1, VOCAB)
    logits[0, VOCAB - 1] = 9
    served = request(SamplingParams(), min_new=5, eos=(VOCAB + 400, VOCAB, -1))
    tokens, _ = sample(logits, params_of([served]), torch.tensor([1]), Features(min_length=True))
    assert int(tokens) == VOCAB - 1


# Found by search: with this seed, the random bits of token 9 at position 5 are the largest that there are.
LARGEST_BITS = (578479, 9, 5)


def test_the_largest_random_bits_do_not_lose_the_only_token_left() -> None:
    seed, token, position = LARGEST_BITS
    logits = torch.zeros(1, VOCAB)
    logits[0, token] = 9
    row = drawn(seed=seed, top_k=1)
    got, _ = sample(logits, params_of([request(row)]), torch.tensor([position]), features_of([row]))
    assert int(got) == token, "a token was drawn that the filters had dropped"


def test_the_smallest_top_p_leaves_the_most_probable_token() -> None:
    row = drawn(top_p=1e-9)
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(6))
    tokens, _ = sample(logits, seeded(row, list(range(50))), torch.zeros(50, dtype=torch.long), features_of([row]))
    assert torch.equal(tokens.long(), logits.argmax(-1))


def test_a_temperature_that_loses_the_largest_logit_to_infinity_leaves_the_arg_max() -> None:
    """Also where another row of the step wants its scores, which are not shifted."""
    row = drawn(temperature=1e-42)
    logits = 20 + torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(6))
    rows = SamplingMetadata(seeded(row, list(range(50))), torch.zeros(50, dtype=torch.long))
    for scores in (False, True):
        features = Features(sampling=True, scores=scores)
        sampler = Sampler(fused=False)
        chosen = sampler.choose(sampler.scores(logits, rows, features), rows, features, logits)
        assert torch.equal(chosen.long(), logits.argmax(-1))


def test_the_hash_is_lowbias32() -> None:
    """Integer by integer; the engine's are signed and wrap around."""

    def lowbias32(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    rng = random.Random(0)
    values = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, *(rng.randrange(2**32) for _ in range(500))]
    signed = torch.tensor(values, dtype=torch.int64).to(torch.int32)
    assert [x % 2**32 for x in gumbel._hash(signed).tolist()] == [lowbias32(x) for x in values]


def test_positions_do_not_share_their_noise_under_other_tokens() -> None:
    """Found by search: at these positions the first key of seed 0 differs in its low bits only.

    Hashed with the token alone, it would give both positions the same noise for permuted tokens.
    """
    params = seeded(drawn(), [0, 0])
    variates = gumbel.exponential(params, torch.tensor([6260, 55413]), 64)
    assert not torch.equal(variates[0].sort().values, variates[1].sort().values)


def test_ties_with_the_kth_are_kept_by_top_k() -> None:
    logits = torch.zeros(2000, VOCAB)
    logits[:, 10:30] = 5.0
    rows = [drawn(seed=i, top_k=3) for i in range(2000)]
    params = params_of([request(row) for row in rows])
    tokens, _ = sample(logits, params, torch.zeros(2000, dtype=torch.long), features_of(rows))
    assert set(tokens.tolist()) == set(range(10, 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_unfiltered_logits(dtype: torch.dtype) -> None:
    rows = [
        drawn(seed=i, temperature=0.5, top_k=5, top_p=0.7, min_p=0.1) if i % 2 else SamplingParams() for i in range(50)
    ]
    requests = [request(row, min_new=3, eos=tuple(range(8))) for row in rows]
    logits = (2 * torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(4))).to(dtype)
    logits[:, 0] = 8.0  # what the minimum length masks takes part in the normalization
    before = logits.clone()
    features = features_of(rows, min_length=True, logprobs=True)
    tokens, logprobs = sample(logits, params_of(requests), torch.ones(50, dtype=torch.long), features)
    assert logprobs is not None
    assert logprobs.dtype == torch.float32
    assert tokens.dtype == torch.int32
    expected = logits.double().log_softmax(-1).gather(1, tokens.long()[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits, before), "the caller's logits were changed"
    silent = features_of(rows, min_length=True)
    assert sample(logits, params_of(requests), torch.ones(50, dtype=torch.long), silent)[1] is None


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    logits = torch.zeros(4, VOCAB)
    rows = [drawn(seed=i, top_k=50) for i in range(4)]
    params, positions = params_of([request(row) for row in rows]), torch.zeros(4, dtype=torch.long)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = sample(logits, params, positions, features_of(rows))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, _ = sample(logits, params, positions, features_of(rows))
    assert torch.equal(first, second)
