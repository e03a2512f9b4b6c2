"""A copy of the module tree that shares every weight with the user's model, and whose config is its own.

The user's object is read once, here, and never written: their config, attention implementation, mode, hooks and
outputs stay as they are, and they can go on training or generating with it.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from transformers import PreTrainedModel

from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.tensor_parallel.shared_modules import parallel_modules, unique_objects

logger = logging.getLogger(__name__)

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


# Set on the instance (torch.compile, a decorator, transformers' own batching), these are bound to the original, and
# stay there.
_OWN_CALLS = ("forward", "_compiled_call_impl", "_compiled_call", "_cached_continuous_batching_manager")


def make_view(model: PreTrainedModel, attn_implementation: str | None) -> PreTrainedModel:
    """A shared-weight copy of `model` in eval mode.

    Args:
        model: The user's model; not changed.
        attn_implementation: Name of the attention for the copy's config; None keeps the model's own.

    Raises:
        UnsupportedModelError: The model is spread by accelerate over several devices, or lies on the meta device.
    """
    name = type(model).__name__
    dispatched = [module_name for module_name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if dispatched:
        raise UnsupportedModelError(
            f"{name} is not served: accelerate moves its weights or inputs between devices (device_map). "
            "Load the model onto one device, for example device_map={'': 0}."
        )
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise UnsupportedModelError(
            f"{name} is not served: its weights lie on {sorted(map(str, devices))}; move the model to one device."
        )
    # Forward hooks belong to the user's own forwards, and would see packed tokens here.
    hooked = [n or name for n, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    if hooked and attn_implementation is not None:
        logger.warning(
            "forward hooks on %s do not run inside the engine of hf_async_batching; use plain `model.generate` "
            "where they must",
            ", ".join(hooked[:5]) + (" and others" if len(hooked) > 5 else ""),
        )
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    shared = {id(one): one for one in (*parallel_modules(model), *unique_objects(model))}
    memo.update(shared)
    for module in model.modules():
        for attribute in _HOOKS:
            hooks = module.__dict__.get(attribute)
            if hooks:
                memo[id(hooks)] = type(hooks)()
        for attribute in _OWN_CALLS:
            if module.__dict__.get(attribute) is not None:
                memo[id(module.__dict__[attribute])] = None
    try:
        view = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{name} is not served: its modules cannot be copied ({error}); remove what was attached to them"
        ) from error
    for original, copied in zip(model.modules(), view.modules(), strict=True):
        if id(original) in shared:
            continue  # the copy has the original
        for attribute in _OWN_CALLS:
            if original.__dict__.get(attribute) is not None:
                copied.__dict__.pop(attribute, None)
        copied.training = False
    if attn_implementation is not None:
        set_attention(view, attn_implementation)
    return view


def set_attention(view: PreTrainedModel, attn_implementation: str) -> None:
    """Make every config in the view name `attn_implementation`."""
    for module in view.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = attn_implementation


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens the model was built for (`max_position_embeddings`); None where its config does not say.

    Models whose rotary frequencies depend on the longest sequence of the batch (dynamic NTK, LongRoPE) count up to
    their original length only: beyond it, one row would change the others.
    """
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if batch_dependent_rope(model):
        length = rope.get("original_max_position_embeddings") or length
    return int(length) if length is not None else None


def batch_dependent_rope(model: PreTrainedModel) -> bool:
    """Whether rotary frequencies depend on the longest sequence in the batch."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind = str(rope.get("rope_type", "default"))
    return "dynamic" in kind or kind == "longrope"
