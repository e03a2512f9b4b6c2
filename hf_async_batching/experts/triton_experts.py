"""The door to the kernels of experts. Importing it imports triton: import it on demand.

Few tokens take three or four launches: the assignments are sorted by expert (not for one token), the first product
with its activation, the second product, and the weighted sum. Each expert that a token chose is read once for all its
tokens, as far as a block holds them. Nothing is read on the host, and all shapes follow from the number of tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
from torch.nn import functional

from hf_async_batching.devices.pdl import supports_pdl
from hf_async_batching.devices.shared_memory import shared_memory_limit
from hf_async_batching.experts.kernels import (
    activate_kernel,
    combine_kernel,
    group_kernel,
    product_kernel,
)
from hf_async_batching.experts.layer import ExpertWeights, GateForm
from hf_async_batching.experts.mxfp4_tiles import expand_kernel
from hf_async_batching.experts.settings import (
    EXPANDED_BYTES,
    EXPANDED_TOKENS,
    FEW_TOKENS,
    ExpertSetting,
    ProductSetting,
    default_setting,
    most_blocks,
)

_FEW_IDS, _MANY_IDS = 512, 2048
_COMBINED = 256
_MOST_ACTIVATED = 1024
_GROUP_WORDS = 4


class Grouping(NamedTuple):
    """Assignments sorted by expert.

    Attributes:
        order: Int32 [assignments], the assignment at each place.
        places: Int32 [assignments], the place of each assignment.
        ends: Int32 [experts], the place after each expert's last.
        blocks: Int32 [slots, 3]: expert, first place and place after the last of each block; unused ones have
            expert -1.
    """

    order: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor
    blocks: torch.Tensor


def group(index: torch.Tensor, experts: int, size: int, *, filled: bool = False) -> Grouping:
    """Sort assignments by expert; those of one expert keep their order.

    Args:
        index: Int [tokens, choices], contiguous. Numbers that are no expert have no place.
        experts: Number of experts.
        size: Assignments in a block.
        filled: Whether what has no place is 0 in `order` (its end) and `places`; otherwise it is anything.
    """
    assignments = index.numel()
    slots = most_blocks(assignments, experts, size)
    order, places = (torch.zeros if filled else torch.empty)(
        (2, assignments), dtype=torch.int32, device=index.device
    ).unbind()
    ends = index.new_empty(experts, dtype=torch.int32)
    blocks = index.new_empty((slots, 3), dtype=torch.int32)
    early, options = _early(index.device)
    with torch.cuda.device_of(index):  # type: ignore[no-untyped-call]
        group_kernel[(experts,)](
            index, order, places, ends, blocks, assignments, slots, experts,
            SIZE=_FEW_IDS if assignments <= _FEW_IDS else _MANY_IDS, EXPERTS=triton.next_power_of_2(experts + 1),
            BLOCK_M=size, EARLY=early, num_warps=4, **options,
        )  # fmt: skip
    return Grouping(order, places, ends, blocks)


def experts(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    layer: ExpertWeights,
    form: GateForm,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.experts`, summed in float32 in an order that does not depend on timing.

    Args:
        hidden: [tokens, hidden], the dtype of the weights.
        index: Int [tokens, choices].
        weights: Float [tokens, choices].
        layer: The experts.
        form: Their activation.
        residual: [tokens, hidden], contiguous, the dtype of `hidden`: added to the rounded sum. None for none.

    Returns:
        [tokens, hidden], contiguous.
    """
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    index, weights = index.contiguous(), weights.contiguous()
    if hidden.shape[0] >= _library_from(layer) and _library_serves(hidden, layer):
        return experts_by_library(hidden, index, weights, layer, form, residual)
    return experts_by_kernel(hidden, index, weights, layer, form, residual=residual)


def experts_by_kernel(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    layer: ExpertWeights,
    form: GateForm,
    setting: ExpertSetting | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `experts`, with our own products; `index` and `weights` must be contiguous.

    Args:
        hidden: As for `experts`.
        index: As for `experts`.
        weights: As for `experts`.
        layer: As for `experts`.
        form: As for `experts`.
        setting: None for the one by rule.
        residual: As for `experts`.
    """
    tokens, choices = index.shape
    assignments = tokens * choices
    out = torch.empty(tokens, layer.hidden, dtype=hidden.dtype, device=hidden.device)
    if not assignments:
        return out.zero_() if residual is None else out.copy_(residual)
    if setting is None:
        setting = default_setting(
            assignments, layer.experts, layer.hidden, layer.intermediate, hidden.dtype.itemsize,
            shared_memory_limit(hidden.device), gated=form.gated, packed=layer.packed,
        )  # fmt: skip
    grouping = group(index, layer.experts, setting.block_m) if tokens > 1 else None
    activated = hidden.new_empty((assignments, layer.intermediate))
    product = hidden.new_empty((assignments, layer.hidden))
    plain = GateForm(activation="none", gated=False)
    up = layer.up, layer.up_scales, layer.up_bias
    down = layer.down, layer.down_scales, layer.down_bias
    _product(hidden, *up, activated, index, grouping, layer, form, setting.block_m, setting.up)
    _product(activated, *down, product, index, grouping, layer, plain, setting.block_m, setting.down)
    _combine(product, None, index, weights, None, out, layer.experts, residual)
    return out


def experts_by_library(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    layer: ExpertWeights,
    form: GateForm,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `experts`, with the vendor's grouped products; `index` and `weights` must be contiguous.

    Packed weights of one product are unpacked at a time, all experts of the layer.
    """
    grouping = group(index, layer.experts, 64, filled=True)
    assignments, choices = index.numel(), index.shape[1]
    product = functional.grouped_mm(
        hidden[grouping.order // choices], _inner_first(layer.up, layer.up_scales, layer), offs=grouping.ends
    )
    activated = hidden.new_empty((assignments, layer.intermediate))
    early, options = _early(hidden.device)
    block = min(triton.next_power_of_2(layer.intermediate), _MOST_ACTIVATED)
    with torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call]
        activate_kernel[(assignments, triton.cdiv(layer.intermediate, block))](
            product, product if layer.up_bias is None else layer.up_bias, activated, index, grouping.order,
            grouping.ends, layer.experts, layer.intermediate,
            0 if layer.up_bias is None else layer.up_bias.stride(0), form.alpha, form.limit, form.shift,
            GATED=form.gated, INTERLEAVED=form.interleaved, HAS_BIAS=layer.up_bias is not None,
            ACTIVATION=form.activation, LIMITED=form.limit > 0, BLOCK=block, EARLY=early, num_warps=4, **options,
        )  # fmt: skip
    product = functional.grouped_mm(activated, _inner_first(layer.down, layer.down_scales, layer), offs=grouping.ends)
    out = torch.empty(index.shape[0], layer.hidden, dtype=hidden.dtype, device=hidden.device)
    _combine(product, layer.down_bias, index, weights, grouping.places, out, layer.experts, residual)
    return out


def _inner_first(weight: torch.Tensor, scales: torch.Tensor | None, layer: ExpertWeights) -> torch.Tensor:
    """Plain weights [experts, inner, outputs]."""
    if scales is not None:
        weight = expand(weight, scales, layer.dtype)
    return weight if layer.transposed else weight.transpose(1, 2)


def expand(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """MXFP4 weights as plain ones.

    Args:
        blocks: Uint8 [experts, outputs, groups, 16].
        scales: Uint8 [experts, outputs, groups].
        dtype: The dtype of the result.

    Returns:
        [experts, outputs, groups * 32].
    """
    words = words_of(blocks)
    experts, outputs, _ = words.shape
    inner = words.shape[2] * 8
    out = torch.empty(experts, outputs, inner, dtype=dtype, device=blocks.device)
    rows, columns = 16, 256
    with torch.cuda.device_of(blocks):  # type: ignore[no-untyped-call]
        expand_kernel[(triton.cdiv(inner, columns), triton.cdiv(outputs, rows), experts)](
            words, scales, out, outputs, inner, words.stride(0) // _GROUP_WORDS, words.stride(1) // _GROUP_WORDS,
            *scales.stride(), BLOCK_N=rows, BLOCK_K=columns, ASM=has_bfloat16(blocks.device), num_warps=4,
        )  # fmt: skip
    return out


def words_of(blocks: torch.Tensor) -> torch.Tensor:
    """MXFP4 blocks, uint8 [experts, outputs, groups, 16], as int32 [experts, outputs, groups * 4]; no copy."""
    return blocks.flatten(2).view(torch.int32)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a card has instructions for bfloat16; Triton's interpreter has none."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _library_from(layer: ExpertWeights) -> float:
    """The fewest tokens for which the vendor's products are worth it."""
    if not layer.packed:
        return FEW_TOKENS + 1
    unpacked = layer.up.shape[0] * layer.up.shape[1] * layer.hidden * layer.dtype.itemsize
    return EXPANDED_TOKENS if unpacked <= EXPANDED_BYTES else float("inf")


def _library_serves(hidden: torch.Tensor, layer: ExpertWeights) -> bool:
    """Whether torch's grouped products take these tensors without reading sizes on the host.

    Torch has kernels for compute capabilities 9 and 10. On other cards it loops over the experts on the host.
    """
    outputs = layer.up.shape[2 if layer.transposed else 1]
    strides = [layer.hidden, outputs, layer.intermediate]
    if not layer.packed:  # unpacked ones are contiguous
        strides += [*layer.up.stride()[:-1], *layer.down.stride()[:-1]]
    return (
        hidden.dtype == torch.bfloat16
        and all(stride * 2 % 16 == 0 for stride in strides)
        and all(one.stride(-1) == 1 and one.data_ptr() % 16 == 0 for one in (layer.up, layer.down))
        and (not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device)[0] in (9, 10))
    )


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    index: torch.Tensor,
    grouping: Grouping | None,
    layer: ExpertWeights,
    form: GateForm,
    size: int,
    setting: ProductSetting,
) -> None:
    """One product of all assignments; the activation "none" marks the second."""
    outputs, inner = out.shape[1], x.shape[1]
    along_n, along_k = (2, 1) if layer.transposed else (1, 2)
    strides = weight.stride(0), weight.stride(along_n), weight.stride(along_k)
    scale_strides = (0, 0, 0) if scales is None else scales.stride()
    if scales is not None:
        weight = words_of(weight)
        strides = weight.stride(0) // _GROUP_WORDS, weight.stride(1) // _GROUP_WORDS, 1
    x_stride = inner if x.shape[0] == 1 else x.stride(0)  # a single row can have any stride
    slots = index.numel() if grouping is None else grouping.blocks.shape[0]
    early, options = _early(x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        product_kernel[(triton.cdiv(outputs, setting.block_n), slots)](
            x, weight, weight if scales is None else scales, weight if bias is None else bias, out, index,
            index if grouping is None else grouping.order, index if grouping is None else grouping.blocks,
            index.shape[1], layer.experts, outputs, inner, x_stride, *strides, *scale_strides,
            0 if bias is None else bias.stride(0), form.alpha, form.limit, form.shift,
            GROUPED=grouping is not None, UP=form.activation != "none", PACKED=scales is not None,
            ASM=scales is not None and has_bfloat16(x.device), GATED=form.gated,
            INTERLEAVED=form.interleaved, HAS_BIAS=bias is not None, ACTIVATION=form.activation,
            LIMITED=form.limit > 0, BLOCK_M=size, BLOCK_N=setting.block_n, BLOCK_K=setting.block_k,
            EVEN_N=outputs % setting.block_n == 0, EVEN_K=inner % setting.block_k == 0, EARLY=early,
            num_warps=setting.warps, num_stages=setting.stages, **options,
        )  # fmt: skip


def _combine(
    product: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor,
    weights: torch.Tensor,
    places: torch.Tensor | None,
    out: torch.Tensor,
    experts: int,
    residual: torch.Tensor | None = None,
) -> None:
    tokens, hidden = out.shape
    early, options = _early(out.device)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        combine_kernel[(tokens, triton.cdiv(hidden, _COMBINED))](
            product, product if bias is None else bias, index, weights, index if places is None else places,
            out if residual is None else residual, out, experts, hidden, 0 if bias is None else bias.stride(0),
            K=index.shape[1], SORTED=places is not None, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, BLOCK=_COMBINED, EARLY=early, num_warps=1, **options,
        )  # fmt: skip


def _early(device: torch.device) -> tuple[bool, dict[str, Any]]:
    """Whether kernels are launched before their predecessor has ended, and the option that asks for it."""
    early = supports_pdl(device)
    return early, {"launch_pdl": True} if early else {}
