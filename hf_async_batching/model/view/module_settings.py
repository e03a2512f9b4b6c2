"""Read the numbers, flags and names that a forward takes from its modules and its config, to see when they change.

Tensors and objects in plain attributes, dicts and sets are left out: several families write to them in every forward.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import numpy
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

_SIMPLE = frozenset({
    type(None), bool, int, float, complex, str, torch.dtype, torch.device,
    numpy.float64, numpy.float32, numpy.int64, numpy.bool_,
})  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)

# Attributes that a forward itself changes, or that do not matter to an engine's view.
_OF_ROTARY = ("max_seq_len_cached", "long_inv_freq")  # follow the lengths seen; in some families per layer type
_UNREAD = {
    *vars(nn.Module()),
    "_output_capturing_hooks_installed",  # set by a forward with `output_hidden_states=True`
    "gradient_checkpointing",  # used in training only
    "_gradient_checkpointing_func",
    "_require_grads_hook",
    "_require_grads_hooks",
    "generate",
    "forward",  # handled with the hooks; see `module_calls`
}
_UNREAD_KINDS = (PreTrainedConfig, GenerationConfig, dict, set)

# Config fields that an engine's view does not read; the engine passes `use_cache` itself.
_UNREAD_FIELDS = {"use_cache", "id2label", "label2id", "_name_or_path"}

_Reader = Callable[[dict[str, Any]], Sequence[Any]]

# Readers by class and number of attributes. Reading 400 modules attribute by attribute takes longer than the rest of a
# submission. Modules of one class with equally many attributes have the same ones, or a reader misses one of its own.
_readers: dict[tuple[type, int], _Reader] = {}
_MAX_READERS = 4096


def module_settings(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """Return the modules' own attributes, without those that a forward changes.

    Numbers, flags, names and lists of them are returned by value, functions by weak reference, all else as None.
    """
    values: list[Any] = []
    for module in modules:
        attributes = module.__dict__
        reader = _readers.get((type(module), len(attributes)))
        if reader is None:
            reader = _remember(type(module), attributes)
        try:
            values += reader(attributes)
        except KeyError:
            values += _reader(attributes)(attributes)
    return _frozen_all(values)


def config_settings(config: Any) -> tuple[Any, ...]:
    """Return the fields of a config, and of the configs in it, by value."""
    if not isinstance(config, PreTrainedConfig):
        return ()
    return tuple([(name, _frozen_field(value)) for name, value in vars(config).items() if name not in _UNREAD_FIELDS])


def _remember(kind: type, attributes: dict[str, Any]) -> _Reader:
    if len(_readers) >= _MAX_READERS:  # some code makes classes at run time
        _readers.clear()
    reader = _readers[kind, len(attributes)] = _reader(attributes)
    return reader


def _reader(attributes: dict[str, Any]) -> _Reader:
    names = [
        name
        for name, value in attributes.items()
        if name not in _UNREAD and not name.endswith(_OF_ROTARY) and not isinstance(value, _UNREAD_KINDS)
    ]
    if len(names) > 1:
        return itemgetter(*names)
    return lambda attributes: [attributes[name] for name in names]


def _frozen_all(values: list[Any]) -> tuple[Any, ...]:
    if _SIMPLE.issuperset(map(type, values)):
        return tuple(values)
    return tuple([value if type(value) in _SIMPLE else _frozen(value) for value in values])


def _frozen(value: Any) -> Any:
    if type(value) in (list, tuple):
        return _frozen_all([*value])
    if isinstance(value, _FUNCTIONS):
        # A weak reference, not the identity: another object can get the memory of one that is gone.
        return weakref.ref(value)
    return None


def _frozen_field(value: Any) -> Any:
    kind = type(value)
    if kind in _SIMPLE:
        return value
    if kind in (list, tuple):
        return tuple([_frozen_field(item) for item in value])
    if kind is dict:
        return tuple([(key, _frozen_field(item)) for key, item in value.items()])
    return config_settings(value)
