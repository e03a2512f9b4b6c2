"""What visitors can set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from demo.serving.random_words import word_tokenizer
from demo.serving.settings import (
    BOUNDS,
    KNOBS,
    MAX_NEW_TOKENS,
    MOST_SEED,
    Bounds,
    Settings,
    clamp,
    ends_of,
    number,
    read_seed,
    whole_number,
)


def test_settings_stay_within_bounds() -> None:
    settings = Settings.within_bounds("Be brief.", 10**9, -5, 7, 10**9, True, -1)
    assert (settings.max_new_tokens, settings.temperature, settings.top_p) == (MAX_NEW_TOKENS, 0.1, 1.0)
    assert (settings.top_k, settings.greedy, settings.seed) == (1000, True, 0)
    empty: Any = None
    assert Settings.within_bounds(*[empty] * 7).max_new_tokens == 1
    assert Settings.within_bounds() == Settings.checked() == Settings(), "what is left out keeps its default"


def test_controls_are_read_in_the_order_in_which_the_page_sends_them() -> None:
    assert KNOBS == ("system", "max_new_tokens", "temperature", "top_p", "top_k", "greedy", "seed")
    sent = ("Be brief.", 64, 0.5, 0.8, 40, True, 7)
    assert Settings.within_bounds(*sent) == Settings(*sent)


@pytest.mark.parametrize("name", [*BOUNDS, "seed"])
def test_the_api_refuses_what_the_page_brings_within_bounds(name: str) -> None:
    least, most, whole = BOUNDS.get(name, Bounds(0, MOST_SEED, whole=True))
    for value in (least, most):
        assert getattr(Settings.checked(**{name: value}), name) == value
    for wrong in (least - 1, most + 1, "much", True, [], *([least + 0.5] if whole else [])):
        with pytest.raises(ValueError, match=f"`{name}` must be a"):
            Settings.checked(**{name: wrong})
    assert getattr(Settings.within_bounds(**{name: most + 1}), name) == most
    with pytest.raises(ValueError, match="`system` must be a text"):
        Settings.checked(system=7)


def test_a_seed_is_kept_and_a_missing_one_drawn() -> None:
    assert Settings(seed=5).request([1], ()).sampling.seed == 5
    drawn = {Settings().request([1], ()).sampling.seed for _ in range(20)}
    assert len(drawn) > 10
    assert not Settings(greedy=True).request([1], ()).sampling.do_sample


@pytest.mark.parametrize(
    ("sent", "seed"),
    [
        ("", None),
        (None, None),
        ("no number", None),
        ("nan", None),
        ([], None),
        ("7", 7),
        (7.0, 7),
        ("0", 0),
        (1e99, MOST_SEED),
    ],
)
def test_an_empty_seed_box_draws_a_seed_and_a_number_is_kept(sent: Any, seed: int | None) -> None:
    assert read_seed(sent) == seed
    assert Settings.within_bounds(seed=sent).seed == seed


@pytest.mark.parametrize(("ends", "expected"), [(None, (256,)), (7, (7,)), ([7, 9], (7, 9))])
def test_ends_come_from_the_model_or_its_tokenizer(ends: Any, expected: tuple[int, ...]) -> None:
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=ends))
    tokenizer = SimpleNamespace(eos_token_id=256)
    chat_model: Any = SimpleNamespace(model=model, tokenizer=tokenizer)
    assert ends_of(chat_model) == expected


def test_made_up_words_are_read_and_written() -> None:
    tokenizer: Any = word_tokenizer(1000)
    assert len(tokenizer) == 1000
    text = "Grüße <|im_start|> 👩"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    words = tokenizer.decode(range(256, 998)).split()
    assert len(set(words)) == len(words) == 742, "no two tokens are the same word"
    assert all(word.isalpha() for word in words)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"
    with pytest.raises(ValueError, match="at least 258 tokens, the model has 100"):
        word_tokenizer(100)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "high", [1], {}, True, None, 10**400, -(10**400), 1.5, 65]
)
def test_what_is_no_number_within_bounds_is_refused_or_brought_there(value: Any) -> None:
    with pytest.raises(ValueError, match="`chats` must be a"):
        whole_number("chats", value, 1, 64)
    assert 1 <= clamp(value, 1, 64) <= 64
    if value != 1.5:
        with pytest.raises(ValueError, match="`chats` must be a number from 1 to 64"):
            number("chats", value, 1, 64)
    assert whole_number("chats", 2.0, 1, 64) == 2
