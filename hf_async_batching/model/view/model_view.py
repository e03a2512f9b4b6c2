"""Make a view: a copy of the module tree that shares every weight with the user's model and has a config of its own.

The user's model is read once, here, and never written. Its config, attention implementation, mode, hooks and outputs
stay as they are, and the user can go on training it or generating with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import PreTrainedModel

from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.model.foreign_kernels.private_kernels import use_private_kernels
from hf_async_batching.model.foreign_kernels.reference_kernels import use_reference_kernels
from hf_async_batching.model.small.length_thresholds import follows_length, original_length, rope_dicts
from hf_async_batching.model.view.module_calls import (
    CALL_HOOKS,
    PerToken,
    goes_along,
    innermost_forward,
    is_own_hook,
    refuse_unmarked_calls,
)
from hf_async_batching.model.view.parallel_modules import parallel_modules, unique_objects
from hf_async_batching.model.view.quantization import adjust, alias, has_state
from hf_async_batching.model.view.rebind import rebind
from hf_async_batching.model.view.rescaling import rescale_as_generate_does
from hf_async_batching.model.view.shared_tensors import tensors_within

_HOOKS = (
    *CALL_HOOKS,
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)

# These attributes are set on an instance by torch.compile, accelerate or transformers' own batching. They are bound to
# the original module, so the copy does not get them.
_OWN_CALLS = (
    "forward",
    "_old_forward",
    "_hf_hook",
    "_compiled_call_impl",
    "_compiled_call",
    "_cached_continuous_batching_manager",
)


def make_view(
    model: PreTrainedModel, attn_implementation: str | None, *, reference_kernels: bool = False
) -> PreTrainedModel:
    """Return a copy of `model` in eval mode that shares its weights.

    The copy shares every tensor, including the tensors of quantized layers. It keeps the forwards and hooks that are
    the model's own methods, and those that are marked by `per_token`.

    Args:
        model: The user's model. It is not changed, except that weights which its own forward would rescale are
            rescaled first; see `rescaling`.
        attn_implementation: Name of the attention for the copy's config; None keeps the model's own.
        reference_kernels: Whether the copy computes with transformers' torch code in place of kernels of other
            packages.

    Raises:
        UnsupportedModelError: The model is split over devices or offloaded, lies on the meta device, has a user's hook
            or forward that is not marked, rescales its weights and is in training mode, or cannot be copied.
    """
    _refuse_split(model)
    refuse_unmarked_calls(model)
    rescale_as_generate_does(model)
    modules = list(model.modules())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors_within(model)}
    stateful = {id(parameter): parameter for parameter in model.parameters() if has_state(parameter)}
    memo.update((key, alias(parameter)) for key, parameter in stateful.items())
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        memo[id(quantizer)] = quantizer
    shared = {id(one): one for one in (*parallel_modules(model), *unique_objects(model))}
    memo.update(shared)
    for module in modules:
        if id(module) in shared:
            continue
        for attribute in _HOOKS:
            hooks = module.__dict__.get(attribute)
            if hooks:
                memo[id(hooks)] = type(hooks)()
        for attribute in _OWN_CALLS:
            if module.__dict__.get(attribute) is not None:
                memo[id(module.__dict__[attribute])] = None
    try:
        for module in reversed(modules):  # innermost modules first
            if isinstance(module, OptimizedModule):
                # The copy gets the module inside the wrapper: the engine compiles in its own way.
                memo[id(module)] = copy.deepcopy(module._orig_mod, memo)
        view = copy.deepcopy(model, memo)
        for key, parameter in stateful.items():
            vars(memo[key]).update(copy.deepcopy(vars(parameter), memo))
        copies = {id(module): memo[id(module)] for module in modules}
        for module in modules:
            if not isinstance(module, OptimizedModule) and id(module) not in shared:
                _finish(module, copies, memo)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not served: its modules cannot be copied ({error}). Remove the objects that "
            "were attached to its modules, or use plain `model.generate`."
        ) from error
    if batch_dependent_rope(model):
        _own_frequencies(view)
    if attn_implementation is not None:
        set_attention(view, attn_implementation)
    if reference_kernels:
        use_reference_kernels(view)
    elif next(view.parameters()).device.type == "cuda":
        use_private_kernels(view)
    return view


def _finish(original: nn.Module, copies: dict[int, Any], memo: dict[int, Any]) -> None:
    """Give a copied module those calls and hooks of the original that belong to the copy."""
    copied = copies[id(original)]
    for attribute in _OWN_CALLS:
        if original.__dict__.get(attribute) is not None:
            copied.__dict__.pop(attribute, None)
    forward = innermost_forward(original)
    if forward is not None and goes_along(original, forward):
        copied.forward = rebind(forward, copies)
    for attribute in CALL_HOOKS:
        for key, hook in original.__dict__[attribute].items():
            if is_own_hook(original, hook) or isinstance(hook, PerToken):
                # A user's hook is shared, not copied: it may read values that change later.
                copied.__dict__[attribute][key] = hook if isinstance(hook, PerToken) else copy.deepcopy(hook, memo)
                for flags in _HOOKS:
                    if flags.startswith(attribute + "_") and key in original.__dict__[flags]:
                        copied.__dict__[flags][key] = original.__dict__[flags][key]
    adjust(copied)
    copied.training = False


def _refuse_split(model: PreTrainedModel) -> None:
    name = type(model).__name__
    for module in model.modules():
        hook = module.__dict__.get("_hf_hook")
        if hook is not None and not all(map(_stays_in_place, _single_hooks(hook))):
            raise UnsupportedModelError(
                f"{name} is not served: accelerate moves its weights between devices or casts them "
                f"({type(hook).__name__}). Load it onto one device, for example device_map={{'': 0}}, or use plain "
                "`model.generate`."
            )
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise UnsupportedModelError(
            f"{name} is not served: its weights lie on {sorted(map(str, devices))}; load it onto one device, for "
            "example device_map={'': 0}, or use plain `model.generate`."
        )
    # DTensor is checked by name: importing torch.distributed takes a while, and some builds lack it.
    if not parallel_modules(model) and any(type(tensor).__name__ == "DTensor" for tensor in tensors):
        raise UnsupportedModelError(
            f"{name} is not served: its weights are sharded over processes; use plain `model.generate`."
        )


def _single_hooks(hook: Any) -> Iterator[Any]:
    if type(hook).__name__ == "SequentialHook":
        for part in hook.hooks:
            yield from _single_hooks(part)
    else:
        yield hook


def _stays_in_place(hook: Any) -> bool:
    """Whether an accelerate hook has no work on a model that lies on one device: it only aligns the inputs."""
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


def refuse_unservable(model: PreTrainedModel) -> None:
    """Refuse models that no route can serve.

    Raises:
        UnsupportedModelError: The model has an encoder.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not served: it has an encoder and a decoder. Use plain `model.generate`."
        )


def embedding_shape(view: PreTrainedModel) -> tuple[int, int]:
    """Return the rows and columns of the embedding of token ids.

    Raises:
        UnsupportedModelError: The model has no such embedding, or has several.
    """
    embedding = view.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None:
        raise UnsupportedModelError(
            f"{type(view).__name__} is not served: it has no embedding of token ids. Use plain `model.generate`."
        )
    return weight.shape[0], weight.shape[1]


def set_attention(view: PreTrainedModel, attn_implementation: str) -> None:
    """Set `attn_implementation` in every config of the view."""
    for module in view.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = attn_implementation


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model was built for; None if the config does not say.

    The number comes from `max_position_embeddings`, or from `max_seq_len` for MPT. If rotary frequencies depend on the
    longest sequence of the batch, the length ends at `rope_limit`.
    """
    limit = rope_limit(model)
    if limit is not None:
        return limit
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        length = getattr(config, "max_seq_len", None)
    # XLNet uses -1 for "no limit".
    limits = [int(length)] if length is not None and length > 0 else []
    for name, module in model.named_modules():
        # RoBERTa and related models number positions from the entry after the padding entry.
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first)
    return min(limits, default=None)


def batch_dependent_rope(model: PreTrainedModel) -> bool:
    """Whether the rotary frequencies of any layer depend on the longest sequence in the batch."""
    return any(map(follows_length, rope_dicts(model.config.get_text_config()).values()))


def rope_limit(model: PreTrainedModel) -> int | None:
    """Longest sequence, in tokens, for which all layers use the original rotary frequencies; None without a limit.

    For a longer sequence, dynamic NTK and LongRoPE use other frequencies for all rows of the batch.
    """
    config = model.config.get_text_config()
    limits = [original_length(rope, config) for rope in rope_dicts(config).values() if follows_length(rope)]
    return min((limit for limit in limits if limit is not None), default=None)


def _own_frequencies(view: PreTrainedModel) -> None:
    """Give a view its own copy of the frequencies that its forward overwrites.

    A user's forward replaces the frequencies of the model for its own sequence length; shared frequencies would
    reach rows of other lengths.
    """
    for module in view.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name.endswith("inv_freq"):
                module._buffers[name] = buffer.clone()
