"""Chooses how a model is served: looks at it, tries a small copy on the CPU, checks the model itself on its device.

On CUDA a forward that fails can end in an assertion, after which the process cannot use the device any more. So a
look at the model, or a small copy of it on the CPU, chooses the route. Where no small copy can be made, the packed
route is tried all the same: it refuses by what the model calls, before it computes with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from transformers import PreTrainedModel

from hf_async_batching.attention.base import AttentionBackend
from hf_async_batching.attention.select import make_backend
from hf_async_batching.checks.parity_check import check_parity
from hf_async_batching.checks.small_copy_check import SmallCopyCheck
from hf_async_batching.checks.wide_check import agrees_in_wide_dtype
from hf_async_batching.config import BatchingConfig
from hf_async_batching.devices.failure import device_failure, ends_the_search
from hf_async_batching.engine.sizing import default_page_size
from hf_async_batching.errors import LogitsDifferError, UnsupportedModelError
from hf_async_batching.linear.engine_linear import products_agree
from hf_async_batching.model.forward.cache_forward import MODES, CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.small.length_thresholds import text_config
from hf_async_batching.model.view.model_view import embedding_shape, make_view, refuse_unservable
from hf_async_batching.runtime.start_progress import stage
from hf_async_batching.runtime.triton_start import start_compiler

logger = logging.getLogger(__name__)

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def looks_packed(model: PreTrainedModel) -> bool:
    """Whether a model's class and config say that all of its layers go through transformers' attention interface."""
    cls: type = type(model)
    kinds = getattr(text_config(model.config), "layer_types", None)
    return (
        cls.__module__.startswith("transformers.models.")
        and bool(getattr(cls, "_supports_attention_backend", False))
        and not getattr(cls, "_is_stateful", False)
        and set(kinds or ()) <= _ATTENTION
    )


def check_servable(model: PreTrainedModel, longest: int | None = None) -> None:
    """Refuse what no route can serve, by a forward over a few tokens; the attach check may still refuse the rest.

    Args:
        model: The user's model. On CUDA a small copy runs in its place, unless it looks packed.
        longest: Tokens that a request can reach; None for the model's context.

    Raises:
        UnsupportedModelError: Says why.
    """
    refuse_unservable(model)
    if _is_on_cuda(model) and not looks_packed(model):
        embedding_shape(make_view(model, None))  # for what these refuse
        _first_of_small_copy(SmallCopyCheck(model, longest))
        return
    try:
        PackedForward(model)
    except UnsupportedModelError as packed:
        try:
            CacheForward(model)
        except UnsupportedModelError as error:
            raise error from packed


def _first_of_small_copy(small: SmallCopyCheck) -> None:
    """Find the first route for which a small copy is right; *single* needs none, since it is `generate`'s own loop."""
    try:
        return small.refuse("packed", PackedForward, always=True)
    except UnsupportedModelError:
        for batching, whole_prompts in MODES:
            try:
                return _refuse_cached(small, partial(CacheForward, batching=batching, whole_prompts=whole_prompts))
            except UnsupportedModelError:
                continue


def _refuse_cached(small: SmallCopyCheck, make: partial[CacheForward], always: bool = True) -> None:
    batching, whole_prompts = make.keywords["batching"], make.keywords["whole_prompts"]
    if batching != "single":
        # What fails on the device there is the model's own code, which the small copy alone shows.
        small.refuse(f"{batching}, whole prompts" if whole_prompts else batching, make, always=always, known=always)


def choose_route(
    model: PreTrainedModel, config: BatchingConfig
) -> tuple[PackedForward | CacheForward, AttentionBackend, PreTrainedModel | None]:
    """A forward whose logits agree with those of plain `generate`: the first route for which that is so.

    Returns:
        The forward, its kernels, and the view of the model that it was checked against.

    Raises:
        UnsupportedModelError: There is no such route.
        DeviceFailedError: The device failed meanwhile.
    """
    refuse_unservable(model)
    device = next(model.parameters()).device
    backend = make_backend(config.attention_backend, device)
    start_compiler(device)
    on_cuda = _is_on_cuda(model)
    small = SmallCopyCheck(model, config.max_sequence_length)
    try:
        if on_cuda and not looks_packed(model):
            small.refuse("packed", PackedForward, always=True)
        with small.beside("packed", PackedForward, config.attach_check and on_cuda):
            packed_forward, view = _packed_forward(model, config, backend)
        if config.attach_check:
            small.refuse("packed", PackedForward)
        return packed_forward, backend, view
    except UnsupportedModelError as error:
        packed = error
    reasons: list[UnsupportedModelError] = []
    for batching, whole_prompts in MODES:
        if batching != "single" and reasons and isinstance(reasons[-1], LogitsDifferError) and reasons[-1].plain:
            continue  # the same for all of them
        make = partial(CacheForward, batching=batching, whole_prompts=whole_prompts)
        try:
            _refuse_cached(small, make, always=on_cuda)
            cached_forward, view = _checked(make, model, config, backend)
        except UnsupportedModelError as error:
            logger.debug("%s as %s, %s: %s", type(model).__name__, batching, whole_prompts, error)
            reasons.append(error)
            continue
        why = [packed, *reasons[:1]] if batching == "single" else [packed]
        logger.warning(
            "%s is served through its own cache class (%s), slower than packed: %s",
            cached_forward.name,
            cached_forward.route,
            "; not in batches: ".join(str(one).removeprefix(f"{cached_forward.name} is not served: ") for one in why),
        )
        return cached_forward, backend, view
    raise reasons[-1] from packed


def _packed_forward(
    model: PreTrainedModel, config: BatchingConfig, backend: AttentionBackend
) -> tuple[PackedForward, PreTrainedModel | None]:
    """A packed forward that passed the check; without fused weights where it does only then."""
    device = next(model.parameters()).device
    if config.fuses_weights(device):
        make = partial(PackedForward, fused=True, skinny=not config.compiles(device))
        try:
            return _checked(make, model, config, backend)
        except Exception as error:
            if ends_the_search(error, device):
                raise
            logger.warning("%s runs without fused weights: %s", type(model).__name__, error)
    if not config.attach_check:
        return PackedForward(model), None
    return _checked(PackedForward, model, config, backend)


_Forward = TypeVar("_Forward", PackedForward, CacheForward)


def _checked(
    make: Callable[[PreTrainedModel], _Forward],
    model: PreTrainedModel,
    config: BatchingConfig,
    backend: AttentionBackend,
) -> tuple[_Forward, PreTrainedModel]:
    """A forward that agrees with plain `generate`, in the model's dtype or in a wider one."""
    name = type(model).__name__
    stage("its forward is tried with a few tokens")
    try:
        forward = make(model)
    except UnsupportedModelError:
        raise
    except Exception as error:
        if ends_the_search(error, next(model.parameters()).device):
            raise device_failure(error, name, "", "a first forward", next(model.parameters()).device) from error
        raise
    stage(f"its logits as {forward.route} are compared with those of plain `generate`")
    page_size = config.page_size or default_page_size(forward.device)
    try:
        return forward, check_parity(model, forward, backend, page_size)
    except LogitsDifferError as error:
        stage(f"its logits as {forward.route} are compared in a wider dtype, since {error.short}")
        # A wide view fuses nothing: what is fused is compared by itself.
        fused = isinstance(forward, PackedForward) and forward.packed_groups is not None
        if fused and not products_agree(forward.view):
            raise
        view = agrees_in_wide_dtype(model, make, backend, page_size, error)
        if view is None:
            raise
        return forward, view


def _is_on_cuda(model: PreTrainedModel) -> bool:
    return next(model.parameters()).device.type == "cuda"
