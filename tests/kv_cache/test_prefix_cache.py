"""The prefix cache: what is found, what is given up first, and what it changes for a real model (no token)."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_models import greedy_alone, ragged_prompts, tiny_model

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.kv_cache.prefix_cache import PrefixCache
from hf_async_batching.kv_cache.prefix_node import Node

A, B, C, D = (1, 2), (3, 4), (5, 6), (7, 8)


def chain(cache: PrefixCache, tokens: tuple[int, ...], *pages: int) -> Node:
    """A sequence that looks its tokens up, and computes them to `pages`."""
    return cache.enter(cache.find(None, tokens), tokens, pages, len(pages))


def found(cache: PrefixCache, tokens: tuple[int, ...]) -> list[int]:
    cache.check_invariants()
    return cache.find(None, tokens).path()


def test_the_longest_chain_of_full_pages_is_found() -> None:
    cache = PrefixCache(2)
    chain(cache, A + B + C, 11, 12, 13)
    assert found(cache, A + B + C + (9,)) == [11, 12, 13]
    assert found(cache, A + B + D) == [11, 12]
    assert found(cache, A + B + (5,)) == [11, 12], "half a page is none"
    assert found(cache, D + B + C) == []
    assert found(cache, (1,)) == []
    assert all(page in cache for page in (11, 12, 13))
    assert 14 not in cache


def test_the_last_token_is_never_found() -> None:
    """Its logits are wanted."""
    cache = PrefixCache(2)
    node = chain(cache, A + B + C, 11, 12, 13)
    assert found(cache, A + B + C) == [11, 12]
    assert found(cache, A + B) == [11]
    assert found(cache, A) == []
    assert cache.find(node, A + B + C).path() == [11, 12], "also where the search begins behind it"


def test_a_page_is_found_behind_its_own_beginning_only() -> None:
    cache = PrefixCache(2)
    chain(cache, A + B, 11, 12)
    chain(cache, C + B, 13, 14)
    assert found(cache, B + A) == []
    assert found(cache, C + B + A) == [13, 14]
    assert found(cache, A + B + A) == [11, 12]


def test_tokens_are_compared_and_not_only_their_hashes() -> None:
    cache = PrefixCache(2)
    assert hash((0, -1)) == hash((0, -2)), "Python's hash of -1 is that of -2"
    chain(cache, (0, -1), 11)
    assert found(cache, (0, -2, 5)) == []
    assert found(cache, (0, -1, 5)) == [11]


def test_equal_pages_are_known_once() -> None:
    cache = PrefixCache(2)
    first, second = cache.find(None, A + B + C), cache.find(None, A + B + D)
    cache.enter(first, A + B + C, [11, 12, 13], 3)
    assert cache.enter(second, A + B + D, [21, 22, 23], 3).path() == [11, 12, 23]
    assert found(cache, A + B + D + (9,)) == [11, 12, 23]
    assert [page in cache for page in (21, 22, 23)] == [False, False, True]
    assert cache.let_go([21, 22, 23]) == [21, 22]
    assert cache.num_unheld == 1


def test_entering_goes_on_where_it_stopped() -> None:
    cache = PrefixCache(2)
    node = cache.enter(cache.find(None, A), A + B, [11, 12], 1)
    assert found(cache, A + B + C) == [11]
    assert cache.enter(node, A + B, [11, 12], 1) is node
    assert cache.enter(node, A + B + C, [11, 12, 13], 3).path() == [11, 12, 13]
    assert found(cache, A + B + C + D) == [11, 12, 13]


def test_every_page_of_a_sequence_is_looked_up_and_entered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting and decoding cost nothing per page that is there already."""
    cache = PrefixCache(2)
    looked: list[int] = []
    key = cache._key
    monkeypatch.setattr(cache, "_key", lambda tokens, index: (looked.append(index), key(tokens, index))[1])
    tokens = tuple(range(40))
    node = cache.find(None, tokens)
    for count in range(21):
        node = cache.enter(node, tokens, list(range(1, 21)), count)
    assert looked == [0, *range(20)], "one look-up that fails, and each page once"
    looked.clear()
    waiting = cache.find(None, tokens + D + (9,))
    for _ in range(5):
        waiting = cache.find(waiting, tokens + D + (9,))
    assert looked == [*range(21), *[20] * 5]


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    cache = PrefixCache(2)
    chain(cache, A + B + C, 11, 12, 13)
    chain(cache, D + B, 21, 22)
    assert cache.let_go([21, 22]) == []
    assert cache.let_go([11, 12, 13]) == []
    assert cache.num_unheld == 5
    # Used again: its beginning only, and so that only.
    cache.hold(21)
    cache.let_go([21])
    gone = []
    while cache.num_unheld:
        cache.check_invariants()
        gone.append(cache.evict())
    assert gone == [[22], [13], [12], [11], [21]]
    assert cache.evictions == 5
    assert found(cache, A + B) == found(cache, D + B) == []


def test_one_that_ends_keeps_the_beginning_that_others_computed() -> None:
    """Two computed the same page at once; the one whose page is not known ends last."""
    cache = PrefixCache(2)
    chain(cache, A + B, 11, 12)
    chain(cache, A + C, 21, 22)
    cache.let_go([11, 12])
    assert cache.let_go([21, 22]) == [21]
    cache.check_invariants()
    assert [cache.evict() for _ in range(3)] == [[12], [22], [11]]


def test_what_continues_a_page_that_goes_is_not_found_either() -> None:
    cache = PrefixCache(2)
    chain(cache, A + B, 11, 12)
    node = chain(cache, A + C + D, 21, 22, 23)  # holds an equal first page of its own
    assert node.path() == [11, 22, 23]
    cache.let_go([11, 12])
    assert (cache.evict(), cache.evict()) == ([12], [11])
    assert found(cache, A + C + D + (9,)) == []
    assert cache.find(node, A + C + D + (9,)).path() == [], "a search that began before must not go on there"
    assert [page in cache for page in (21, 22, 23)] == [False] * 3
    # The sequence is whole, and enters its own pages.
    assert cache.enter(node, A + C + D + B, [21, 22, 23, 24], 4).path() == [21, 22, 23, 24]
    assert found(cache, A + C + D + B + (9,)) == [21, 22, 23, 24]
    assert cache.let_go([21, 22, 23, 24]) == []


def test_other_weights_find_nothing() -> None:
    cache = PrefixCache(2)
    live = chain(cache, A + B, 11, 12)
    chain(cache, A + C, 21, 22)
    cache.let_go([21, 22])
    assert sorted(cache.weights_updated()) == [22]
    assert cache.num_unheld == 0
    assert found(cache, A + B + C) == []
    assert cache.find(live, A + B + C).path() == []
    # Its first pages are old, and what follows is computed from them.
    assert cache.enter(live, A + B + C, [11, 12, 13], 3) is live
    assert found(cache, A + B + C) == []
    assert cache.let_go([11, 12, 13]) == [11, 12, 13]
    chain(cache, A + B, 31, 32)
    assert found(cache, A + B + C) == [31, 32]
    assert cache.enter(live, A + D, [11, 12], 2) is live
    assert found(cache, A + D + C) == [31]


# -- groups of layers ------------------------------------------------------------------------------------------------
# Two groups, pages of two tokens: page 1x sees all, page 2x sees a window of 3 tokens, which is its own and the last.


def chain_of(cache: PrefixCache, tokens: tuple[int, ...], *pages: int) -> Node:
    return cache.enter(cache.find(None, tokens), tokens, pages, len(pages) // 2)


def usable(cache: PrefixCache, tokens: tuple[int, ...]) -> list[int]:
    cache.check_invariants()
    return cache.usable(cache.find(None, tokens)).path()


def test_a_node_has_a_page_of_each_group() -> None:
    cache = PrefixCache(2, groups=2, full_attention_groups=1, window=3)
    chain_of(cache, A + B, 11, 21, 12, 22)
    assert usable(cache, A + B + C) == [11, 21, 12, 22]
    assert all(page in cache for page in (11, 21, 12, 22))
    assert [cache.pages_before_window(2 * depth) for depth in range(5)] == [0, 0, 1, 2, 3], (
        "a token behind n nodes sees one of them"
    )


def test_pages_of_windows_go_alone_and_what_sees_them_is_of_no_use() -> None:
    cache = PrefixCache(2, groups=2, full_attention_groups=1, window=3)
    chain_of(cache, A + B + C, 11, 21, 12, 22, 13, 23)
    assert cache.let_go([22], touch=False) == []
    assert cache.evict() == [22]
    assert 22 not in cache
    assert found(cache, A + B + C + D) == [11, 21, 12, 0, 13, 23]
    assert usable(cache, A + B + C + D) == [11, 21, 12, 0, 13, 23], "the last two tokens are all that is seen"
    assert usable(cache, A + B + (9,)) == [11, 21], "behind the second node its own page is missing"
    cache.let_go([23, 21], touch=False)
    assert cache.evict(2) == [23, 21]
    assert usable(cache, A + B + C + D) == []
    assert found(cache, A + B + C + D) == [11, 0, 12, 0, 13, 0]
    assert cache.evictions == 3


def test_who_computes_a_node_again_fills_its_gaps() -> None:
    cache = PrefixCache(2, groups=2, full_attention_groups=1, window=3)
    chain_of(cache, A + B, 11, 21, 12, 22)
    cache.let_go([22], touch=False)
    cache.evict()
    node = cache.usable(cache.find(None, A + B + C))
    assert node.path() == [11, 21]
    assert cache.enter(node, A + B + C, [11, 21, 32, 42, 33, 43], 3).path() == [11, 21, 12, 42, 33, 43]
    assert 42 in cache
    assert 32 not in cache, "the page of those that see all was there"
    assert usable(cache, A + B + C + D) == [11, 21, 12, 42, 33, 43]


def test_pages_that_are_there_are_not_replaced() -> None:
    """Two computed the same tokens at once; the second has lost its first windowed page already."""
    cache = PrefixCache(2, groups=2, full_attention_groups=1, window=3)
    chain_of(cache, A + B, 11, 21, 12, 22)
    assert cache.enter(cache.find(None, A), A + B, [31, 0, 32, 42], 2).path() == [11, 21, 12, 22]
    assert [page in cache for page in (31, 32, 42, 0)] == [False] * 4
    cache.let_go([22], touch=False)
    assert cache.evict() == [22]
    assert cache.enter(cache.find(None, A), A + B, [31, 0, 32, 0], 2).path() == [11, 21, 12, 0]
    assert 0 not in cache, "neither has it"


def test_a_page_that_makes_its_node_takes_the_others_along() -> None:
    cache = PrefixCache(2, groups=2, full_attention_groups=1, window=3)
    chain_of(cache, A + B, 11, 21, 12, 22)
    cache.let_go([11, 21, 12])  # 22 is held by somebody
    assert cache.evict() == [21]
    assert 22 in cache
    assert cache.evict() == [12], "what continues a page goes before it"
    assert 22 not in cache, "it goes on as its holder's"
    assert cache.evict() == [11]
    cache.check_invariants()


def test_pages_of_windows_are_given_up_where_they_passed_first() -> None:
    """A sequence that goes on gives pages back without touching those that it goes on from."""
    cache = PrefixCache(2, groups=2, full_attention_groups=1, window=3)
    chain_of(cache, A, 11, 21)
    chain_of(cache, C + D, 13, 23, 14, 24)
    cache.let_go([11])
    cache.let_go([23], touch=False)
    cache.let_go([13, 14])
    assert cache.evict() == [11]
    assert cache.evict() == [23]
    cache.check_invariants()


def test_switched_off() -> None:
    cache = PrefixCache(2, enabled=False)
    chain(cache, A + B, 11, 12)
    cache.count(5, 0)
    assert found(cache, A + B + C) == []
    assert 11 not in cache
    assert cache.let_go([11, 12]) == [11, 12]
    assert (cache.query_tokens, cache.hit_tokens, cache.num_unheld) == (0, 0, 0)


# -- a real model -------------------------------------------------------------------------------------------------

PAGE = 16
SYSTEM = ragged_prompts(2, 45, seed=3)[-1]
TURNS = [ragged_prompts(9, 14, seed=seed)[1:] for seed in (11, 12)]
NEW = 11


def converse(manager: GenerationManager) -> tuple[list[list[int]], int]:
    """Two conversations of eight turns in turn; all replies, and the tokens of full pages that were there before."""
    replies: list[list[int]] = []
    prompts = [list(SYSTEM), list(SYSTEM)]
    there = 0
    for turn in range(8):
        for which, prompt in enumerate(prompts):
            # The last token of a completion was never an input.
            known = len(prompt) - 1 if turn else len(SYSTEM) * which
            there += known // PAGE * PAGE
            prompt += TURNS[which][turn]
            result = manager.submit(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None).result(60)
            assert result.metrics.cached_prompt_tokens == manager.config.prefix_cache * (known // PAGE * PAGE)
            replies.append(result.token_ids)
            prompt += result.token_ids
    return replies, there


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
@pytest.mark.parametrize("depth", [1, 2])
def test_conversations_get_the_same_tokens(family: str, depth: int) -> None:
    model = tiny_model(family)
    settings: dict[str, Any] = {"page_size": PAGE, "max_batch_tokens": 64, "max_rows": 8, "debug": True}
    with GenerationManager(model, BatchingConfig(**settings, depth=depth, prefix_cache=False)) as manager:
        plain, _ = converse(manager)
        assert manager.stats().prefix_hit_tokens == manager.stats().prefix_query_tokens == 0
        assert manager.stats().prefix_pages == 0
    with GenerationManager(model, BatchingConfig(**settings, depth=depth)) as manager:
        cached, there = converse(manager)
        stats = manager.stats()
        assert manager.assembly is not None
        groups = manager.assembly.engine.scheduler.pages.groups
    assert cached == plain
    last = SYSTEM + [token for turn in range(8) for token in TURNS[1][turn] + plain[2 * turn + 1]]
    assert cached[-1] == greedy_alone(model, last[: -len(plain[-1])], NEW, eos_token_id=None)
    assert stats.prefix_hit_tokens == there > 1000
    lengths = [len(SYSTEM) + sum(map(len, turns[: t + 1])) + NEW * t for turns in TURNS for t in range(8)]
    assert stats.prefix_query_tokens == sum(lengths)
    assert stats.pages_in_use == 0
    # Each conversation's full pages, the shared ones of the system prompt once.
    pages = [(lengths[i] + NEW - 1) // PAGE for i in (7, 15)]
    assert (groups > 1) == (family == "Gemma3Text")
    assert stats.prefix_pages == groups * (sum(pages) - len(SYSTEM) // PAGE)


def test_a_prompt_of_a_whole_number_of_pages_again() -> None:
    model = tiny_model("Llama")
    prompt = ragged_prompts(2, 3 * PAGE, seed=9)[-1]
    with GenerationManager(model, BatchingConfig(page_size=PAGE, max_batch_tokens=64, max_rows=8)) as manager:
        first, second = [
            manager.submit(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None).result(60) for _ in range(2)
        ]
    assert first.token_ids == second.token_ids == greedy_alone(model, prompt, 5, eos_token_id=None)
    assert (first.metrics.cached_prompt_tokens, second.metrics.cached_prompt_tokens) == (0, 2 * PAGE)


def test_a_chain_is_forgotten_with_all_that_shares_a_page_with_it() -> None:
    cache = PrefixCache(2)
    node = chain(cache, A + B, 11, 12)
    below = chain(cache, A + C + D, 11, 13, 14)
    chain(cache, D + A, 15, 16)
    cache.let_go([11, 12])
    assert set(cache.forget(node)) == {11, 12}, "13 and 14 are held"
    assert found(cache, A + B + (9,)) == found(cache, A + C + D + (9,)) == []
    assert found(cache, D + A + (9,)) == [15, 16]
    assert not below.known
    assert cache.forget(node) == cache.forget(below) == [], "it is gone already"
    assert cache.forget(cache.find(None, A)) == [], "the root stays"
    old = chain(cache, B + C, 17, 18)
    cache.weights_updated()
    assert cache.forget(old) == []
