"""Choose how a model is served: inspect it, try a small copy on the CPU, check the model itself on its device.

On CUDA a failing forward can end in an assertion, after which the process cannot use the device. So the route is
chosen by inspecting the model, or with a small copy of it on the CPU. If no small copy can be made, the packed route
is still tried: it refuses a model by the functions that the model calls, before it computes with it.
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
    """Whether a model's class and config say that all of its layers use transformers' attention interface."""
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
        forward: The forward; its logits agree with those of plain `generate`.
        backend: Its attention kernels.
        view: The view of the model that was compared with the forward; None if the forward was not compared.
    """

    forward: PackedForward | CacheForward
    backend: AttentionBackend
    view: PreTrainedModel | None


@dataclass(frozen=True, slots=True)
class RouteHint:
    """Result of a first look at a model; the engine starts from it and saves a second copy and a second probe.

    Attributes:
        state: The model's state at that time.
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
        """Whether the model still has that state, and the calling thread that autocast state."""
        autocast = Autocast.of_this_thread(next(model.parameters()).device.type)
        return autocast == self.autocast and ModelSnapshot.of(model) == self.state


def check_servable(model: PreTrainedModel, longest: int | None = None) -> RouteHint:
    """Refuse a model that no route can serve, by a forward over a few tokens; the parity check may refuse others.

    Args:
        model: The user's model. On CUDA a small copy runs instead, unless the model looks packed.
        longest: Longest sequence of a request, in tokens; None for the model's context.

    Returns:
        A hint for `choose_route`. It does not keep the model alive.

    Raises:
        UnsupportedModelError: No route can serve the model; the message says why.
    """
    refuse_unservable(model)
    state, autocast = ModelSnapshot.of(model), Autocast.of_this_thread(next(model.parameters()).device.type)
    found = partial(RouteHint, state, autocast, SmallCopyCheck(model, longest))
    if _is_on_cuda(model) and not looks_packed(model):
        hint = found(None)
        embedding_shape(make_view(model, None))  # called for the models that they refuse
        _first_of_small_copy(hint.small)
        return hint
    try:
        return found(PackedForward(model))
    except UnsupportedModelError as packed:
        try:
            CacheForward(model)
        except UnsupportedModelError as error:
            raise error from packed
        return found(str(packed))  # the error itself has a traceback, which keeps the model alive


def _first_of_small_copy(small: SmallCopyCheck) -> None:
    """Find the first route on which a small copy is right; *single* needs no check: it is `generate`'s own loop."""
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
        # A failure here comes from the model's own code on the device, and only the small copy shows it in advance.
        small.refuse(f"{batching}, whole prompts" if whole_prompts else batching, make, always=always, known=always)


def choose_route(model: PreTrainedModel, config: BatchingConfig, hint: RouteHint | None = None) -> Route:
    """Find the first route whose logits agree with those of plain `generate`.

    Args:
        model: The user's model.
        config: Settings.
        hint: Result of `check_servable`; used up if the model has not changed since.

    Raises:
        UnsupportedModelError: No route agrees with plain `generate`.
        DeviceFailedError: The device failed during a check.
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
    expanded = partial(PackedForward, latents=False)
    if not config.latent_pages:
        if tried is not None and tried.latent_layers:
            tried = None
        return _packed_with(expanded, "packed, expanded", model, config, backend, small, tried)
    try:
        return _packed_with(PackedForward, "packed", model, config, backend, small, tried)
    except Exception as error:
        refused = isinstance(error, UnsupportedModelError) and not isinstance(error, LogitsDifferError)
        if refused or ends_the_search(error, next(model.parameters()).device) or not _keeps_latents(model):
            raise
        logger.warning("%s keeps expanded keys and values in its pages: %s", type(model).__name__, error)
    return _packed_with(expanded, "packed, expanded", model, config, backend, small, None)


def _keeps_latents(model: PreTrainedModel) -> bool:
    """Whether a packed forward of a model, which has run before, keeps latents for some layers."""
    return PackedForward(model).latent_layers > 0


def _packed_with(
    make: Callable[..., PackedForward],
    kind: str,
    model: PreTrainedModel,
    config: BatchingConfig,
    backend: AttentionBackend,
    small: SmallCopyCheck,
    tried: PackedForward | None,
) -> Route:
    on_cuda = _is_on_cuda(model)
    if on_cuda and not looks_packed(model):
        small.refuse(kind, make, always=True)
    with small.beside(kind, make, config.attach_check and on_cuda):
        route = _packed_forward(make, model, config, backend, tried)
    if config.attach_check:
        small.refuse(kind, make)
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
            continue  # the result would be the same for all of them
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
    plain: Callable[..., PackedForward],
    model: PreTrainedModel,
    config: BatchingConfig,
    backend: AttentionBackend,
    made: PackedForward | None = None,
) -> Route:
    """Return a packed forward that passed the parity check; without fused weights if it passes only then.

    Args:
        plain: Makes an unfused forward.
        made: An unfused forward to start from, if there is one.
    """
    device = next(model.parameters()).device
    if config.fuses_weights(device):
        skinny = not config.compiles(device)
        make = partial(plain, fused=True, skinny=skinny)
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
        return Route(made or plain(model), backend, None)
    return _checked(plain, model, config, backend, made)


_Forward = TypeVar("_Forward", PackedForward, CacheForward)


def _checked(
    make: Callable[[PreTrainedModel], _Forward],
    model: PreTrainedModel,
    config: BatchingConfig,
    backend: AttentionBackend,
    made: _Forward | None = None,
) -> Route:
    """Return a forward that agrees with plain `generate`, in the model's dtype or in a wider one.

    Args:
        make: Makes a forward for a model or a view.
        made: A forward that `make` has already made for this model, if there is one.
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
        # A wide view fuses no weights, because they are no plain parameters; fused products are compared separately.
        fused = isinstance(forward, PackedForward) and forward.packed_groups is not None
        if fused and not products_agree(forward.view):
            raise
        wide = PackedForward if fused else make
        view = agrees_in_wide_dtype(model, wide, backend, page_size, error, stateful=forward.state_bytes > 0)
        if view is None:
            raise
        return Route(forward, backend, view)


def _is_on_cuda(model: PreTrainedModel) -> bool:
    return next(model.parameters()).device.type == "cuda"
