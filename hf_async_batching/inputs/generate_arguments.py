"""The keyword arguments of `submit` and `generate_dataset` by type, for editors and type checkers.

A test compares the names with the table in `compatibility`. Nothing is checked at run time here: a field that a later
transformers adds is accepted or refused by that table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch

TokenIds = int | Sequence[int] | torch.Tensor
"""One token id or several."""


class RequestArguments(TypedDict, total=False):
    """Fields of `GenerationConfig` that `GenerationManager.submit` serves."""

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    eos_token_id: TokenIds | None
    forced_bos_token_id: int | None
    forced_eos_token_id: TokenIds | None
    exponential_decay_length_penalty: tuple[int, float] | None
    max_time: float | None
    stop_strings: str | list[str] | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    top_h: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    sequence_bias: Mapping[tuple[int, ...], float] | list[Any] | None
    bad_words_ids: list[list[int]] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    remove_invalid_values: bool | None
    renormalize_logits: bool | None
    guidance_scale: float | None
    watermarking_config: Any
    return_dict_in_generate: bool | None
    output_scores: bool | None
    output_logits: bool | None
    pad_token_id: int | None
    bos_token_id: int | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    use_cache: bool | None


class SubmitArguments(RequestArguments, total=False):
    """`RequestArguments`, and what processors return for pictures, videos and sounds; see `media_arguments`."""

    pixel_values: torch.Tensor | None
    pixel_values_videos: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    video_grid_thw: torch.Tensor | None
    second_per_grid_ts: torch.Tensor | None
    image_sizes: torch.Tensor | None
    pixel_attention_mask: torch.Tensor | None
    pixel_mask: torch.Tensor | None
    input_features: torch.Tensor | None
    input_features_mask: torch.Tensor | None
    feature_attention_mask: torch.Tensor | None
    token_type_ids: torch.Tensor | None
    mm_token_type_ids: torch.Tensor | None


class DatasetArguments(RequestArguments, total=False):
    """Fields of `GenerationConfig` that `generate_dataset` serves."""

    num_return_sequences: int | None
