"""Decide which hooks and replaced forwards of a model's modules a view runs, and refuse the others.

The engine computes many requests in one sequence [1, tokens, hidden], and prompts in pieces. A hook that looks at the
last position, the length or the batch would see something else there than in `generate`. The engine cannot tell from
outside whether a hook does so. The hook's author states that it does not, with `per_token`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules import module as torch_module

from hf_async_batching.errors import UnsupportedArgumentError, UnsupportedModelError
from hf_async_batching.model.foreign_kernels.kernel_wrappers import is_rebound

CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_KINDS = {"_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook"}

# Attributes in which torch keeps the hooks that run on every module.
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")

# Library hooks that do not change the output of inference: function name and the start of its module name.
NEUTRAL_HOOKS = {
    "output_capturing_hook": "transformers.",  # left by a forward with `output_hidden_states=True`
    "make_inputs_require_grads": "transformers.",  # `enable_input_require_grads`
    "make_inputs_require_grad": "peft.",
    "neftune_post_forward_hook": "transformers.",  # adds noise in training only
    "_fw_pre_hook": "torch.utils.module_tracker",  # torch's counter of operations
    "_fw_post_hook": "torch.utils.module_tracker",
}


def per_token(function: Callable[..., Any]) -> PerToken:
    """Mark a hook or a forward that computes each token independently, so that the engine can run it.

    The usual case is a steering vector: `layer.register_forward_hook(per_token(lambda module, args, out: out + v))`.
    The engine calls such a hook with the tokens of many requests in one sequence: [1, tokens, hidden] where `generate`
    has [batch, length, hidden]. The result for a token must not depend on the other tokens, on the batch, on the
    length or on earlier calls. The hook may read values that change between calls; running requests see the new value.

    Args:
        function: A forward hook, a forward pre-hook, or a `forward` to be set on a module.

    Returns:
        The marked function; it can be registered on any module.
    """
    return PerToken(function)


class PerToken:
    """A marked function; see `per_token`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function and return its result."""
        return self.function(*args, **kwargs)


def is_own_hook(module: nn.Module, hook: Any) -> bool:
    """Whether a hook belongs to the module's own computation: a method of it, or torch's pruning or weight norm."""
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return getattr(hook, "__self__", None) is module or where.startswith("torch.nn.utils")


def is_neutral(hook: Any) -> bool:
    """Whether a hook comes from a library, changes no output, and need not run."""
    where = NEUTRAL_HOOKS.get(getattr(hook, "__name__", ""))
    return where is not None and str(hook.__module__).startswith(where)


def innermost_forward(module: nn.Module) -> Any:
    """The forward that is set on the instance, without the wrappers of accelerate and torch.compile."""
    attributes = module.__dict__
    forward: Any = attributes.get("_old_forward") if "_hf_hook" in attributes else attributes.get("forward")
    while hasattr(forward, "_torchdynamo_orig_callable"):
        forward = forward._torchdynamo_orig_callable
    return forward


def goes_along(module: nn.Module, forward: Any) -> bool:
    """Whether a copy keeps a forward that is set on a module: a method of the module, or a marked function."""
    return getattr(forward, "__self__", None) is module or isinstance(forward, PerToken)


def state_of_calls(model: nn.Module, modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """Describe the hooks and forwards that an engine must run; equal values mean that nothing has changed.

    Args:
        model: The model, for messages.
        modules: The modules of the model that have hooks or a forward of their own.

    Raises:
        UnsupportedModelError: A user's hook or forward is not marked by `per_token`.
        UnsupportedArgumentError: PEFT chose adapters for this call only.
    """
    found: list[Any] = []
    for module, kind, key, hook in _hooks(modules):
        if not (is_own_hook(module, hook) or isinstance(hook, PerToken)):
            _refuse_adapters_of_a_call(hook)
            raise _refusal(model, f"the {_KINDS[kind]} `{_name(hook)}` on `{_path(model, module)}`")
        found.append((id(module), kind, key))
    for module in modules:
        forward = module.__dict__.get("forward")
        if forward is None or _is_parallel(module) or isinstance(module, OptimizedModule):
            continue
        innermost = innermost_forward(module)
        if innermost is not None and not goes_along(module, innermost):
            raise _refusal(model, f"the forward `{_name(innermost)}` that is set on `{_path(model, module)}`")
        # A weak reference, not the identity: another object can get the memory of one that is gone.
        found.append((id(module), _reference(forward)))
    for kind in _GLOBAL_HOOKS:
        for key, hook in getattr(torch_module, kind).items():
            if is_neutral(hook):
                continue
            if not isinstance(hook, PerToken):
                raise _refusal(model, f"the hook `{_name(hook)}` on all modules")
            found.append((kind, key))
    return tuple(found)


def refuse_unmarked_calls(model: nn.Module) -> None:
    """Refuse a model with a user's hook or forward that the engine cannot run.

    Raises:
        UnsupportedModelError: The message names the hook, its module and the remedy.
    """
    state_of_calls(model, list(model.modules()))


def runs_user_code(model: nn.Module) -> bool:
    """Whether a model or a view runs hooks or forwards marked by `per_token`: they run uncompiled, at every step."""
    modules = list(model.modules())
    everywhere = [hook for kind in _GLOBAL_HOOKS for hook in getattr(torch_module, kind).values()]
    hooks = [hook for _, _, _, hook in _hooks(modules)]
    forwards = [innermost_forward(module) for module in modules]
    return any(isinstance(one, PerToken) for one in (*everywhere, *hooks, *forwards))


def has_replaced_forwards(view: nn.Module) -> bool:
    """Whether any module of a view has a forward other than its class's."""
    return any("forward" in vars(module) and not is_rebound(vars(module)["forward"]) for module in view.modules())


def _refuse_adapters_of_a_call(hook: Any) -> None:
    """Refuse adapters for one call: PEFT takes these arguments out of the call and keeps them in hooks."""
    for argument in ("adapter_names", "alora_offsets"):
        if isinstance(hook, partial) and argument in hook.keywords:
            raise UnsupportedArgumentError(
                f"`{argument}` (adapters for one call) is not served; choose with `set_adapter`, or use plain "
                "`model.generate` for this call"
            )


def _hooks(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, int, Any]]:
    """Module, kind, key and function of each hook that the engine considers."""
    for module in modules:
        if _is_parallel(module):
            continue
        for kind in CALL_HOOKS:
            for key, hook in module.__dict__[kind].items():
                if not is_neutral(hook):
                    yield module, kind, key, hook


def _is_parallel(module: nn.Module) -> bool:
    """Whether transformers has sharded a layer over ranks. A view then holds the layer itself, with its hooks."""
    return bool(module.__dict__.get("_is_hooked"))


def _reference(forward: Any) -> Any:
    try:
        return weakref.ref(forward)
    except TypeError:  # the object does not allow weak references
        return id(forward)


def _name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module) or type(model).__name__


def _refusal(model: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} is not served: {what} would see other shapes than in `generate` (the tokens of many "
        "requests in one sequence). If it computes each token independently, as a steering vector does, mark it: "
        "`hf_async_batching.per_token(...)`. Otherwise remove it for this call, or use plain `model.generate` "
        '(`on_unsupported="generate"`).'
    )
