"""The host's decisions are those of transformers' criteria, token by token."""

from __future__ import annotations

import random
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from support.criteria import RowWise
from support.tiny_models import VOCAB
from support.tiny_tokenizer import tiny_tokenizer
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from hf_async_batching.stopping.criteria import (
    CriteriaListChecker,
    HostStopChecker,
    StopStrings,
    read_criteria,
    stop_string_criterion,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def words(generator: random.Random, count: int) -> list[str]:
    return ["".join(generator.choices(ascii_lowercase[:6], k=generator.randint(1, 4))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_stop_strings_row_by_row(tokenizer: Any, seed: int) -> None:
    generator = random.Random(seed)
    criterion = StopStringCriteria(tokenizer, [*words(generator, 3), "ca"])
    strings = StopStrings(criterion)
    # Few letters, so that strings are often met; ids beyond the vocabulary, too.
    near = sorted(i for token, i in tokenizer.get_vocab().items() if set(token) <= set(ascii_lowercase[:6]))
    hits = 0
    for _ in range(200):
        row = generator.choices([*near, 0, 1, VOCAB - 1, VOCAB, VOCAB + 50], k=generator.randint(1, 9))
        expected = bool(criterion(torch.tensor([row]), None)[0])
        assert strings.stops(row) == expected, row
        hits += expected
    assert 0 < hits < 200


def test_the_callers_criterion_stays_as_it_is(tokenizer: Any) -> None:
    criterion = StopStringCriteria(tokenizer, ["ab"])
    before = dict(vars(criterion))
    StopStrings(criterion).stops([5, 6])
    assert all(vars(criterion)[name] is value for name, value in before.items())


@pytest.mark.parametrize("seed", range(8))
def test_the_host_decides_like_the_list(tokenizer: Any, seed: int) -> None:
    generator = random.Random(seed)
    made = [
        MaxLengthCriteria(generator.randint(12, 30)),
        MaxTimeCriteria(1e9),
        StopStringCriteria(tokenizer, words(generator, 2)),
        EosTokenCriteria([generator.randrange(3, VOCAB)]),
    ]
    criteria = StoppingCriteriaList(generator.sample(made, generator.randint(1, 4)))
    prompts = [[generator.randrange(VOCAB) for _ in range(6)] for _ in range(4)]
    host = HostStopChecker([list(row) for row in prompts], read_criteria(criteria))
    called = CriteriaListChecker(torch.tensor(prompts), criteria)
    over = [False] * 4
    for _ in range(25):
        tokens = [generator.randrange(3, VOCAB) for _ in prompts]
        over = [before or now for before, now in zip(over, host.step(tokens), strict=True)]
        assert over == called.step(tokens)


def test_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    criterion = MaxTimeCriteria(5.0)
    checker = HostStopChecker([[1], [2]], read_criteria(StoppingCriteriaList([criterion])))
    for later, expected in ((100.0, False), (105.0, False), (105.1, True)):
        now[0] = later
        assert checker.step([3, 4]) == [expected, expected]
        assert bool(criterion(torch.tensor([[1]]), None)[0]) == expected


def test_sorting(tokenizer: Any) -> None:
    class Mine(EosTokenCriteria):
        pass

    known = [MaxLengthCriteria(9), MaxLengthCriteria(7), EosTokenCriteria([5, 6]), EosTokenCriteria(torch.tensor(8))]
    stops = read_criteria(StoppingCriteriaList(known))
    assert (stops.eos, stops.max_length, stops.by_engine, stops.pads) == ((5, 6, 8), 7, True, True)
    for other in (MaxTimeCriteria(3.0), StopStringCriteria(tokenizer, "ab"), RowWise(set()), Mine(3)):
        stops = read_criteria(StoppingCriteriaList([known[0], other]))
        assert not stops.by_engine
        assert stops.custom == isinstance(other, (RowWise, Mine))
        assert stops.pads == isinstance(other, Mine)
        assert stops.eos == ()


def test_criteria_are_kept_for_a_tokenizer(tokenizer: Any) -> None:
    first = stop_string_criterion(["ab", "cd"], tokenizer)
    assert stop_string_criterion(("ab", "cd"), tokenizer) is first
    assert stop_string_criterion("ab", tokenizer) is not first
    other = tiny_tokenizer()
    assert stop_string_criterion(["ab", "cd"], other) is not first
    other.add_tokens(["quux"])
    longer = stop_string_criterion("uu", other)
    assert bool(longer(torch.tensor([[VOCAB]]), None)[0]), "a token that was added is known"

    class Slotted:
        __slots__ = ("inner",)

        def __init__(self) -> None:
            self.inner = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    assert stop_string_criterion("ab", Slotted()).stop_strings == ("ab",)
