"""Tiny random models of the classes that read pictures, and batches for them as their processors make them.

A processor turns a picture into tensors and a run of placeholder tokens. Its tokenizer needs files of a checkpoint, so
the batches here are made without one: random text, the runs of placeholders in it, and random pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from hf_async_batching.model.small.tiny_configs import VOCAB, tiny_config

Style = Literal["pixels", "sizes", "grid", "nested", "tiles", "patches", "strip", "sound"]

# Placeholder tokens, at the end of the tiny vocabulary.
IMAGE, VIDEO, AUDIO, START, END = (VOCAB - n for n in range(2, 7))
_TEXT = 150
_TOKENS: dict[str, int] = {
    "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "video_token_index": VIDEO,
    "audio_token_id": AUDIO, "audio_token_index": AUDIO, "vision_start_token_id": START, "vision_end_token_id": END,
    "image_start_token_id": START, "image_end_token_id": END, "boi_token_id": START, "eoi_token_id": END,
    "boi_token_index": START, "eoi_token_index": END,
}  # fmt: skip

_SIGLIP = {"image_size": 16, "patch_size": 8}
_CLIP = {"image_size": 16, "patch_size": 8}
_CONFORMER = {"hidden_dim": 64, "dim_head": 16, "num_heads": 4, "num_layers": 2, "feedforward_mult": 2}
_QWEN = {"patch_size": 4, "depth": 2, "out_hidden_size": 64}


def _mrope(*section: int, **fields: Any) -> dict[str, Any]:
    """A text config's rotary parameters with these sections of time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*section], **fields}}


_MROPE = _mrope(2, 3, 3)
_GLM = {"style": "grid", "vision": {**_QWEN, "image_size": 16}}

# model_type -> style of the pixel tensors, and fields of its configs that the generic rules get wrong.
FAMILIES: dict[str, dict[str, Any]] = {
    "aria": {"vision": {"image_size": 16, "patch_size": 8}, "config": {"projector_patch_to_query_dict": {4: 4}}},
    "aya_vision": {"vision": {"image_size": 32, "patch_size": 8}},
    "cohere2_vision": {"vision": {"image_size": 32, "patch_size": 8}},
    "cohere_compass": {"style": "grid", "vision": {**_QWEN, "num_position_embeddings": 64}},
    "deepseek_vl": {"vision": _SIGLIP, "tokens": 4},
    "exaone4_5": {"style": "grid", "vision": _QWEN},
    "gemma3": {"vision": {"image_size": 16, "patch_size": 4}, "config": {"mm_tokens_per_image": 4}},
    "glm46v": {**_GLM, "text": _MROPE},
    "glm4v": {**_GLM, "text": _MROPE},
    "glm4v_moe": {**_GLM, "text": _mrope(1, 1, 2, partial_rotary_factor=0.5)},
    "glm_ocr": {**_GLM, "text": _mrope(1, 1, 2, partial_rotary_factor=0.5)},
    "glmga": {**_GLM, "text": _MROPE},
    "got_ocr2": {"vision": {"image_size": 64, "patch_size": 4, "output_channels": 64}},
    "hyperclovax_vision_v2": {"style": "grid", "vision": _QWEN},
    "idefics2": {"style": "nested", "vision": _SIGLIP, "tokens": 64},
    "idefics3": {"style": "nested", "vision": {"image_size": 32, "patch_size": 8}},
    "internvl": {"vision": {"image_size": (16, 16), "patch_size": (4, 4)}},
    "janus": {"vision": {**_SIGLIP, "projection_dim": 64}, "tokens": 4},
    "kimi_k25": {"style": "grid", "vision": _QWEN, "config": {"projection_hidden_size": 64}},
    "lfm3_vl": {"style": "grid", "vision": _QWEN},
    "lighton_ocr": {"style": "sizes", "vision": {"image_size": 32, "patch_size": 8}},
    "llava": {"vision": _CLIP},
    "llava_next": {"style": "tiles", "vision": _CLIP, "config": {"image_grid_pinpoints": [[16, 32], [32, 16]]}},
    "llava_next_video": {"style": "tiles", "vision": _CLIP, "config": {"image_grid_pinpoints": [[16, 32], [32, 16]]}},
    "llava_onevision": {"style": "tiles", "vision": _SIGLIP, "config": {"image_grid_pinpoints": [[16, 32], [32, 16]]}},
    "mistral3": {"style": "sizes", "vision": {"image_size": 32, "patch_size": 8}},
    "ovis2": {"vision": {"image_size": 16, "patch_size": 4}},
    "paddleocr_vl": {"style": "grid", "vision": {"patch_size": 4, "image_size": 16}, "text": _MROPE},
    "paligemma": {"vision": {**_SIGLIP, "projection_dim": 64}, "config": {"projection_dim": 64}},
    "qianfan_ocr": {"vision": {"image_size": (16, 16), "patch_size": (4, 4)}},
    "qwen2_5_vl": {"style": "grid", "vision": _QWEN, "text": _MROPE},
    "qwen2_vl": {"style": "grid", "vision": {"patch_size": 4, "depth": 2, "embed_dim": 64}, "text": _MROPE},
    "qwen3_5": {"style": "grid", "vision": {**_QWEN, "num_position_embeddings": 64}},
    "qwen3_5_moe": {"style": "grid", "vision": {**_QWEN, "num_position_embeddings": 64}},
    "qwen3_vl": {
        "style": "grid",
        "vision": {**_QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        "text": _MROPE,
    },
    "qwen3_vl_moe": {
        "style": "grid",
        "vision": {**_QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        "text": _MROPE,
    },
    "smolvlm": {"style": "nested", "vision": {"image_size": 32, "patch_size": 8}},
    "video_llama_3": {"style": "grid", "vision": {"patch_size": 4}, "extra": {"image_merge_sizes": [2]}},
    "video_llava": {"vision": _CLIP},
    "vipllava": {"vision": _CLIP, "config": {"vision_feature_layers": [-2, -1]}},
    "cosmos3_omni": {
        "style": "grid",
        "vision": {**_QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    },
    "deepseek_vl_hybrid": {"vision": _SIGLIP, "tokens": 4},
    "qwen2_5_omni_thinker": {"style": "grid", "vision": _QWEN, "text": _MROPE},
    "qwen3_omni_moe_thinker": {
        "style": "grid",
        "vision": {**_QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        "text": _MROPE,
    },
    "muse_glimmer": {"style": "grid", "vision": {"patch_size": 4}},
    "minimax_m3_vl": {"style": "grid", "vision": _QWEN},
    "mistral_large4": {"style": "sizes", "vision": {"image_size": 32, "patch_size": 8}},
    "qwen4_exp": {"style": "grid", "vision": {**_QWEN, "num_position_embeddings": 64}},
    "hunyuan_vl": {
        "style": "grid",
        "vision": {"patch_size": 4, "num_key_value_heads": 4, "out_hidden_size": 64, "text_hidden_size": 64},
        "text": {"head_dim": 16, **_mrope(2, 2, 2, 2)},
    },
    "granite_docling": {"style": "grid", "vision": {**_QWEN, "num_position_embeddings": 64}},
    "voxtral": {"style": "sound", "audio": {"intermediate_size": 256}},
    "glmasr": {"style": "sound", "audio": {"intermediate_size": 256}},
    "granite_speech": {"style": "sound", "encoder": _CONFORMER, "projector": {"encoder_hidden_size": 64}},
    "granite_speech_plus": {"style": "sound", "encoder": _CONFORMER, "projector": {"encoder_hidden_size": 64}},
    "qwen3_asr": {"style": "sound", "audio": {"output_dim": 64}, "frames": 200},
    "qwen2_audio": {"style": "sound"},
    "moss_transcribe_diarize": {"style": "sound"},
    "vibevoice_asr": {"style": "sound"},
    "omniasr": {"style": "sound"},
    "lfm2_vl": {"style": "patches", "vision": {"patch_size": 4, "num_patches": 64}},
    "minicpm_ocr": {"style": "strip", "vision": {"patch_size": 4, "image_size": 64, "insert_layer_id": 1}},
    "minicpmv4_6": {"style": "strip", "vision": {"patch_size": 4, "image_size": 64, "insert_layer_id": 1}},
    "minicpmv4_7": {"style": "strip", "vision": {"patch_size": 4, "image_size": 64, "insert_layer_id": 1}},
    "ernie4_5_vl_moe": {"style": "grid", "vision": {"patch_size": 4, "depth": 2}, "text": _mrope(3, 3, 2)},
}

_PARTS = {
    "vision": "vision_config",
    "text": "text_config",
    "audio": "audio_config",
    "projector": "projector_config",
    "encoder": "encoder_config",
}


def image_class_names() -> dict[str, str]:
    """Classes of `AutoModelForImageTextToText` by model type."""
    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def media_class_names() -> dict[str, str]:
    """Classes of `AutoModelForMultimodalLM` by model type: pictures, videos and sounds."""
    return dict(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def tiny_media_model(class_name: str, scale: float = 3.0, **changes: Any) -> PreTrainedModel:
    """Make a random float32 model whose tokens depend on its pictures.

    Raises:
        Exception: Any error of the model's classes.
    """
    model_class = getattr(transformers, class_name)
    config_class = model_class.config_class
    family = FAMILIES.get(config_class.model_type, {})
    default = config_class()
    fields: dict[str, Any] = {}
    for part, name in _PARTS.items():
        sub = getattr(default, name, None)
        if sub is not None and family.get(part):
            fields[name] = tiny_config(type(sub), **family[part])
    known = {*default.to_dict(), *inspect.signature(config_class.__init__).parameters}
    fields.update({name: value for name, value in _TOKENS.items() if name in known})
    torch.manual_seed(sum(map(ord, class_name)))
    model: PreTrainedModel = model_class(
        tiny_config(config_class, **{**fields, **family.get("config", {}), **changes})
    )
    for name in ("vision_start_token_id", "vision_end_token_id"):
        if config_class.model_type.endswith("omni_thinker") or config_class.model_type.endswith("omni_moe_thinker"):
            setattr(model.config, name, _TOKENS[name])  # a whole checkpoint's config has them one level above
    model.to(dtype=torch.float32).eval()  # type: ignore[call-arg,arg-type,unused-ignore]
    plain: Any = GenerationConfig
    model.generation_config = plain(pad_token_id=0, do_sample=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if not torch.isfinite(parameter).all():
                parameter.normal_(0, 0.02)
            if parameter.dim() > 1:
                parameter.mul_(scale)
            elif bool((parameter == 0).all()):
                parameter.normal_(0, 0.1)
    return model


def media_batch(model: PreTrainedModel, rows: Sequence[Sequence[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch as a processor makes it, padded on the left.

    Args:
        model: A model that `tiny_media_model` has made.
        rows: The pictures of each row, as seeds of their pixels; two equal numbers are the same picture.
        seed: Seed of the text.
    """
    family = FAMILIES.get(model.config.model_type, {})
    placeholder = AUDIO if family.get("style") == "sound" else IMAGE
    pictures = [_picture(model, family, number) for row in rows for number in row]
    counts = iter([count for _, count in pictures])
    draw = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(3, _TEXT, (length,), generator=draw).tolist()

    ids: list[list[int]] = []
    for i, row in enumerate(rows):
        tokens = text(3 + 5 * i)
        for _ in row:
            tokens += [START, *[placeholder] * next(counts), END, *text(2)]
        ids.append(tokens + text(3))
    width = max(map(len, ids))
    input_ids = torch.tensor([[0] * (width - len(one)) + one for one in ids])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids])
    batch = {"input_ids": input_ids, "attention_mask": mask}
    parameters = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in parameters:
            batch[name] = (input_ids == IMAGE).long()
    if pictures:
        batch.update(_together([tensors for tensors, _ in pictures], rows, family.get("style", "pixels")))
    return batch


def _picture(model: Any, family: dict[str, Any], number: int) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of one picture, and the number of its placeholder tokens."""
    draw = torch.Generator().manual_seed(1000 + number)
    style: Style = family.get("style", "pixels")
    vision: Any = getattr(model.config, "vision_config", None)
    if style == "sound":
        return _sound(model, draw)
    if style == "grid":
        side = vision.patch_size
        time, height, width = [(1, 4, 4), (1, 4, 8), (1, 8, 4)][number % 3]
        channels = getattr(vision, "in_channels", getattr(vision, "num_channels", 3))
        frames = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1))
        size = channels * frames * side * side
        pixels = torch.randn(time * height * width, size, generator=draw)
        if model.config.model_type in ("paddleocr_vl", "kimi_k25"):
            pixels = pixels.view(-1, channels, side, side)
        tensors = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[time, height, width]])}
    elif style == "patches":
        height, width = [(4, 4), (4, 8), (8, 4)][number % 3]
        pixels = torch.randn(1, 32, 3 * vision.patch_size**2, generator=draw)
        shown = (torch.arange(32) < height * width)[None]
        tensors = {
            "pixel_values": pixels * shown[..., None],
            "spatial_shapes": torch.tensor([[height, width]]),
            "pixel_attention_mask": shown.long(),
        }
    elif style == "strip":
        height, width = [(4, 4), (4, 8), (8, 4)][number % 3]
        side = vision.patch_size
        tensors = {
            "pixel_values": torch.randn(1, 3, side, height * width * side, generator=draw),
            "target_sizes": torch.tensor([[height, width]]),
        }
    else:
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        tiles = 3 if style == "tiles" else 1
        pixels = torch.randn(tiles, 3, size, size, generator=draw)
        tensors = {"pixel_values": pixels[None] if style == "tiles" else pixels}
        if style == "sizes":
            tensors["image_sizes"] = torch.tensor([[size, size]])
        if style == "tiles":
            tensors["image_sizes"] = torch.tensor([[size, 2 * size]])
    tensors.update({name: torch.tensor(value) for name, value in family.get("extra", {}).items()})
    if "tokens" in family:
        return tensors, family["tokens"]
    given = {"pixel_values": tensors["pixel_values"][None]} if style == "nested" else tensors
    with torch.no_grad():
        features = model.get_image_features(**given, return_dict=True).pooler_output
    return tensors, sum(one.shape[0] if one.dim() == 2 else one.shape[0] * one.shape[1] for one in features)


def _sound(model: Any, draw: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of one sound, and the number of its placeholder tokens."""
    audio: Any = getattr(model.config, "audio_config", None) or model.config.encoder_config
    if model.config.model_type.startswith("granite"):
        tensors = {"input_features": torch.randn(1, 2 * model.config.window_size, audio.input_dim, generator=draw)}
    elif model.config.model_type == "omniasr":
        tensors = {"input_values": torch.randn(1, 1, 4000, generator=draw)}
    else:
        family = FAMILIES[model.config.model_type]
        frames = family.get("frames", 2 * getattr(audio, "max_source_positions", 32))
        tensors = {"input_features": torch.randn(1, audio.num_mel_bins, frames, generator=draw)}
        parameters = inspect.signature(model.forward).parameters
        for name in ("input_features_mask", "feature_attention_mask"):
            if name in parameters:
                tensors[name] = torch.ones(1, frames, dtype=torch.long)
    if model.config.model_type == "qwen2_audio":
        return tensors, frames // 4
    with torch.no_grad():
        features = model.get_audio_features(**tensors, return_dict=True).pooler_output
    return tensors, features.numel() // features.shape[-1]


def _together(
    pictures: list[dict[str, torch.Tensor]], rows: Sequence[Sequence[int]], style: Style
) -> dict[str, torch.Tensor]:
    if style != "nested":
        # A strip holds the patches of all pictures, one behind the other.
        along = {"pixel_values": -1} if style == "strip" else {}
        return {name: torch.cat([one[name] for one in pictures], along.get(name, 0)) for name in pictures[0]}
    # Pictures by row; rows with fewer have black ones, which the model drops.
    most = max(map(len, rows))
    each = iter(pictures)
    shape = pictures[0]["pixel_values"].shape[1:]
    together = torch.zeros(len(rows), most, *shape)
    for i, row in enumerate(rows):
        for j in range(len(row)):
            together[i, j] = next(each)["pixel_values"][0]
    return {"pixel_values": together}
