"""Chooses how a model is served: looks at it, tries a small copy on the CPU, checks the model itself on its device.

On CUDA a forward that fails can end in an assertion, after which the process cannot use the device any more. So a
look at the model, or a small copy of it on the CPU, chooses the route. Where no small copy can be made, the packed
route is tried all the same: it refuses by what the model calls, before it computes with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

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
from hf_async_batching.model.view.snapshot import ModelSnapshot
from hf_async_batching.runtime.autocast import Autocast
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


class Route(NamedTuple):
    """How a model is served.

    Attributes:
        forward: The forward, whose logits agree with those of plain `generate`.
        backend: Its attention kernels.
        view: The view of the model with which the forward was compared; None if it was not compared.
    """

    forward: PackedForward | CacheForward
    backend: AttentionBackend
    view: PreTrainedModel | None


@dataclass(frozen=True, slots=True)
class RouteHint:
    """What a first look at a model has found, for the engine to begin with: no second copy, no second probe.

    Attributes:
        state: The model's state when it was looked at.
        autocast: The autocast state of the thread that looked.
        small: The check of a small copy.
        packed: An unfused packed forward, which one engine may take over; the reason why there is none; or None if
            the packed route was not tried on the model itself.
    """

    state: ModelSnapshot
    autocast: Autocast
    small: SmallCopyCheck
    packed: PackedForward | str | None

    def still_holds(self, model: PreTrainedModel) -> bool:
        """Whether a model has the state that it had then, and the calling thread the same autocast."""
        autocast = Autocast.of_this_thread(next(model.parameters()).device.type)
        return autocast == self.autocast and ModelSnapshot.of(model) == self.state


def check_servable(model: PreTrainedModel, longest: int | None = None) -> RouteHint:
    """Refuse what no route can serve, by a forward over a few tokens; the parity check may still refuse the rest.

    Args:
        model: The user's model. On CUDA a small copy runs in its place, unless it looks packed.
        longest: Tokens that a request can reach; None for the model's context.

    Returns:
        What was found, for `choose_route`. It does not keep the model alive.

    Raises:
        UnsupportedModelError: No route can serve the model; the message says why.
    """
    refuse_unservable(model)
    state, autocast = ModelSnapshot.of(model), Autocast.of_this_thread(next(model.parameters()).device.type)
    found = partial(RouteHint, state, autocast, SmallCopyCheck(model, longest))
    if _is_on_cuda(model) and not looks_packed(model):
        hint = found(None)
        embedding_shape(make_view(model, None))  # for what these refuse
        _first_of_small_copy(hint.small)
        return hint
    try:
        return found(PackedForward(model))
    except UnsupportedModelError as packed:
        try:
            CacheForward(model)
        except UnsupportedModelError as error:
            raise error from packed
        return found(str(packed))  # the error itself has a traceback, which holds the model


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
        # A failure there is one of the model's own code on the device, and only the small copy shows it.
        small.refuse(f"{batching}, whole prompts" if whole_prompts else batching, make, always=always, known=always)


def choose_route(model: PreTrainedModel, config: BatchingConfig, hint: RouteHint | None = None) -> Route:
    """Find the first route whose logits agree with those of plain `generate`.

    Args:
        model: The user's model.
        config: Settings.
        hint: What `check_servable` has found; used if the model is still the same, and used up then.

    Raises:
        UnsupportedModelError: There is no such route.
        DeviceFailedError: The device failed meanwhile.
    """
    refuse_unservable(model)
    device = next(model.parameters()).device
    backend = make_backend(config.attention_backend, device)
    start_compiler(device)
    if hint is not None and not hint.still_holds(model):
        hint = None
    small = hint.small if hint is not None else SmallCopyCheck(model, config.max_sequence_length)
    try:
        return _packed_route(model, config, backend, small, hint.packed if hint is not None else None)
    except UnsupportedModelError as error:
        return _cached_route(model, config, backend, small, error)


def _packed_route(
    model: PreTrainedModel,
    config: BatchingConfig,
    backend: AttentionBackend,
    small: SmallCopyCheck,
    tried: PackedForward | str | None,
) -> Route:
    if isinstance(tried, str):
        raise UnsupportedModelError(tried)
    on_cuda = _is_on_cuda(model)
    if on_cuda and not looks_packed(model):
        small.refuse("packed", PackedForward, always=True)
    with small.beside("packed", PackedForward, config.attach_check and on_cuda):
        route = _packed_forward(model, config, backend, tried)
    if config.attach_check:
        small.refuse("packed", PackedForward)
    return route


def _cached_route(
    model: PreTrainedModel,
    config: BatchingConfig,
    backend: AttentionBackend,
    small: SmallCopyCheck,
    packed: UnsupportedModelError,
) -> Route:
    reasons: list[UnsupportedModelError] = []
    for batching, whole_prompts in MODES:
        if batching != "single" and reasons and isinstance(reasons[-1], LogitsDifferError) and reasons[-1].plain:
            continue  # the same for all of them
        make = partial(CacheForward, batching=batching, whole_prompts=whole_prompts)
        try:
            _refuse_cached(small, make, always=_is_on_cuda(model))
            route = _checked(make, model, config, backend)
        except UnsupportedModelError as error:
            logger.debug("%s as %s, %s: %s", type(model).__name__, batching, whole_prompts, error)
            reasons.append(error)
            continue
        forward = route.forward
        why = [packed, *reasons[:1]] if batching == "single" else [packed]
        logger.warning(
            "%s is served through its own cache class (%s), slower than packed: %s",
            forward.name,
            forward.route,
            "; not in batches: ".join(str(one).removeprefix(f"{forward.name} is not served: ") for one in why),
        )
        return route
    raise reasons[-1] from packed


def _packed_forward(
    model: PreTrainedModel, config: BatchingConfig, backend: AttentionBackend, made: PackedForward | None = None
) -> Route:
    """A packed forward that passed the parity check; without fused weights if it passes only then.

    Args:
        made: An unfused one, to begin with.
    """
    device = next(model.parameters()).device
    if config.fuses_weights(device):
        skinny = not config.compiles(device)
        make = partial(PackedForward, fused=True, skinny=skinny)
        try:
            if made is not None:
                made.fuse(skinny=skinny)
            return _checked(make, model, config, backend, made)
        except Exception as error:
            if ends_the_search(error, device):
                raise
            logger.warning("%s runs without fused weights: %s", type(model).__name__, error)
            made = None
    if not config.attach_check:
        return Route(made or PackedForward(model), backend, None)
    return _checked(PackedForward, model, config, backend, made)


_Forward = TypeVar("_Forward", PackedForward, CacheForward)


def _checked(
    make: Callable[[PreTrainedModel], _Forward],
    model: PreTrainedModel,
    config: BatchingConfig,
    backend: AttentionBackend,
    made: _Forward | None = None,
) -> Route:
    """A forward that agrees with plain `generate`, in the model's dtype or in a wider one.

    Args:
        make: Makes a forward for a model or a view.
        made: What it has made for this model, if it has.
    """
    name = type(model).__name__
    stage("its forward is tried with a few tokens")
    try:
        forward = make(model) if made is None else made
    except UnsupportedModelError:
        raise
    except Exception as error:
        if ends_the_search(error, next(model.parameters()).device):
            raise device_failure(error, name, "", "a first forward", next(model.parameters()).device) from error
        raise
    stage(f"its logits as {forward.route} are compared with those of plain `generate`")
    page_size = config.page_size or default_page_size(forward.device)
    try:
        return Route(forward, backend, check_parity(model, forward, backend, page_size))
    except LogitsDifferError as error:
        stage(f"its logits as {forward.route} are compared in a wider dtype, since {error.short}")
        # A wide view fuses nothing: what is fused is compared by itself.
        fused = isinstance(forward, PackedForward) and forward.packed_groups is not None
        if fused and not products_agree(forward.view):
            raise
        view = agrees_in_wide_dtype(model, make, backend, page_size, error)
        if view is None:
            raise
        return Route(forward, backend, view)


def _is_on_cuda(model: PreTrainedModel) -> bool:
    return next(model.parameters()).device.type == "cuda"
