"""Scores and draws against transformers' own processors and warpers, rows of different kinds in one step."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_model
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.core import row_layout
from hf_async_batching.core.plan import Features, NewRow, Plan
from hf_async_batching.core.request import Request
from hf_async_batching.inputs.logits_processors import CallRow, read_processors
from hf_async_batching.runner import staging
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.sampler import Sampler
from hf_async_batching.sampling.token_history import TokenHistory
from hf_async_batching.scheduler.sequence import Sequence
from hf_async_batching.scheduler.step_features import features_of, rare_needs

VOCAB = 32
DRAWS = 20_000

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.75},
    {"min_p": 0.1},
    {"top_h": 0.5},
    {"typical_p": 0.6},
    {"epsilon_cutoff": 0.05},
    {"eta_cutoff": 0.2},
    {"repetition_penalty": 1.6},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.8, "top_h": 0.8, "typical_p": 0.9, "eta_cutoff": 0.05, "epsilon_cutoff": 0.01},
    {"top_p": 0.9, "typical_p": 0.5},
    {"no_repeat_ngram_size": 1, "top_p": 0.9},
    {"sequence_bias": {(3,): 2.0, (1, 4): 3.0}, "top_k": 9},
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama", vocab_size=VOCAB)


def processors_of(model: Any, kind: dict[str, Any], prompt: list[int]) -> LogitsProcessorList:
    config = GenerationConfig(do_sample=True, max_length=50, **{"top_k": 0, **kind})
    config._eos_token_tensor = None
    processors: LogitsProcessorList = model._get_logits_processor(
        config, input_ids_seq_length=len(prompt), encoder_input_ids=torch.tensor([prompt]), device="cpu"
    )
    return processors


def request_of(model: Any, kind: dict[str, Any], prompt: list[int], seed: int) -> Request:
    row = CallRow(prompt, prompt, 0, 1, (), None)
    spec = read_processors(processors_of(model, kind, prompt), row, do_sample=True, seed=seed)
    assert spec is not None, f"{kind} would be called"
    return Request("r", tuple(prompt), 9, sampling=spec.sampling, logits=spec.logits, output_scores=True)


def rows_of(requests: list[Request]) -> tuple[SamplingMetadata, Features]:
    """Rows whose prompts were just computed."""
    count = len(requests)
    new_rows = tuple(NewRow(i + 1, one, 0, one.prompt) for i, one in enumerate(requests))
    plan = Plan(0, (), new_rows=new_rows)
    memory = TokenHistory(max_rows=count, max_length=64, vocab_size=VOCAB, device=torch.device("cpu"))
    memory.ensure(words=True, seen=True)
    staged = np.zeros(400 * count, np.int32)
    sections = staging.encode(plan, staged, bucket=0, send_decode_rows=False, tile_size=1)
    array = torch.from_numpy(staged)
    params = array[: sections.writes_start].view(count, -1)[:, 1:]
    writes = array[sections.writes_start : sections.updates_end].view(3, -1)
    table = torch.cat([torch.zeros_like(params[:1]), params])
    memory.write(*writes.unbind(0), table)
    sequences = [Sequence(one, 0) for one in requests]
    for sequence in sequences:
        sequence.num_computed = len(sequence.tokens)
    _, _, bounds = rare_needs(sequences)
    positions = torch.tensor([len(one.prompt) for one in requests])
    rows = torch.arange(1, count + 1, dtype=torch.int32)
    return SamplingMetadata(params, positions, rows, memory, bounds), features_of(sequences, [])


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_scores_are_those_of_generate(model: Any, spread: float) -> None:
    rng = random.Random(int(spread))
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))] for _ in KINDS]
    logits = spread * torch.randn(len(KINDS), VOCAB, generator=torch.Generator().manual_seed(3))
    rows, features = rows_of([request_of(model, *one, 5) for one in zip(KINDS, prompts, strict=True)])
    scores = Sampler().scores(logits, rows, features)
    sizes = set()
    for i, (kind, prompt) in enumerate(zip(KINDS, prompts, strict=True)):
        expected = processors_of(model, kind, prompt)(torch.tensor([prompt]), logits[i : i + 1].clone())[0]
        torch.testing.assert_close(scores[i], expected, msg=lambda text, kind=kind: f"{kind}: {text}")
        sizes.add(int(expected.isfinite().sum()))
    assert len(sizes) > 6, "the kinds hardly differ"


def fits(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Whether draws fit a distribution, at five standard deviations; nothing of probability 0 may be drawn."""
    expected = probabilities.double() * counts.sum()
    if counts[probabilities == 0].any():
        return False
    common = expected >= 8
    observed = torch.cat([counts[common].double(), counts[~common].sum()[None].double()])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    used = wanted > 0
    statistic = ((observed - wanted)[used] ** 2 / wanted[used]).sum()
    freedom = max(1, int(used.sum()) - 1)
    return bool(statistic < freedom + 5 * math.sqrt(2 * freedom))


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "sequence_bias" not in kind and "ngram" not in str(kind)], ids=str
)
def test_the_first_two_tokens_of_20000_draws(model: Any, kind: dict[str, Any]) -> None:
    """Logits that depend on the token before; a chain of two draws, against the product of transformers' softmaxes."""
    prompt = [1, 4, 1, 5]
    table = 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(8))
    processors = processors_of(model, kind, prompt)
    rows, features = rows_of([request_of(model, kind, prompt, 0)])
    params = rows.params.expand(DRAWS, -1).clone()
    seeds = torch.arange(DRAWS, dtype=torch.int64) * 7919 + 5
    halves = seeds.view(torch.int32).view(-1, 2)
    params[:, row_layout.SEED_LOW], params[:, row_layout.SEED_HIGH] = halves.unbind(1)
    memory = TokenHistory(max_rows=DRAWS, max_length=1, vocab_size=VOCAB, device=torch.device("cpu"))
    memory.ensure(words=False, seen=True)
    assert memory.seen is not None and rows.memory is not None and rows.memory.seen is not None
    memory.seen[:] = rows.memory.seen[1]
    owners = torch.arange(1, DRAWS + 1, dtype=torch.int32)
    sampler, usual = Sampler(), Features(**{**_fields(features), "scores": False})

    def draw(logits: torch.Tensor, position: int) -> torch.Tensor:
        some = SamplingMetadata(params, torch.full((DRAWS,), position), owners, memory)
        return sampler.choose(sampler.scores(logits, some, usual), some, usual, logits)

    first = draw(table[prompt[-1]].expand(DRAWS, -1), len(prompt))
    memory.seen[owners.long(), first] |= 1
    second = draw(table[first], len(prompt) + 1)
    before = processors(torch.tensor([prompt]), table[prompt[-1]][None].clone()).softmax(-1)[0]
    joint = torch.zeros(VOCAB, VOCAB)
    for token in range(VOCAB):
        ids = torch.tensor([[*prompt, token]])
        joint[token] = before[token] * processors(ids, table[token][None].clone()).softmax(-1)[0]
    counts = torch.bincount(first * VOCAB + second, minlength=VOCAB * VOCAB)
    assert fits(counts, joint.flatten())


def _fields(features: Features) -> dict[str, Any]:
    return {name: getattr(features, name) for name in Features.__slots__}  # type: ignore[attr-defined]


def test_end_to_end(model: Any) -> None:
    """The first two tokens of requests that share their steps with requests of other kinds."""
    kind = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "typical_p": 0.9, "repetition_penalty": 1.3}
    prompt, draws = [1, 4, 1, 5], 800
    processors = processors_of(model, kind, prompt)
    with GenerationManager(model, BatchingConfig(page_size=16, max_waiting=5000, max_rows=64)) as manager:
        handles = []
        for i in range(draws):
            handles.append(manager.submit(prompt, seed=i, do_sample=True, max_new_tokens=2, eos_token_id=None, **kind))
            if i % 5 == 0:
                manager.submit([3, i % VOCAB], max_new_tokens=2, do_sample=i % 2 == 0, no_repeat_ngram_size=2)
        tokens = torch.tensor([handle.result(300).token_ids for handle in handles])

    def after(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[:, -1]
        return processors(torch.tensor([ids]), logits).softmax(-1)[0]

    first = after(prompt)
    joint = torch.stack([first[token] * after([*prompt, token]) for token in range(VOCAB)])
    counts = torch.bincount(tokens[:, 0] * VOCAB + tokens[:, 1], minlength=VOCAB * VOCAB)
    assert fits(counts, joint.flatten())


def test_seeds_and_generators(model: Any) -> None:
    """The same tokens whatever the company, also where it brings rare features; a generator moves on by one draw."""
    prompt = [1, 4, 1, 5]
    fields: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": None, "top_p": 0.95}
    with GenerationManager(model, BatchingConfig(page_size=16, depth=2)) as manager:
        alone = manager.submit(prompt, seed=77, **fields).result(60).token_ids
        company = [{"typical_p": 0.5}, {"no_repeat_ngram_size": 2}, {"logits_processor": [lambda ids, scores: scores]}]
        for other in company:
            others = [manager.submit([2, 3], seed=i, **fields, **other) for i in range(3)]
            together = manager.submit(prompt, seed=77, **fields)
            assert together.result(60).token_ids == alone
            assert len({tuple(one.result(60).token_ids) for one in others}) == 3

        def draw(generator: torch.Generator) -> list[int]:
            tokens: list[int] = manager.submit(prompt, seed=generator, **fields).result(60).token_ids
            return tokens

        generator, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        state = torch.random.get_rng_state()
        first, second = draw(generator), draw(generator)
        assert [first, second] == [draw(again), draw(again)]
        assert first != second
        rows = torch.tensor([prompt, prompt])
        out = model.generate(rows, custom_generate=manager.bind(seed=torch.Generator().manual_seed(3)), **fields)
        assert out[0, 4:].tolist() == first
        assert out[1, 4:].tolist() != first
        pair = [torch.Generator().manual_seed(3), 77]
        out = model.generate(rows, custom_generate=manager.bind(seed=pair), **fields)
        assert out[:, 4:].tolist() == [first, alone]
        assert torch.equal(torch.random.get_rng_state(), state), "the global random state was used"
