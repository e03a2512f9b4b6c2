"""What tells whether an engine's view is still the model: looked at when a request comes, never hooked in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.model_view import batch_dependent_rope
from hf_async_batching.quantization import is_wrapped


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's modules, tensors and adapters at one moment. Two that are equal can share a view.

    Attributes:
        modules: Identities of all modules, in order.
        tensors: By identity, where the memory of each parameter and buffer begins, and its dtype. A quantized weight
            counts as the tensors that it is made of.
        adapters: PEFT's adapters, which are switched, scaled and merged by plain attributes.
        changes: How often torch has seen the tensors changed in place, by an optimizer or `load_state_dict`: whether
            the same tensors hold other values. It is blind to writes through `.data` and to tensors made in inference
            mode.
    """

    modules: tuple[int, ...]
    tensors: dict[int, tuple[int, torch.dtype]]
    adapters: tuple[Any, ...]
    changes: int = field(compare=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Weights:
        """The model as it is now.

        Raises:
            UnsupportedArgumentError: PEFT chose adapters for this call alone.
        """
        # Rotary frequencies that follow the longest sequence are buffers that every forward of the user's may replace.
        with_buffers = not batch_dependent_rope(model)
        modules: dict[int, None] = {}
        adapters: list[Any] = []
        tensors: dict[int, torch.Tensor] = {}
        stack: list[Any] = [model]
        while stack:
            module = stack.pop()
            if module is None or id(module) in modules:
                continue
            modules[id(module)] = None
            attributes = module.__dict__
            for tensor in attributes["_parameters"].values():
                tensors[id(tensor)] = tensor
            if with_buffers:
                for tensor in attributes["_buffers"].values():
                    tensors[id(tensor)] = tensor
            if "merged_adapters" in attributes or hasattr(type(module), "merged_adapters"):
                adapters.append(_adapter_state(module))
            stack += attributes["_modules"].values()
        tensors.pop(id(None), None)
        plain = [part for tensor in tensors.values() for part in _parts(tensor)]
        return cls(
            tuple(modules),
            {id(tensor): (tensor.data_ptr(), tensor.dtype) for tensor in plain},
            tuple(adapters),
            _count_changes(plain),
        )

    def placed_as(self, later: Weights) -> Weights:
        """These modules and adapters, with the tensors of `later`."""
        return replace(later, modules=self.modules, adapters=self.adapters)

    def moved_from(self, before: Weights | None) -> bool:
        """Whether tensors that the view shares have other memory than before (`model.to`, an assigned `.data`)."""
        old = before.tensors if before is not None else {}
        return any(key in old and old[key] != place for key, place in self.tensors.items())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with memory of their own that a tensor is made of: itself, or what a quantized one wraps."""
    if type(tensor) is nn.Parameter or not is_wrapped(tensor):
        return [tensor]
    wrapped: Any = tensor
    inner = [getattr(wrapped, name) for name in wrapped.__tensor_flatten__()[0]]
    # A tensor that is spread over ranks names its mesh, too.
    return [part for one in inner if isinstance(one, torch.Tensor) for part in _parts(one)]


def _adapter_state(module: Any) -> tuple[Any, ...]:
    for hook in module._forward_pre_hooks.values():
        # PEFT takes these arguments out of the call and leaves them in hooks, which a view does not run.
        for argument in ("adapter_names", "alora_offsets"):
            if isinstance(hook, partial) and argument in hook.keywords:
                raise UnsupportedArgumentError(
                    f"`{argument}` (adapters for one call) is not served; choose with `set_adapter`, or use plain "
                    "`model.generate` for this call"
                )
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
    except RuntimeError:  # tensors made in inference mode count nothing
        return sum([tensor._version for tensor in tensors if not tensor.is_inference()])
