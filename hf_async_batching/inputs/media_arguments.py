"""Names of the arguments by which processors pass pictures, videos and sounds to `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.generation import utils as generation

CACHES = ("cache", "past_key_values", "cache_params")
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")

# Beside transformers' own list of inputs that only a prompt's forward reads.
_OTHERS = frozenset(
    {
        *("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "video_second_per_grid"),
        *("num_patches", "patch_sizes", "batch_num_images", "spatial_shapes", "aspect_ratio_ids", "aspect_ratio_mask"),
        *("audio_mask", "feature_attention_mask", "audio_feature_lengths", "audio_features", "input_ids_mask"),
        *("image_grid_hws", "image_merge_sizes", "video_merge_sizes", "video_compression_mask", "pixel_values_masks"),
        *("target_sizes", "num_crops", "image_num_crops", "image_bound", "tgt_sizes", "audio_input_features"),
    }
)
_LISTED = frozenset(getattr(generation, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ()))
MEDIA = _LISTED | _OTHERS

# The arguments that hold a picture, a video or a sound itself; a message names the first that was given.
_MAIN = (
    *("pixel_values", "pixel_values_videos", "pixel_values_images", "image_patches", "pixel_values_local"),
    *("input_features", "input_values", "audio_features", "audio_input_features", "mm_encoder_outputs"),
)


def is_media(name: str) -> bool:
    """Whether an input of a model's forward describes pictures, videos or sounds of a prompt."""
    return name in MEDIA


def split_media(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those about pictures, videos or sounds, token types included, and all others.

    Without any picture, video or sound the first dictionary is empty.
    """
    if not media_of(arguments):
        return {}, {name: value for name, value in arguments.items() if not is_media(name)}
    media = {name: value for name, value in arguments.items() if is_media(name) or name in TOKEN_TYPES}
    return media, {name: value for name, value in arguments.items() if name not in media}


def media_of(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that hold something about pictures, videos or sounds, the main ones first."""
    given = [name for name, value in arguments.items() if is_media(name) and _holds_something(value)]
    return sorted(given, key=lambda name: _MAIN.index(name) if name in _MAIN else len(_MAIN))


def user_name(names: Iterable[str]) -> str:
    """The argument that a message about pictures names: the first of `_MAIN` that the caller passed."""
    names = list(names)
    return next((name for name in _MAIN if name in names), names[0] if names else "mm_encoder_outputs")


def _holds_something(value: Any) -> bool:
    return value is not None and not (isinstance(value, dict) and not any(one is not None for one in value.values()))
