"""Tells rounding from a mistake: the same comparison once more, in a wider dtype.

Where a router takes the best experts, or an indexer the best keys, one bit decides between two of them, and everything
behind differs. So logits of a right forward can differ in bfloat16 by as much as those of a wrong one. In float32 they
do not: what two ways of computing differ by there is a ten-thousandth of it, and a mistake is as large as before.
The weights stay as they are; each operation converts what it takes (`wide_tensor`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_async_batching.attention.base import AttentionBackend
from hf_async_batching.checks.parity_check import check_parity
from hf_async_batching.checks.reference_logits import Prompts, prompts_for
from hf_async_batching.devices.failure import ends_the_search
from hf_async_batching.errors import LogitsDifferError
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.generate_loop import prepare_view
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.small.length_thresholds import makes_choices
from hf_async_batching.model.view.model_view import make_view
from hf_async_batching.model.view.module_calls import runs_user_code
from hf_async_batching.model.view.parallel_modules import parallel_modules
from hf_async_batching.model.view.quantization import is_quantized
from hf_async_batching.model.view.wide_tensor import widen_weights

logger = logging.getLogger(__name__)

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def agrees_in_wide_dtype(
    model: PreTrainedModel,
    make_forward: Callable[[PreTrainedModel], PackedForward | CacheForward],
    backend: AttentionBackend,
    page_size: int,
    error: LogitsDifferError,
) -> PreTrainedModel | None:
    """Whether logits that differ too much in the model's own dtype agree in a wider one.

    Args:
        model: The user's model; not changed.
        make_forward: Makes the forward whose logits differ.
        backend: The kernels with which they differ.
        page_size: Of the engine to come.
        error: What the check in the model's own dtype said.

    Returns:
        A view of the model, which is the model as it was checked; None where the logits differ in the wider dtype,
        too, or cannot be compared there.

    Raises:
        DeviceFailedError: The device fails.
    """
    parameter = next(model.parameters())
    dtype, device = parameter.dtype, parameter.device
    # What is not finite, or differs where nothing is chosen, is no rounding.
    if dtype not in _WIDER or not error.finite or not makes_choices(model.config):
        return None
    if is_quantized(model) or runs_user_code(model) or parallel_modules(model):
        return None
    # Kernels of the device, and products of experts by groups, know no float64; autocast undoes what is widened.
    exact = _WIDER[dtype] == torch.float64
    if torch.is_autocast_enabled(device.type) or (exact and device.type != "cpu"):
        return None
    wide = make_view(model, None)
    widen_weights(wide, _WIDER[dtype])
    if exact:
        _loop_over_experts(wide)

    def agrees(number: int) -> bool:
        forward = make_forward(wide)
        if forward.dtype.itemsize < _WIDER[dtype].itemsize:
            raise TypeError(f"its logits are in {forward.dtype}")
        prompts = _shifted(prompts_for(model, forward.vocab_size), number, forward.vocab_size)
        try:
            check_parity(wide, forward, backend, page_size, prompts)
        except LogitsDifferError as again:
            logger.debug("in %s: %s", _WIDER[dtype], again)
            return False
        return True

    name = type(model).__name__
    try:
        # A tie can fall in a wider dtype, too, of thousands of choices; not in two of three sets of prompts.
        if not (agrees(0) or (agrees(1) and agrees(2))):
            return None
    except Exception as failure:  # no memory, or a kernel that does not know the dtype
        if ends_the_search(failure, device):
            raise
        logger.info("%s cannot be compared in %s: %s", name, _WIDER[dtype], failure)
        return None
    logger.info(
        "%s: %s; in %s they agree, so it is rounding (of choices among experts or keys)",
        name,
        error.short,
        _WIDER[dtype],
    )
    view = make_view(model, None)
    prepare_view(view)
    return view


def _loop_over_experts(view: PreTrainedModel) -> None:
    for module in view.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"


def _shifted(prompts: Prompts, number: int, vocab_size: int) -> Prompts:
    """Other tokens, of the same lengths."""
    return Prompts(*([(token + 17 * number) % vocab_size for token in prompt] for prompt in prompts))
