"""Let a view's layers with states work over packed tokens: their functions over the tokens' order are replaced.

A layer with linear attention, a state-space scan or a convolution projects each token by itself, and mixes tokens in a
few functions of transformers alone: those that kernels of other packages stand in for. So the layer's own `forward`
runs over the packed tokens of many rows, with functions of ours in place of these (`recurrent.calls`), which know the
rows and keep their states. Its cache argument is an object that holds nothing.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.model.foreign_kernels.kernel_wrappers import is_rebound, with_globals
from hf_async_batching.recurrent.calls import REPLACED
from hf_async_batching.recurrent.step import Functions, enter_layer

_CACHES = ("cache", "cache_params", "past_key_values")


class NoStates:
    """What a layer with states takes for its cache. It lets the layer compute as at the start of a sequence."""

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        """None: the states are not handed out."""

    def get_recurrent_state(self, *_: Any, **__: Any) -> None:
        """None: the states are not handed out."""

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """False."""
        return False

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        """False."""
        return False

    def update_conv_state(self, conv_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The step's own inputs."""
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Nothing is kept: our functions have kept it, and return an empty state.

        Raises:
            UnsupportedModelError: The state is not empty: a function that is not ours has computed it.
        """
        if recurrent_states.numel():
            raise UnsupportedModelError("its recurrent states come from a function that is not known here")
        return recurrent_states


_NO_STATES = NoStates()


class Mixers:
    """The layers with states of a view.

    Args:
        view: A view that belongs to the engine. Layers with states get another `forward`.

    Attributes:
        modules: The layers.
        names: Names of the functions that were replaced.
        layers: Index and original functions of each layer, by the address of its tag.
    """

    def __init__(self, view: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self.names: set[str] = set()
        self.layers: dict[int, tuple[int, Functions]] = {}
        made: dict[types.CodeType, Callable[..., Any]] = {}
        found = [(module, *pair) for module in view.modules() if (pair := _functions_of(module)) is not None]
        # 64 bytes each, because compiled code copies inputs whose alignment differs from the example's.
        self._tags = tags = torch.zeros(len(found), 16, dtype=torch.int32, device=next(view.parameters()).device)
        for index, (module, method, functions) in enumerate(found):
            module._state_tag = tags[index]
            code = method.__code__
            if code not in made:
                made[code] = _over_packed_tokens(method, functions)
            module.forward = types.MethodType(made[code], module)
            names = {name: inspect.unwrap(function).__name__ for name, function in functions.items()}
            self.modules.append(module)
            self.names.update(names.values())
            originals = {names[name]: function for name, function in functions.items()}
            self.layers[tags[index].data_ptr()] = index, originals


def _functions_of(module: nn.Module) -> tuple[types.FunctionType, Functions] | None:
    """A layer's forward and the functions in it to replace, by the name in its globals; None for other modules."""
    own = vars(module).get("forward")
    if own is not None and not is_rebound(own):
        return None
    method = inspect.unwrap(own.__func__ if own is not None else type(module).forward)
    if not isinstance(method, types.FunctionType) or not method.__module__.startswith("transformers.models."):
        return None
    called = {name: method.__globals__.get(name) for name in method.__code__.co_names}
    functions: Functions = {
        name: value
        for name, value in called.items()
        if callable(value) and getattr(inspect.unwrap(value), "__name__", "") in REPLACED
    }
    takes_cache = any(name in inspect.signature(method).parameters for name in _CACHES)
    return (method, functions) if functions and takes_cache else None


def _over_packed_tokens(method: types.FunctionType, functions: Functions) -> Callable[..., Any]:
    """A forward that calls ours in place of `functions`; one for all layers of a class, so that they share code."""
    replaced = {name: REPLACED[inspect.unwrap(function).__name__] for name, function in functions.items()}
    packed = with_globals(method, replaced)
    parameters = inspect.signature(method).parameters
    cache_name = next(name for name in _CACHES if name in parameters)
    passes_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs[cache_name] = _NO_STATES
        if passes_on:
            kwargs["state_tag"] = self._state_tag
        if not torch.compiler.is_dynamo_compiling():
            enter_layer(self._state_tag)
        return packed(self, *args, **kwargs)

    return forward
