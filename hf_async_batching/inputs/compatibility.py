"""The table of every `GenerationConfig` field and every `generate` argument: honoured, without effect, or refused.

`check_fields` refuses fields by this table, and `hf-async-batching compatibility` writes `docs/compatibility.md` from
it. A test compares it with the installed transformers. A field without a line here is refused as soon as it is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["honoured", "no effect", "refused"]
Kind = Literal["field", "argument"]

_PLAIN = "use plain `model.generate` for this call"


@dataclass(frozen=True, slots=True)
class ArgumentEntry:
    """One line of the table.

    Attributes:
        name: Name of the field or the argument.
        status: Honoured, without effect, or refused.
        note: How it is honoured, or why it is not.
        neutral: Values of a refused field that change nothing, and pass.
        remedy: What the caller of a refused field can do instead.
        kind: Whether it is a field of `GenerationConfig` or an argument of `generate`.
    """

    name: str
    status: Status
    note: str
    neutral: tuple[Any, ...] = (None,)
    remedy: str = _PLAIN
    kind: Kind = "field"


def _honoured(name: str, note: str = "", kind: Kind = "field") -> ArgumentEntry:
    return ArgumentEntry(name, "honoured", note, kind=kind)


def _no_effect(name: str, note: str, kind: Kind = "field") -> ArgumentEntry:
    return ArgumentEntry(name, "no effect", note, kind=kind)


def _refused(
    name: str, note: str, neutral: tuple[Any, ...] = (None,), remedy: str = _PLAIN, kind: Kind = "field"
) -> ArgumentEntry:
    return ArgumentEntry(name, "refused", note, neutral, remedy, kind)


_VECTORISED = "for all rows at once"
_CALLED = "called with the rows of the call as one batch, in its place among the others"
_BEAMS = "beam search only"
_ASSISTANT = "assisted decoding only"
_HOW = "how plain `generate` runs, not what it returns"
_BOOKKEEPING = "bookkeeping of transformers"
_HOST = "beside the engine, which does not wait"
_CACHES = (None, "dynamic", "static", "offloaded", "hybrid")

# One name a line, in the order of the page.
# fmt: off
ENTRIES: tuple[ArgumentEntry, ...] = (
    # lengths and ends
    _honoured("max_length", "absolute, padding counted as `generate` counts it"),
    _honoured("max_new_tokens"),
    _honoured("min_length"),
    _honoured("min_new_tokens"),
    _honoured("eos_token_id", "any number of them"),
    _honoured("forced_bos_token_id", _VECTORISED),
    _honoured("forced_eos_token_id", _VECTORISED),
    _honoured("exponential_decay_length_penalty", _VECTORISED),
    _honoured("max_time", _HOST),
    _honoured("stop_strings", _HOST + "; with a `tokenizer`, see `drop_in.generate`"),
    # sampling
    _honoured("do_sample", "draws depend on the request's seed alone, never on the global random state"),
    _honoured("temperature", _VECTORISED),
    _honoured("top_k", _VECTORISED),
    _honoured("top_p", "for all rows at once; tokens exactly as probable as the last one kept stay"),
    _honoured("min_p", _VECTORISED),
    _honoured("top_h", _VECTORISED),
    _honoured("typical_p", _VECTORISED),
    _honoured("epsilon_cutoff", _VECTORISED),
    _honoured("eta_cutoff", _VECTORISED),
    # logits
    _honoured("repetition_penalty", _VECTORISED),
    _honoured("encoder_repetition_penalty", _VECTORISED),
    _honoured("no_repeat_ngram_size", _VECTORISED),
    _honoured("encoder_no_repeat_ngram_size", _VECTORISED),
    _honoured("sequence_bias", "for all rows at once, up to 256 sequences of up to 9 tokens; " + _CALLED + " beyond"),
    _honoured("bad_words_ids", "for all rows at once, up to 256 sequences of up to 9 tokens; " + _CALLED + " beyond"),
    _honoured("suppress_tokens", "for all rows at once, up to 256 tokens; " + _CALLED + " beyond"),
    _honoured("begin_suppress_tokens", "for all rows at once, up to 256 tokens; " + _CALLED + " beyond"),
    _honoured("remove_invalid_values", _VECTORISED),
    _honoured("renormalize_logits", "seen in the scores; it changes no token"),
    _honoured("guidance_scale", _CALLED + "; the unconditional forward runs beside the engine"),
    _honoured("watermarking_config", _CALLED),
    # outputs
    _honoured("num_return_sequences"),
    _honoured("return_dict_in_generate", "without the cache, which is shared"),
    _honoured("output_scores", "0 for rows that have ended"),
    _honoured("output_logits", "0 for rows that have ended"),
    _refused("output_attentions", "the attention kernels keep no weights", (None, False)),
    _refused("output_hidden_states", "", (None, False)),
    # special tokens
    _honoured("pad_token_id"),
    _honoured("bos_token_id"),
    _no_effect("decoder_start_token_id", "encoder-decoder models only"),
    # other ways to search
    _refused("num_beams", "beam search", (None, 1)),
    _refused("num_beam_groups", "beam search", (None, 1)),
    _refused("diversity_penalty", "beam search", (None, 0.0)),
    _refused("constraints", "beam search"),
    _refused("force_words_ids", "beam search"),
    _no_effect("early_stopping", _BEAMS),
    _no_effect("length_penalty", _BEAMS),
    _no_effect("low_memory", _BEAMS),
    _refused("penalty_alpha", "contrastive search", (None, 0.0)),
    _refused("dola_layers", "DoLa decoding"),
    _honoured("prompt_lookup_num_tokens", "in the batch, while few requests run; also where tokens are drawn"),
    _honoured("max_matching_ngram_size"),
    _refused("assistant_early_exit", "speculative decoding"),
    _refused("speculation_type", "speculative decoding"),
    _refused("use_mtp", "speculative decoding", (None, False)),
    _refused("token_healing", "", (None, False)),
    _no_effect("num_assistant_tokens", _ASSISTANT),
    _no_effect("num_assistant_tokens_schedule", _ASSISTANT),
    _no_effect("assistant_confidence_threshold", _ASSISTANT),
    _no_effect("assistant_lookbehind", _ASSISTANT),
    _no_effect("target_lookbehind", _ASSISTANT),
    _no_effect("assistant_ensemble_weight", _ASSISTANT),
    _no_effect("is_assistant", _BOOKKEEPING),
    # caches and compilation
    _refused("cache_implementation", "the engine has pages of its own", _CACHES),
    _no_effect("use_cache", _HOW),
    _no_effect("max_cache_len", _HOW),
    _no_effect("cache_config", _HOW),
    _no_effect("compile_config", _HOW),
    _no_effect("disable_compile", _HOW),
    _no_effect("continuous_batching_config", _HOW),
    _no_effect("prefill_chunk_size", _HOW),
    _no_effect("return_legacy_cache", _HOW),
    _no_effect("transformers_version", _BOOKKEEPING),
    _no_effect("generation_kwargs", _BOOKKEEPING),
    # arguments of `generate`
    _honoured("inputs", kind="argument"),
    _honoured("generation_config", kind="argument"),
    _honoured("logits_processor", "those of transformers for all rows at once, any other one " + _CALLED, "argument"),
    _honoured("stopping_criteria", "called as `generate` calls them; " + _HOST, "argument"),
    _honoured("prefix_allowed_tokens_fn", _CALLED, "argument"),
    _honoured("negative_prompt_ids", "with `guidance_scale`", "argument"),
    _honoured("negative_prompt_attention_mask", "with `guidance_scale`", "argument"),
    _refused("synced_gpus", "", (None, False), kind="argument"),
    _refused("assistant_model", "", kind="argument"),
    _honoured("streamer", "called as `generate` calls it, in the calling thread", "argument"),
    _honoured("custom_generate", "this library is one", "argument"),
    _honoured(
        "kwargs",
        "fields, `attention_mask` (padding on the left), `inputs_embeds`, `tokenizer`, default `position_ids`, "
        "and what processors return for pictures, videos and sounds, by family",
        "argument",
    ),
)
# fmt: on

FIELDS = {entry.name: entry for entry in ENTRIES if entry.kind == "field"}
ARGUMENTS = {entry.name: entry for entry in ENTRIES if entry.kind == "argument"}

_INTRODUCTION = """\
# What becomes of each argument

Written by `hf-async-batching compatibility --write docs/compatibility.md`; do not edit it by hand.

Whatever is not honoured and asks for something is refused with an error that names it. A name that a later
transformers adds is refused as soon as it is set, until it has a line here.

- *For all rows at once*: part of the asynchronous step, on the device, each row by its own parameters.
- *Called with the rows of the call as one batch*: the whole list of processors is called as `generate` calls it:
  `input_ids` int64 [rows, length], the full history with the padding of the prompts, and scores float32 [rows, vocab].
  It runs in the caller's thread. A request of `submit` is a call of one row, in a thread of its own. So is each row of
  a call whose processors say `row_wise = True`. A processor that raises ends its own call, with that error.
"""


def page() -> str:
    """The table in Markdown."""
    lines = [_INTRODUCTION]
    for title, entries in (
        ("Fields of `GenerationConfig`", FIELDS.values()),
        ("Arguments of `generate`", ARGUMENTS.values()),
    ):
        lines += [f"## {title}\n", "| name | status | |", "| --- | --- | --- |"]
        for entry in entries:
            note = entry.note
            if entry.status == "refused":
                note = "; ".join(part for part in (note, entry.remedy) if part)
            lines.append(f"| `{entry.name}` | {entry.status} | {note} |")
        lines.append("")
    return "\n".join(lines)
