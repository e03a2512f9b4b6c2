"""What becomes of every field of transformers' `GenerationConfig`: honoured, without effect here, or refused.

A field is never silently ignored. Fields that only matter to what is refused anyway (beams, an assistant), or that
change how plain `generate` stores things but not its tokens, have no effect here. A field that this table does not
know is refused as soon as it is set.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from hf_async_batching.errors import UnsupportedArgumentError

HONOURED = frozenset(
    {
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "max_time",
        "stop_strings",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "num_return_sequences",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)

WITHOUT_EFFECT = frozenset(
    {
        # beams only
        "early_stopping",
        "length_penalty",
        "low_memory",
        # an assistant or an encoder only
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "max_matching_ngram_size",
        "decoder_start_token_id",
        # how plain `generate` runs, not what it returns
        "use_cache",
        "max_cache_len",
        "cache_config",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "prefill_chunk_size",
        "return_legacy_cache",
        # shifts all scores of a position by the same amount
        "renormalize_logits",
        # bookkeeping of transformers
        "transformers_version",
        "generation_kwargs",
        "is_assistant",
    }
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Values that leave a field without effect, and what to do about the others."""

    neutral: tuple[Any, ...]
    remedy: str


_PLAIN = "use plain `model.generate` for this call"
_SCORES = "submit with logprobs=True for the log-probabilities of the chosen tokens, or " + _PLAIN

REFUSED: dict[str, Refusal] = {
    "cache_implementation": Refusal((None, "dynamic", "static", "offloaded", "hybrid"), _PLAIN),
    "num_beams": Refusal((None, 1), _PLAIN),
    "num_beam_groups": Refusal((None, 1), _PLAIN),
    "diversity_penalty": Refusal((None, 0.0), _PLAIN),
    "constraints": Refusal((None,), _PLAIN),
    "force_words_ids": Refusal((None,), _PLAIN),
    "use_mtp": Refusal((None, False), _PLAIN),
    "top_h": Refusal((None,), _PLAIN),
    "typical_p": Refusal((None, 1.0), "pass typical_p=1.0, or " + _PLAIN),
    "epsilon_cutoff": Refusal((None, 0.0), "pass epsilon_cutoff=0.0, or " + _PLAIN),
    "eta_cutoff": Refusal((None, 0.0), "pass eta_cutoff=0.0, or " + _PLAIN),
    "repetition_penalty": Refusal((None, 1.0), "pass repetition_penalty=1.0, or " + _PLAIN),
    "encoder_repetition_penalty": Refusal((None, 1.0), "pass encoder_repetition_penalty=1.0, or " + _PLAIN),
    "no_repeat_ngram_size": Refusal((None, 0), "pass no_repeat_ngram_size=0, or " + _PLAIN),
    "encoder_no_repeat_ngram_size": Refusal((None, 0), "pass encoder_no_repeat_ngram_size=0, or " + _PLAIN),
    "bad_words_ids": Refusal((None,), _PLAIN),
    "forced_bos_token_id": Refusal((None,), _PLAIN),
    "forced_eos_token_id": Refusal((None,), _PLAIN),
    "remove_invalid_values": Refusal((None, False), _PLAIN),
    "exponential_decay_length_penalty": Refusal((None,), _PLAIN),
    "suppress_tokens": Refusal((None,), _PLAIN),
    "begin_suppress_tokens": Refusal((None,), _PLAIN),
    "sequence_bias": Refusal((None,), _PLAIN),
    "token_healing": Refusal((None, False), _PLAIN),
    "guidance_scale": Refusal((None, 1, 1.0), _PLAIN),
    "watermarking_config": Refusal((None,), _PLAIN),
    "output_attentions": Refusal((None, False), _PLAIN),
    "output_hidden_states": Refusal((None, False), _PLAIN),
    "output_scores": Refusal((None, False), _SCORES),
    "output_logits": Refusal((None, False), _SCORES),
    "prompt_lookup_num_tokens": Refusal((None,), _PLAIN),
    "assistant_early_exit": Refusal((None,), _PLAIN),
    "speculation_type": Refusal((None,), _PLAIN),
    "penalty_alpha": Refusal((None, 0.0), _PLAIN),
    "dola_layers": Refusal((None,), _PLAIN),
}

# Every field that the installed transformers knows; entries that a checkpoint adds on its own are nobody's arguments.
FIELDS = tuple(name for name in vars(GenerationConfig()) if not name.startswith("_"))  # type: ignore[no-untyped-call]

KNOWN: Collection[str] = HONOURED | WITHOUT_EFFECT | REFUSED.keys()


def check_fields(config: GenerationConfig) -> None:
    """Refuse a prepared generation config whose fields ask for what is not served.

    Raises:
        UnsupportedArgumentError: Names the field and what to do.
    """
    # transformers looks at these only where it returns a dictionary.
    unread = () if config.return_dict_in_generate else ("output_scores", "output_logits")
    for name in FIELDS:
        value = getattr(config, name, None)
        if name in HONOURED or name in WITHOUT_EFFECT or name in unread:
            continue
        refusal = REFUSED.get(name, Refusal((None,), _PLAIN))
        if not any(value is neutral or (value == neutral and neutral is not None) for neutral in refusal.neutral):
            raise UnsupportedArgumentError(f"`{name}={value!r}` is not served yet; {refusal.remedy}")
