"""Find the lengths beyond which a model computes differently, and make a small copy of its config that has them all.

Such lengths come from windows, chunks, sparse attention, temperatures and rotary frequencies that follow the position.
A prompt of 50 tokens does not show what a model computes beyond them: a real model has them in the thousands. The
small copy brings them within reach of a check on a CPU.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from hf_async_batching.model.small.tiny_configs import FAMILIES, FIELDS, VOCAB

# Names of fields that hold such a length.
_LENGTH = re.compile(
    r"window|chunk_size|chunk_length|chunksize|block_size|floor|budget|index_topk$|local_attention$|compress_rates"
)
# Other fields whose names contain the same words: counts, patterns, and sizes that only divide work.
_OTHER = re.compile(r"pattern|layers|feed_forward|lm_head|num_|time_step|block_sizes|experts|type|_init|image|vision")
# Kinds of rotary frequencies that do not depend on the length.
_FIXED_ROPE = {"default", "linear", "yarn", "llama3", "proportional", "mrope", "su", "none"}
# Fields that count experts, or keys that an indexer selects.
_CHOICES = re.compile(r"expert|moe_|index_topk|topk")
# Fields that count a length in units of another field.
_UNITS = {"index_topk_blocks": "index_block_size", "index_local_blocks": "index_block_size"}

# Length of windows, chunks and budgets in a small copy; a multiple of the units.
SMALL = 16
_SMALL_UNIT = 8
_MOST_LAYERS = 12
# Above the length of the check's prompts, whatever the model's own context length is.
_CONTEXT = 512
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
_STATE_GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "swa_num_key_value_heads")
_CONTEXTS = re.compile(r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|seq_length|"
                       r"max_sequence_length|model_max_length|max_target_positions)$")  # fmt: skip


def text_config(config: Any) -> Any:
    """The part of a config that describes the text decoder."""
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, ValueError):  # the config has no such part, or several
        return config


def makes_choices(config: Any) -> bool:
    """Whether a model of this config selects among several experts or keys, where one bit can decide.

    Args:
        config: Config of any model; the fields of its text decoder count.
    """
    fields = dict(vars(text_config(config)))
    for value in list(fields.values()):
        fields.update(value if isinstance(value, dict) else vars(value) if isinstance(value, PreTrainedConfig) else {})
    return any(type(value) is int and value > 1 and _CHOICES.search(str(name)) for name, value in fields.items())


def rope_dicts(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary parameters by layer type; the key is empty if all layers share them.

    Args:
        config: Config of the text model.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return {}
    nested = {str(name): value for name, value in rope.items() if isinstance(value, dict)}
    return nested or {"": rope}


def rope_kind(rope: dict[str, Any]) -> str:
    """The kind of rotary frequencies: "default", "longrope", …"""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def follows_length(rope: dict[str, Any]) -> bool:
    """Whether rotary frequencies depend on the longest sequence of a batch (dynamic NTK, LongRoPE)."""
    return "dynamic" in rope_kind(rope) or rope_kind(rope) == "longrope"


def original_length(rope: dict[str, Any], config: Any) -> int | None:
    """Number of tokens up to which the original rotary frequencies apply; None if the config does not say."""
    for value in (
        rope.get("original_max_position_embeddings"),
        getattr(config, "original_max_position_embeddings", None),
        getattr(config, "max_position_embeddings", None),
    ):
        if isinstance(value, int) and value > 0:
            return value
    return None


def length_thresholds(config: PreTrainedConfig) -> dict[str, int]:
    """Lengths in tokens beyond which a model of this config computes differently, by field name.

    They exclude the end of the context, and the original lengths of rotary frequencies that do not depend on the
    length. The name of a nested field is joined by dots; the name of a length that is a product, by an asterisk.

    Args:
        config: Config of any model; the fields of its text decoder count.
    """
    text = text_config(config)
    found: dict[str, int] = {}
    for name, value in _numbers(text):
        unit = getattr(text, _UNITS[name], None) if name in _UNITS else None
        if isinstance(unit, int):
            found[f"{name}*{_UNITS[name]}"] = value * unit
        elif name not in _UNITS and _is_length(name):
            found[name] = value
    for kind, rope in rope_dicts(text).items():
        original = original_length(rope, text)
        by_position = any(name.endswith("_beta") and "scaling" in name and value for name, value in rope.items())
        if original and (by_position or rope_kind(rope) not in _FIXED_ROPE):
            found[".".join(filter(None, ("rope_parameters", kind, "original_max_position_embeddings")))] = original
    return found


def _is_length(name: str) -> bool:
    return bool(_LENGTH.search(name)) and not _OTHER.search(name)


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Fields that hold a whole number above 1, including the fields of dictionaries one level below."""
    for name, value in vars(config).items():
        if isinstance(value, dict) and not name.startswith("rope_"):
            fields = {f"{name}.{key}": item for key, item in value.items()}
        else:
            fields = {name.removeprefix("_"): value}
        for field, item in fields.items():
            if isinstance(item, (int, float)) and not isinstance(item, bool) and item > 1 and item == item // 1:
                yield field, int(item)


def scaled_down(config: PreTrainedConfig, reach: int | None = None) -> PreTrainedConfig:
    """Return a copy of a config with small sizes, short thresholds, and few layers that include each kind of layer.

    Every length of `length_thresholds` is at most `SMALL` in the copy. The exception is the original length of rotary
    frequencies that depend on the longest sequence: no batch goes beyond it.

    Args:
        config: Config of any model; not changed.
        reach: Longest sequence of a request, in tokens; thresholds of this length or more are kept. None for no limit.

    Returns:
        A config of the same class.
    """
    small = copy.deepcopy(config)
    vars(small).pop("quantization_config", None)
    text = text_config(small)
    for value in (small, *vars(small).values()):
        if isinstance(value, PreTrainedConfig) and value is not text:
            _shrink_sizes(value)
    different = vars(text).pop("_heterogeneity_spec", None)
    sizes = {name: value for name, value in vars(text).items() if isinstance(value, int)}
    count, kept = _layers_kept(text)
    before = _layer_count(text)
    _shrink_sizes(text)
    _shrink_layers(text, before, count, kept)
    _shrink_lengths(text, {name for name, value in length_thresholds(text).items() if reach and value >= reach})
    _shrink_rope(text, reach)
    if different is not None:
        layers = range(count) if kept is None else kept
        overrides = different.per_layer_overrides
        text.per_layer_config = {
            new: {name: _small_override(text, name, value, sizes) for name, value in overrides[layer].items()}
            for new, layer in enumerate(layers)
            if layer in overrides
        }
    return small


def _set(config: Any, name: str, value: Any) -> None:
    """Set a field without the class's own checks, which read fields that are not set yet."""
    vars(config)[name] = value


def _shrink_sizes(config: Any) -> None:
    special = FAMILIES.get(getattr(config, "model_type", ""), {})
    targets = {**FIELDS, **{name: value for name, value in special.items() if type(value) is int}}
    rotary = _number(config, "qk_rope_head_dim")
    if rotary is not None and rotary == _number(config, "head_dim"):
        targets["head_dim"] = targets["qk_rope_head_dim"]  # another name for the same size
    heads = _number(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    for name, value in list(vars(config).items()):
        target = targets.get(name)
        if name.endswith("token_id") and isinstance(value, (int, list)):
            _set(config, name, targets.get(name, VOCAB - 1))
        elif type(value) is int and "vocab_size" in name:
            _set(config, name, min(value, VOCAB))
        elif type(value) is not int or type(target) is not int or _is_length(name) or name in _LAYER_COUNTS:
            continue
        elif name in _KV_HEADS:
            _set(config, name, 4 if value == heads else min(2, value))
        elif name in _STATE_GROUPS:
            _set(config, name, min(2, value))
        elif value > target:
            _set(config, name, target)
    inner = [_number(config, name) for name in ("mamba_n_heads", "mamba_d_head")]
    if vars(config).get("mamba_d_ssm") and None not in inner:
        _set(config, "mamba_d_ssm", inner[0] * inner[1])  # type: ignore[operator]


def _small_override(config: Any, name: str, value: Any, before: dict[str, int]) -> Any:
    """Scale a layer's override: larger, equal or smaller than the config's own value, as it was before."""
    if type(value) is not int or name not in before or not isinstance(vars(config).get(name), int):
        return value
    if value == before[name]:
        return vars(config)[name]
    return 2 * vars(config)[name] if value > before[name] else max(1, vars(config)[name] // 2)


def _number(config: Any, *names: str) -> int | None:
    """The value of the first of these fields that holds a whole number."""
    return next((value for name in names if type(value := vars(config).get(name)) is int), None)


def _layer_count(config: Any) -> int:
    return _number(config, *_LAYER_COUNTS) or 0


def _per_layer(config: Any, count: int) -> dict[str, list[Any]]:
    """Fields with one entry per layer."""
    return {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count > 2 and not _are_indices(name, value)
    }


def _are_indices(name: str, value: Any) -> bool:
    """Whether a list holds layer indices."""
    return bool(re.search(r"_layers$|_ids$|_idxs$|_indices$|^moe_layers", name)) and list(value) == sorted(
        {item for item in value if isinstance(item, int)}
    )


def _layers_kept(config: Any) -> tuple[int, list[int] | None]:
    """Number of layers in a small copy, and their indices; None for the first layers."""
    count = _layer_count(config)
    if count <= 2:
        return count, None
    lists = _per_layer(config, count)
    kinds = [tuple(str(values[layer]) for values in lists.values()) for layer in range(count)]
    first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    needed = max(first.values()) + 1
    for name, value in vars(config).items():
        periodic = re.search(r"period|interval|every|_pattern$|sparse_step|attn_layer_offset", name)
        if periodic and isinstance(value, int) and not isinstance(value, bool) and 0 < value < count:
            needed = max(needed, value + 1 if "offset" in name else value)
        elif isinstance(value, (list, tuple)) and value and _are_indices(name, value):
            missing = [layer for layer in range(count) if layer not in value]
            needed = max(needed, value[0] + 1, missing[0] + 1 if missing else 0)
        elif isinstance(value, (list, tuple)) and len(value) < count and all(isinstance(item, str) for item in value):
            needed = max(needed, len(value))  # a repeating pattern
    shared = _number(config, "num_kv_shared_layers") or 0
    if shared:
        needed = 2 * needed
    if needed <= _MOST_LAYERS:
        return min(count, max(2, needed)), None
    layers = sorted(first.values())[:_MOST_LAYERS]
    return len(layers), layers


def _shrink_layers(config: Any, before: int, count: int, kept: list[int] | None) -> None:
    layers = list(range(count)) if kept is None else kept
    for name, values in _per_layer(config, before).items():
        _set(config, name, [_small_entry(name, values[layer]) for layer in layers])
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and value and _are_indices(name, value):
            _set(config, name, [new for new, layer in enumerate(layers) if layer in value])
    for name in _LAYER_COUNTS:
        if vars(config).get(name) is not None:
            _set(config, name, count)
    for name in ("num_kv_shared_layers", "first_k_dense_replace", "num_dense_layers"):
        value = vars(config).get(name)
        if isinstance(value, int) and value:
            _set(config, name, min(value, count // 2 if "shared" in name else 1))


def _small_entry(name: str, value: Any) -> Any:
    if "heads" in name and isinstance(value, int):
        return min(value, 4)
    return min(value, FIELDS[name]) if isinstance(value, int) and name in FIELDS else value


def _shrink_lengths(config: Any, beyond: set[str]) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, bool) or name in beyond:
            continue
        if _CONTEXTS.search(name) and isinstance(value, int) and value > 0:
            _set(config, name, _CONTEXT)
        elif isinstance(value, dict) and _is_length(name):
            _set(config, name, {key: _small_length(key, item) for key, item in value.items()})
        elif name in _UNITS:
            _set(config, name, min(value, 2))
        elif isinstance(value, (int, float)) and _is_length(name):
            _set(config, name, _small_length(name, value))


def _small_length(name: str, value: Any) -> Any:
    if not isinstance(value, (int, float)) or value <= _SMALL_UNIT:
        return value
    return type(value)(_SMALL_UNIT if re.search("block_size|compress|floor", name) else SMALL)


def _shrink_rope(config: Any, reach: int | None) -> None:
    head = _number(config, "qk_rope_head_dim", "head_dim")
    if head is None:
        heads = _number(config, "num_attention_heads", "n_head") or 1
        head = (_number(config, "hidden_size", "n_embd") or heads) // heads
    for field in ("rope_parameters", "rope_scaling"):
        rope = vars(config).get(field)
        if isinstance(rope, dict):
            _set(config, field, _small_rope(rope, head, reach))
    original = vars(config).get("original_max_position_embeddings")
    if isinstance(original, int):
        _set(config, "original_max_position_embeddings", _CONTEXT)


def _small_rope(rope: dict[str, Any], head: int, reach: int | None) -> dict[str, Any]:
    small: dict[str, Any] = {}
    scaled = any(name.endswith("_beta") and "scaling" in name and value for name, value in rope.items())
    for name, value in rope.items():
        if isinstance(value, dict):
            small[name] = _small_rope(value, head, reach)
        elif name == "original_max_position_embeddings" and isinstance(value, int):
            small[name] = min(value, _SMALL_UNIT) if scaled and not (reach and value >= reach) else _CONTEXT
        elif name == "max_position_embeddings" and isinstance(value, int):
            small[name] = _CONTEXT
        elif name in ("long_factor", "short_factor") and isinstance(value, list):
            dim = int(head * float(rope.get("partial_rotary_factor") or 1.0))
            small[name] = (value * dim)[: dim // 2]
        elif name == "mrope_section" and isinstance(value, list) and sum(value):
            dim = int(head * float(rope.get("partial_rotary_factor") or 1.0)) // 2
            part = [max(1, dim * item // sum(value)) for item in value]
            part[0] += dim - sum(part)
            small[name] = part
        else:
            small[name] = value
    return small
