"""The workloads are the ones that published figures are compared with."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hf_async_batching.bench.workloads import WORKLOADS, make_workload

VOCAB = 1000


def test_mix_has_the_lengths_that_others_measured() -> None:
    mix = make_workload("mix", VOCAB)
    r = random.Random(0)
    assert mix.lengths() == [(r.randint(16, 1024), r.randint(16, 1024)) for _ in range(256)]
    assert (mix.num_requests, mix.prompt_tokens, mix.new_tokens) == (256, 131_806, 140_907)


def test_uniform_workloads() -> None:
    seed, small = make_workload("seed", VOCAB), make_workload("small", VOCAB)
    assert seed.lengths() == [(32, 8192)] * 32
    assert small.lengths() == [(64, 512)] * 256
    assert seed.longest == 8224
    assert [request.request_id for request in seed.first[:3]] == ["0", "1", "2"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_changes_the_tokens_and_nothing_else(name: str) -> None:
    one, same, other = (make_workload(name, VOCAB, rows=5, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one.lengths() == other.lengths()
    assert all(a.prompt[:8] != b.prompt[:8] for a, b in zip(one.first, other.first, strict=True))
    tokens = {token for request in one.first for token in request.prompt}
    assert min(tokens) >= 3
    assert max(tokens) < VOCAB
    assert not any(request.eos_token_ids for request in one.first), "nothing ends early"


def test_chat() -> None:
    chat = make_workload("chat", VOCAB)
    assert len(chat.first) == 16
    assert chat.num_requests == 16 * 8
    systems = {request.prompt[:500] for request in chat.first}
    assert len(systems) == 1, "the system prompt is shared"
    assert len({request.prompt for request in chat.first}) == 16
    assert all(520 <= len(request.prompt) <= 700 for request in chat.first)
    messages = [message for user in chat.messages for message in user]
    assert {len(tokens) for tokens, _ in messages} <= set(range(20, 201))
    answers = [new for _, new in messages] + [request.max_new_tokens for request in chat.first]
    assert min(answers) >= 64
    assert max(answers) <= 256
    assert len(set(answers)) > 20, "ragged"


def test_a_turn_holds_everything_before_it() -> None:
    chat = make_workload("chat", VOCAB, rows=2, prompt=4, new=5, turns=3)
    request = chat.first[1]
    found = [(len(request.prompt), request.max_new_tokens)]
    for turn in (1, 2):
        answer = [7] * request.max_new_tokens
        following = chat.after(request, answer)
        assert following is not None
        message, new = chat.messages[1][turn - 1]
        assert following.request_id == f"1.{turn}"
        assert following.prompt == (*request.prompt, *answer, *message)
        assert following.max_new_tokens == new
        request = following
        found.append((len(request.prompt), request.max_new_tokens))
    assert chat.after(request, [7]) is None
    assert chat.lengths()[3:] == found
    assert chat.longest == max(prompt + new for prompt, new in chat.lengths())


def test_smaller_work() -> None:
    assert make_workload("seed", VOCAB, rows=2, prompt=3, new=4).lengths() == [(3, 4)] * 2
    mix = make_workload("mix", VOCAB, rows=50, prompt=40, new=8)
    assert {prompt for prompt, _ in mix.lengths()} <= set(range(10, 41))
    assert {new for _, new in mix.lengths()} == set(range(2, 9))
    assert len(make_workload("chat", VOCAB, rows=2, prompt=9).first[0].prompt) <= 209


@pytest.mark.parametrize("name", WORKLOADS)
def test_what_is_not_counted_is_brief(name: str) -> None:
    brief = make_workload(name, VOCAB, rows=3).brief()
    assert [len(r.prompt) for r in brief.first] == [len(r.prompt) for r in make_workload(name, VOCAB, rows=3).first]
    assert all(request.max_new_tokens <= 4 for request in brief.first)
    assert brief.after(brief.first[0], [1]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nonsense"}, "no workload 'nonsense'; choose one of seed, small, mix, chat"),
        ({"name": "seed", "rows": 0}, "`rows` must be at least 1, got 0"),
        ({"name": "mix", "turns": 2}, "`turns` belongs to the workload 'chat'"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_workload(vocab=VOCAB, **arguments)
