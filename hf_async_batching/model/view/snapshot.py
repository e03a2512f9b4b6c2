"""Compare a model with the state that an engine's view was made of; a request triggers it, no hook is installed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_async_batching.model.view.model_view import batch_dependent_rope
from hf_async_batching.model.view.module_calls import state_of_calls
from hf_async_batching.model.view.module_settings import config_settings, module_settings
from hf_async_batching.model.view.quantization import is_wrapped


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """A model's modules, tensors and adapters at one moment. Models with equal snapshots can share a view.

    Attributes:
        modules: Identities of all modules, in order.
        tensors: Start address and dtype of each parameter and buffer, by identity. A quantized weight counts as the
            tensors that it wraps.
        adapters: State of PEFT's adapters, which plain attributes switch, scale and merge.
        calls: Hooks and forwards on modules that a view runs; see `module_calls`.
        settings: Numbers, flags and names in modules and in the config, by value; see `module_settings`.
        changes: How often torch has seen the tensors changed in place, by an optimizer or `load_state_dict`. It tells
            whether the same tensors hold new values. torch does not count writes through `.data` or to tensors made
            in inference mode.
    """

    modules: tuple[int, ...]
    tensors: dict[int, tuple[int, torch.dtype]]
    adapters: tuple[Any, ...]
    calls: tuple[Any, ...]
    settings: tuple[Any, ...]
    changes: int = field(compare=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSnapshot:
        """Take a snapshot of the model as it is now.

        Raises:
            UnsupportedArgumentError: PEFT chose adapters for this call only.
            UnsupportedModelError: A user's hook or forward on the model cannot run in a view.
        """
        # If rotary frequencies follow the longest sequence, they are buffers that any forward of the user may replace.
        with_buffers = not batch_dependent_rope(model)
        modules: dict[int, nn.Module] = {}
        adapters: list[Any] = []
        tensors: dict[int, torch.Tensor] = {}
        called: list[nn.Module] = []
        stack: list[Any] = [model]
        while stack:
            module = stack.pop()
            if module is None or id(module) in modules:
                continue
            modules[id(module)] = module
            attributes, of_class = module.__dict__, module.__class__
            for tensor in attributes["_parameters"].values():
                tensors[id(tensor)] = tensor
            if with_buffers and attributes["_buffers"]:
                for tensor in attributes["_buffers"].values():
                    tensors[id(tensor)] = tensor
            if "merged_adapters" in attributes or _computes_merged_adapters(of_class):
                adapters.append(_adapter_state(module))
            if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "forward" in attributes:
                called.append(module)
            if attributes["_modules"]:
                stack += attributes["_modules"].values()
        tensors.pop(id(None), None)
        kind = nn.Parameter
        plain = [p for tensor in tensors.values() for p in ([tensor] if type(tensor) is kind else _parts(tensor))]
        return cls(
            modules=tuple(modules),
            tensors={id(tensor): (tensor.data_ptr(), tensor.dtype) for tensor in plain},
            adapters=tuple(adapters),
            calls=state_of_calls(model, called),
            settings=(module_settings(modules.values()), config_settings(getattr(model, "config", None))),
            changes=_count_changes(plain),
        )

    def placed_as(self, later: ModelSnapshot) -> ModelSnapshot:
        """Return this snapshot with the tensors of `later`."""
        return replace(self, tensors=later.tensors, changes=later.changes)

    def moved_from(self, before: ModelSnapshot | None) -> bool:
        """Whether tensors that the view shares have moved to other memory (`model.to`, an assigned `.data`)."""
        old = before.tensors if before is not None else {}
        return any(key in old and old[key] != place for key, place in self.tensors.items())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that own a tensor's memory: the tensor itself, or those that a quantized tensor wraps."""
    if not is_wrapped(tensor):
        return [tensor]
    wrapped: Any = tensor
    inner = [getattr(wrapped, name) for name in wrapped.__tensor_flatten__()[0]]
    # A tensor that is sharded over ranks also lists its mesh.
    return [part for one in inner if isinstance(one, torch.Tensor) for part in _parts(one)]


@lru_cache(maxsize=1024)
def _computes_merged_adapters(kind: Any) -> bool:
    return hasattr(kind, "merged_adapters")


def _adapter_state(module: Any) -> tuple[Any, ...]:
    scaling = getattr(module, "scaling", None)
    return (
        id(module),
        module.disable_adapters,
        tuple(module.active_adapters),
        tuple(module.merged_adapters),
        tuple(scaling.items()) if isinstance(scaling, dict) else scaling,
    )


def _count_changes(tensors: list[torch.Tensor]) -> int:
    try:
        return sum([tensor._version for tensor in tensors])
    except RuntimeError:  # tensors made in inference mode have no version counter
        return sum([tensor._version for tensor in tensors if not tensor.is_inference()])
