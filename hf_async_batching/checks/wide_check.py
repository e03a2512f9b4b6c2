"""Tell rounding from a mistake by repeating a comparison in a wider dtype.

If a router selects the best experts, or an indexer the best keys, one bit can change the choice, and then everything
after it differs. So in bfloat16, the logits of a right forward can differ by as much as those of a wrong one. In
float32 two right forwards differ ten thousand times less, while a mistake makes the same difference as before. The
weights stay as they are; each operation converts its input (`wide_tensor`).
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
    *,
    stateful: bool = False,
) -> PreTrainedModel | None:
    """Check whether logits that differ too much in the model's own dtype agree in a wider one.

    Args:
        model: The user's model; not changed.
        make_forward: Makes the forward whose logits differ.
        backend: The attention kernels of that forward.
        page_size: Page size of the engine.
        error: The error of the check in the model's own dtype.
        stateful: Whether rows have recurrent states. Rounding adds up there from token to token, in other ways where
            tokens come one by one than where they come at once.

    Returns:
        A view of the model as it was checked; None if the logits differ in the wider dtype too, or cannot be compared
        in it.

    Raises:
        DeviceFailedError: The device fails.
    """
    parameter = next(model.parameters())
    dtype, device = parameter.dtype, parameter.device
    # Infinite differences, and those of a model without choices and states, are not rounding.
    if dtype not in _WIDER or not error.finite or not (stateful or makes_choices(model.config)):
        return None
    if is_quantized(model) or runs_user_code(model) or parallel_modules(model):
        return None
    # Device kernels and grouped expert products lack float64; autocast would undo the widening.
    exact = _WIDER[dtype] == torch.float64
    if torch.is_autocast_enabled(device.type) or (exact and device.type != "cpu"):
        return None
    wide = make_view(model, None, reference_kernels=True)
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
        # With thousands of choices, one set of prompts can meet a tie in a wider dtype too, but not two sets of three.
        if not (agrees(0) or (agrees(1) and agrees(2))):
            return None
    except Exception as failure:  # too little memory, or a kernel without this dtype
        if ends_the_search(failure, device):
            raise
        logger.info("%s cannot be compared in %s: %s", name, _WIDER[dtype], failure)
        return None
    logger.info(
        "%s: %s; in %s they agree, so the cause is rounding (of choices among experts or keys, or of states)",
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
    """Other token ids of the same lengths."""
    return Prompts(*([(token + 17 * number) % vocab_size for token in prompt] for prompt in prompts))
