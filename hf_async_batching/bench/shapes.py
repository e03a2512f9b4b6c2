"""Models of real shapes by name, with random weights. Speed depends on shapes, not on what a model has learnt."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_async_batching.bench.choices import QUANTIZATIONS
from hf_async_batching.bench.packed_experts import mxfp4_model
from hf_async_batching.bench.quantized import quantized_model
from hf_async_batching.bench.shape_configs import SHAPES, Shape

__all__ = ["SHAPES", "Shape", "random_model", "shape_config"]

# Fields that list the kind of each layer, and fields that count the dense layers before the sparse ones.
_KINDS = ("layer_types", "layers_block_type")
_DENSE = ("num_dense_layers", "first_k_dense_replace")


def random_model(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    quantize: str | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """Make a model of `shape` in evaluation mode, with weights drawn on `device`. It has no end-of-sequence token.

    Args:
        shape: A key of `SHAPES`.
        device: The device of the weights.
        dtype: Dtype of the weights; quantized layers compute in it.
        seed: Seed of the weights. The state of torch's own generators is the same before and after.
        quantize: None, or one of `choices.QUANTIZATIONS`. For nf4, each linear layer is quantized as soon as it
            is drawn. For mxfp4, the bytes of the experts are drawn.
        changes: Fields of the config that differ from the shape's; for `num_hidden_layers`, see `shape_config`.

    Raises:
        ValueError: The shape, the number of layers or the quantization does not exist, or a package for it is missing
            or too old; mxfp4 is for gpt-oss only.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ValueError(f"there is no quantization {quantize!r}; choose one of {', '.join(QUANTIZATIONS)}")
    config = shape_config(shape, **changes)
    # `manual_seed` seeds every GPU, so the state of every GPU is kept.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), device:
        torch.manual_seed(seed)
        model: Any
        if quantize == "mxfp4":
            model = mxfp4_model(config, device, dtype)
        elif quantize is not None:
            model = quantized_model(quantize, config, device, dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    made: PreTrainedModel = model.eval()
    return made


def shape_config(shape: str, **changes: Any) -> PreTrainedConfig:
    """Make the config of `shape`, without special tokens.

    Args:
        shape: A key of `SHAPES`.
        changes: Fields that differ. Fewer layers (`num_hidden_layers`) are the first layers of the shape. If one of
            its kinds of layers would be lost, it replaces the last layer whose kind is there twice.

    Raises:
        ValueError: The shape does not exist or has fewer layers, or the installed transformers lacks the model.
    """
    if shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; choose one of {', '.join(SHAPES)}")
    name, fields = SHAPES[shape]
    config_class: Any = getattr(transformers, name, None)
    if config_class is None or config_class not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"shape {shape!r} needs a transformers whose causal language models include {name}; "
            f"transformers {transformers.__version__} has none: install a newer one"
        )
    layers = changes.pop("num_hidden_layers", None)
    if layers is not None:
        fields = _fewer_layers(shape, fields, layers)
    # The tokens are random, so an end-of-sequence token would only end completions at random.
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config: PreTrainedConfig = config_class(**{**fields, **special, **changes})
    return config


def _fewer_layers(shape: str, fields: dict[str, Any], layers: int) -> dict[str, Any]:
    listed = next((key for key in _KINDS if key in fields), None)
    all_layers: int = fields["num_hidden_layers"] if listed is None else len(fields[listed])
    if not 1 <= layers <= all_layers:
        raise ValueError(f"shape {shape!r} has {all_layers} layers: choose 1 to {all_layers}, not {layers}")
    fields = dict(fields)
    if "num_hidden_layers" in fields:
        fields["num_hidden_layers"] = layers
    if listed is not None:
        fields[listed] = _some_of_each(fields[listed], layers)
    for key in _DENSE:
        if key in fields:
            fields[key] = min(fields[key], layers - 1)
    return fields


def _some_of_each(kinds: list[str], layers: int) -> list[str]:
    kept = kinds[:layers]
    for kind in dict.fromkeys(kinds):
        counts = Counter(kept)
        spare = [index for index, other in enumerate(kept) if counts[other] > 1]
        if kind not in counts and spare:
            kept[spare[-1]] = kind
    return kept
