"""Fields that ask for what is not served are refused by name; the table has `test_compatibility_table.py`."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.inputs import generation_fields
from hf_async_batching.inputs.compatibility import FIELDS
from hf_async_batching.inputs.generation_fields import INSTALLED, bound_encoder_ngrams, check_fields

REFUSED = sorted(name for name, entry in FIELDS.items() if entry.status == "refused")

# A value of each refused field that asks for something.
ASKS: dict[str, Any] = {
    "cache_implementation": "quantized",
    "num_beams": 2,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "use_mtp": True,
    "token_healing": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "assistant_early_exit": 2,
    "speculation_type": "mtp",
    "penalty_alpha": 0.6,
    "dola_layers": "low",
}


def with_field(name: str, value: Any) -> GenerationConfig:
    """Set behind the back of transformers' own validation."""
    config = GenerationConfig()
    setattr(config, name, value)
    return config


def test_plain_configs_pass() -> None:
    check_fields(GenerationConfig())
    check_fields(
        GenerationConfig(
            max_new_tokens=5, min_new_tokens=2, do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1
        )
    )


def test_every_refusal_has_an_example() -> None:
    assert sorted(ASKS) == REFUSED


@pytest.mark.parametrize("name", [name for name in REFUSED if name in INSTALLED])
def test_a_refusal_names_the_field_and_a_remedy(name: str) -> None:
    with pytest.raises(UnsupportedArgumentError) as caught:
        check_fields(with_field(name, ASKS[name]))
    message = str(caught.value)
    assert message.startswith(f"`{name}={ASKS[name]!r}` is not served; ")
    assert message.endswith(FIELDS[name].remedy)
    assert "`model.generate`" in FIELDS[name].remedy


@pytest.mark.parametrize("name", [name for name in REFUSED if name in INSTALLED])
def test_neutral_values_pass(name: str) -> None:
    assert None in FIELDS[name].neutral
    for value in FIELDS[name].neutral:
        check_fields(with_field(name, value))


def test_a_field_that_nobody_knows_is_refused_when_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later transformers brings: here a field that the table has forgotten."""
    rest = {name: entry for name, entry in FIELDS.items() if name != "low_memory"}
    monkeypatch.setattr(generation_fields, "FIELDS", rest)
    check_fields(GenerationConfig())
    with pytest.raises(UnsupportedArgumentError, match="`low_memory=True` is not served"):
        check_fields(with_field("low_memory", True))


@pytest.mark.parametrize(("size", "length", "bounded"), [(3, 5, 3), (5, 5, 5), (6, 5, 6), (2**40, 5, 6), (0, 5, 0)])
def test_n_grams_longer_than_the_prompt_are_all_the_same(size: int, length: int, bounded: int) -> None:
    config = with_field("encoder_no_repeat_ngram_size", size)
    bound_encoder_ngrams(config, length)
    assert config.encoder_no_repeat_ngram_size == bounded


def test_a_list_of_n_grams_is_bounded_by_its_tokens() -> None:
    """As many n-grams as each has tokens, which is 2**26 tokens, and one n-gram more."""
    size = 1 << 13
    config = with_field("encoder_no_repeat_ngram_size", size)
    bound_encoder_ngrams(config, 2 * size - 1)
    with pytest.raises(UnsupportedArgumentError, match=r"`encoder_no_repeat_ngram_size=8192` .* 16384 tokens"):
        bound_encoder_ngrams(config, 2 * size)
    assert config.encoder_no_repeat_ngram_size == size


def test_single_tokens_are_listed_too() -> None:
    config = with_field("encoder_no_repeat_ngram_size", 1)
    bound_encoder_ngrams(config, 1 << 26)
    with pytest.raises(UnsupportedArgumentError, match="shorter prompt"):
        bound_encoder_ngrams(config, (1 << 26) + 1)


@pytest.mark.parametrize("size", [None, -1, 1.5])
def test_sizes_that_are_no_sizes_are_left_as_they_are(size: Any) -> None:
    config = with_field("encoder_no_repeat_ngram_size", size)
    bound_encoder_ngrams(config, 1)
    assert config.encoder_no_repeat_ngram_size == size


@pytest.mark.parametrize("name", ["max_length", "max_new_tokens"])
def test_lengths_are_finite_numbers(name: str) -> None:
    check_fields(with_field(name, 7.5))
    for value, error in ((float("inf"), ValueError), ("7", TypeError)):
        with pytest.raises(error, match=f"`{name}`"):
            check_fields(with_field(name, value))
