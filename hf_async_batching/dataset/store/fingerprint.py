"""Fingerprints of everything that decides a run's outputs. A later run continues only with an equal fingerprint.

A fingerprint is a dictionary of plain values. Fingerprints are compared entry by entry, so that a difference has a
name.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

_SAMPLES = 16
_VALUES = (str, bytes, int, float, complex, type(None), torch.dtype, list, tuple, dict, set, frozenset)

Fingerprint = dict[str, Any]


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """List the differences, one line each: the entry's name, its earlier value, and its value now."""
    lines = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{name}.{line}" for line in differences(old, new)]
        else:
            lines.append(f"{name}: {_shown(old)} before, {_shown(new)} now")
    return lines


def digest(*parts: bytes | str) -> str:
    """Return a short checksum of the parts."""
    checksum = hashlib.blake2b(digest_size=12)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        checksum.update(len(content).to_bytes(8, "little"))
        checksum.update(content)
    return checksum.hexdigest()


def fingerprint_of_model(model: PreTrainedModel) -> Fingerprint:
    """Return class, config, dtype, and a checksum of a few values of each weight."""
    config = model.config.to_diff_dict()
    # Loading and saving sets some of these fields.
    for name in ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": digest(_plain(config)),
        "weights": _weights(model),
    }


def fingerprint_of_tokenizer(tokenizer: Any) -> Fingerprint | None:
    """Return class, vocabulary, rules and chat template; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else _plain(sorted(tokenizer.get_vocab().items()))
    return {
        "class": type(tokenizer).__name__,
        "content": digest(content),
        "special_tokens": digest(_plain(tokenizer.special_tokens_map)),
        "chat_template": digest(_plain(getattr(tokenizer, "chat_template", None))),
    }


def fingerprint_of_config(model: PreTrainedModel, config: GenerationConfig | None, arguments: Any) -> Fingerprint:
    """Return the fields of the generation config for a row without its own parameters."""
    used = (config if config is not None else model.generation_config).to_diff_dict()
    used.update({name: value for name, value in arguments.items() if value is not None})
    for name in ("transformers_version", "_from_model_config"):
        used.pop(name, None)
    return {name: _plain(value) for name, value in sorted(used.items())}


def fingerprint_of_function(function: Callable[..., Any]) -> str:
    """Return a checksum of a function's code, defaults and captured values. It is equal in every process."""
    return digest(*_parts_of_function(function))


def _parts_of_function(function: Any) -> list[str | bytes]:
    if isinstance(function, functools.partial):
        return [*_parts_of_function(function.func), _plain(function.args), _plain(function.keywords)]
    if isinstance(function, types.MethodType):
        return [*_parts_of_function(function.__func__), _plain(function.__self__)]
    code = getattr(function, "__code__", None)
    if code is None:
        # The callable is an object with __call__, or a C function.
        call = vars(type(function)).get("__call__")
        own = _parts_of_function(call) if hasattr(call, "__code__") else []
        return [getattr(function, "__qualname__", type(function).__qualname__), *own, _plain(function)]
    captured = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return [
        *_parts_of_code(code),
        _plain(function.__defaults__),
        _plain(function.__kwdefaults__),
        *[part for value in captured for part in _part_of_captured(value)],
    ]


def _part_of_captured(value: Any) -> list[str | bytes]:
    if isinstance(value, types.FunctionType):
        return _parts_of_function(value)
    # Other captured objects (a tokenizer, a lock, a counter) may change while the function stays the same.
    return [_plain(value) if isinstance(value, _VALUES) else type(value).__qualname__]


def _parts_of_code(code: types.CodeType) -> list[str | bytes]:
    parts: list[str | bytes] = [code.co_code, _plain(code.co_names)]
    for constant in code.co_consts:
        parts += _parts_of_code(constant) if isinstance(constant, types.CodeType) else [_plain(constant)]
    return parts


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None or True
    except ValueError:
        return False


def _plain(value: Any) -> str:
    """Write a value as a text that is the same in every process, without addresses and without hash order."""
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{_plain(k)}:{_plain(v)}" for k, v in value.items())) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(map(_plain, value))) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_plain, value)) + "]"
    if isinstance(value, _VALUES):
        return repr(value)
    attributes = getattr(value, "__dict__", None)
    return f"{type(value).__qualname__}{_plain(_simple(attributes)) if attributes else ''}"


def _simple(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, _VALUES)}


@torch.no_grad()
def _weights(model: PreTrainedModel) -> str:
    samples = []
    for parameter in model.parameters():
        local = getattr(parameter, "_local_tensor", parameter)  # a weight that is spread over ranks: this rank's part
        flat = local.detach().reshape(-1) if local.is_contiguous() else local.detach()[:1].reshape(-1)
        # A few elements are enough, because a change of the weights changes all elements.
        samples.append(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].double().cpu())
    return digest(torch.cat(samples).numpy().tobytes()) if samples else digest()


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
