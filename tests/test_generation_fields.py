"""Every field of the installed `GenerationConfig` is honoured, without effect, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from hf_async_batching import generation_fields
from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.generation_fields import HONOURED, KNOWN, REFUSED, WITHOUT_EFFECT, check_fields

FIELDS = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))
TABLES = {"HONOURED": HONOURED, "WITHOUT_EFFECT": WITHOUT_EFFECT, "REFUSED": REFUSED.keys()}

# A value of each refused field that asks for something.
ASKS: dict[str, Any] = {
    "cache_implementation": "quantized",
    "num_beams": 2,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "use_mtp": True,
    "top_h": 0.4,
    "typical_p": 0.9,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
    "repetition_penalty": 1.2,
    "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[5]],
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (5, 1.1),
    "suppress_tokens": [0],
    "begin_suppress_tokens": [0],
    "sequence_bias": [[[5], 1.0]],
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0},
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "speculation_type": "mtp",
    "penalty_alpha": 0.6,
    "dola_layers": "low",
}


def with_field(name: str, value: Any) -> GenerationConfig:
    """Set behind the back of transformers' own validation. Scores are looked at where a dictionary is returned."""
    config = GenerationConfig()
    config.return_dict_in_generate = True
    setattr(config, name, value)
    return config


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_in_exactly_one_table(name: str) -> None:
    assert [table for table, names in TABLES.items() if name in names] != [], f"{name} is not decided"
    assert sum(name in names for names in TABLES.values()) == 1
    assert name in KNOWN


def test_the_tables_do_not_overlap() -> None:
    assert len(KNOWN) == sum(len(names) for names in TABLES.values())


def test_plain_configs_pass() -> None:
    check_fields(GenerationConfig())
    check_fields(
        GenerationConfig(
            max_new_tokens=5, min_new_tokens=2, do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1
        )
    )


def test_every_refusal_has_an_example() -> None:
    assert ASKS.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", [name for name in FIELDS if name in REFUSED])
def test_a_refusal_names_the_field_and_a_remedy(name: str) -> None:
    with pytest.raises(UnsupportedArgumentError) as caught:
        check_fields(with_field(name, ASKS[name]))
    message = str(caught.value)
    assert message.startswith(f"`{name}={ASKS[name]!r}` is not served yet; ")
    assert message.endswith(REFUSED[name].remedy)
    assert "`model.generate`" in REFUSED[name].remedy


@pytest.mark.parametrize("name", [name for name in FIELDS if name in REFUSED])
def test_neutral_values_pass(name: str) -> None:
    assert None in REFUSED[name].neutral
    for value in REFUSED[name].neutral:
        check_fields(with_field(name, value))


@pytest.mark.parametrize("name", ["output_scores", "output_logits"])
def test_scores_matter_only_where_a_dictionary_is_returned(name: str) -> None:
    config = with_field(name, True)
    config.return_dict_in_generate = False
    check_fields(config)


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
def test_token_zero_is_not_none(name: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=f"`{name}=0`"):
        check_fields(with_field(name, 0))


def test_a_field_that_nobody_knows_is_refused_when_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later transformers brings: here a field that the tables have forgotten."""
    monkeypatch.setattr(generation_fields, "WITHOUT_EFFECT", WITHOUT_EFFECT - {"low_memory"})
    check_fields(GenerationConfig())
    with pytest.raises(UnsupportedArgumentError, match="`low_memory=True` is not served yet"):
        check_fields(with_field("low_memory", True))
