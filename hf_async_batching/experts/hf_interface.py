"""The experts function that transformers' modules call, registered once under `NAME`.

A view's own config names it, as it names our attention. Modules that the kernels do not know call the function that
their config named before.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from hf_async_batching.experts.layer import ExpertWeights, GateForm
from hf_async_batching.experts.mxfp4_model import Mxfp4Experts, plain_experts
from hf_async_batching.experts.recognise import choices_of, dispatches, form_of, weights_of
from hf_async_batching.experts.settings import EXPANDED_TOKENS, FEW_TOKENS, first_tokens
from hf_async_batching.linear.rounding import rounding_tolerance, worst_relative_error
from hf_async_batching.runtime.triton_start import runs_triton

logger = logging.getLogger(__name__)

NAME = "hf_async_batching_experts"

_REPLACED = ("eager", "batched_mm", "grouped_mm")
"""Implementations that ours stands for. A user who names another one has a reason."""

_COMPARED_TOKENS = (1, 5, FEW_TOKENS, FEW_TOKENS + 45)
"""One token, few, the most that our products compute where the library has others, and a prompt."""

_COMPARED_PACKED = EXPANDED_TOKENS
"""Tokens for which MXFP4 weights are unpacked first."""

_library: Any = torch.library.Library("hf_async_batching", "FRAGMENT")  # type: ignore[no-untyped-call]
_ARGUMENTS = (
    "Tensor hidden, Tensor index, Tensor weights, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias,"
    " bool transposed, Tensor? up_scales, Tensor? down_scales, str activation, bool gated, bool interleaved,"
    " float alpha, float limit, float shift"
)
_library.define(f"experts({_ARGUMENTS}) -> Tensor")
_library.define(f"experts_add({_ARGUMENTS}, Tensor residual) -> Tensor")


def _experts(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    layer: ExpertWeights,
    form: GateForm,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    from hf_async_batching.experts.triton_experts import experts

    return experts(hidden, index, weights, layer, form, residual)


def _operator(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    transposed: bool,
    up_scales: torch.Tensor | None,
    down_scales: torch.Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    shift: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    layer = ExpertWeights(up, up_bias, down, down_bias, transposed, up_scales, down_scales)
    form = GateForm(activation, gated, interleaved, alpha, limit, shift)
    return _experts(hidden, index, weights, layer, form, residual)


def _with_residual(*given: Any) -> torch.Tensor:
    """The experts' sum plus a residual that has as many elements; the result has the residual's shape."""
    residual: torch.Tensor = given[-1]
    arguments = [*given[:-1], residual.reshape(given[0].shape).contiguous()]
    return _operator(*arguments).view(residual.shape)


def _experts_shape(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


def _residual_shape(*given: Any) -> torch.Tensor:
    residual: torch.Tensor = given[-1]
    return residual.new_empty(residual.shape)


# One operator for every number of tokens, so compiled code stays right and fast for all of them.
_library.impl("experts", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("hf_async_batching::experts", _experts_shape, lib=_library)
_library.impl("experts_add", _with_residual, "CompositeExplicitAutograd")
torch.library.register_fake("hf_async_batching::experts_add", _residual_shape, lib=_library)


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of each token's experts, for transformers' modules.

    Args:
        module: The module of all experts of a layer.
        hidden_states: [tokens, hidden].
        top_k_index: Int [tokens, choices]; a number that is no expert adds nothing.
        top_k_weights: [tokens, choices].

    Returns:
        [tokens, hidden].
    """
    form = getattr(module, "_engine_form", None)
    # Autocast casts in some functions of a family and not in others.
    autocast = torch.is_autocast_enabled(hidden_states.device.type)
    if form is None or autocast or hidden_states.dim() != 2:
        return _family_function(module)(module, hidden_states, top_k_index, top_k_weights)
    layer = weights_of(module)
    if hidden_states.dtype != layer.dtype:
        return _family_function(module)(module, hidden_states, top_k_index, top_k_weights)
    if torch.compiler.is_dynamo_compiling():
        out: torch.Tensor = torch.ops.hf_async_batching.experts(
            hidden_states, top_k_index, top_k_weights, *layer, *form
        )
        return out
    return _experts(hidden_states, top_k_index, top_k_weights, layer, form)


def _family_function(module: Any) -> Callable[..., torch.Tensor]:
    """What a module called before."""
    function: Callable[..., torch.Tensor] | None = getattr(module, "_family_experts", None)
    if function is None:
        raise RuntimeError(
            f"experts implementation {NAME!r} works only inside the engine of hf_async_batching; set "
            "`experts_implementation` to 'grouped_mm' or 'eager' for a plain forward"
        )
    return function


def use_kernels(view: nn.Module) -> int:
    """Let the experts of a view call our function, where it computes what they compute.

    Each kind of layer is recognised by its values, and then compared with its own function on the device.

    Args:
        view: A view; on a device without Triton it stays as it is.

    Returns:
        The number of modules that call our kernels.
    """
    if any(isinstance(module, Mxfp4GptOssExperts) for module in view.modules()):
        _tell_of_hub_kernels()
    modules: list[Any] = [one for one in view.modules() if dispatches(one) or isinstance(one, Mxfp4Experts)]
    if not modules or not runs_triton(next(modules[0].parameters()).device):
        return 0
    served = 0
    for module in modules:
        if isinstance(module, Mxfp4Experts):
            module._family_experts = plain_experts  # type: ignore[assignment]
        else:
            name = module.config._experts_implementation
            if name not in _REPLACED:
                continue
            module._family_experts = ALL_EXPERTS_FUNCTIONS.get_interface(name, type(module).forward.__wrapped__)
        form = form_of(module)
        module._engine_form = form if form is not None and _agrees(module, form) else None
        served += module._engine_form is not None
    if served:
        for module in modules:
            if isinstance(module, Mxfp4Experts):
                module._engine_experts = experts_forward
            elif hasattr(module, "_family_experts"):
                # The property's setter would reach the configs of parts without our function.
                module.config._experts_implementation_internal = NAME
    logger.debug("%d of %d layers of experts are computed by our kernels", served, len(modules))
    return served


@functools.cache
def _tell_of_hub_kernels() -> None:
    logger.warning(
        "the experts lie in the layout of the Hub's MXFP4 kernels, which compute them; load the model with "
        "`config=hf_async_batching.keep_mxfp4(name)` to have them computed by ours"
    )


_compared: dict[tuple[Any, ...], bool] = {}


def _agrees(module: Any, form: GateForm) -> bool:
    """Whether our kernels compute what a module's own function does; compared once for all layers of one kind.

    It also compiles the kernels that serving needs.
    """
    layer = weights_of(module)
    kind = (
        *(type(module), form, layer.dtype, layer.up.device),
        *((one.shape, one.stride()) for one in (layer.up, layer.down)),
    )
    if kind not in _compared:
        choices = min(choices_of(module), layer.experts)
        sizes = {*_COMPARED_TOKENS, *first_tokens(layer.experts, choices, packed=layer.packed)}
        sizes |= {_COMPARED_PACKED} if layer.packed else set()
        try:
            with torch.autocast(layer.down.device.type, enabled=False):
                _compared[kind] = all(_agree(module, form, tokens, choices) for tokens in sorted(sizes))
        except Exception as error:
            # For all layers of the kind, and for other views of the model: a mixture would round differently.
            _compared[kind] = False
            logger.warning("%s keeps its own experts: %s: %s", type(module).__name__, type(error).__name__, error)
            return False
        if not _compared[kind]:
            logger.warning("%s keeps its own experts: our kernels' results differ", type(module).__name__)
    return _compared[kind]


@torch.inference_mode()
def _agree(module: Any, form: GateForm, tokens: int, choices: int) -> bool:
    layer = weights_of(module)
    dtype, device = layer.dtype, layer.down.device
    generator = torch.Generator("cpu").manual_seed(tokens)
    hidden = torch.randn(tokens, layer.hidden, generator=generator, device="cpu").to(device, dtype)
    scores = torch.rand(tokens, layer.experts, generator=generator, device="cpu").to(device)
    weights, index = scores.topk(choices, dim=-1)
    weights = weights.to(dtype)
    got = _experts(hidden, index, weights, layer, form)
    want = module._family_experts(module, hidden, index, weights)
    return worst_relative_error(got.float(), want.float()) <= rounding_tolerance(dtype)


ExpertsInterface.register(NAME, experts_forward)
