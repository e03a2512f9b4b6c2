"""Sizes of the kernels' blocks. No triton."""

from __future__ import annotations

from typing import NamedTuple

FEW_TOKENS = 256
"""Up to this many tokens our kernel computes the products; beyond it the vendor's library does, where it can."""

EXPANDED_TOKENS = 2048
"""From this many tokens MXFP4 weights are unpacked for the vendor's library; fewer go to our kernel."""

EXPANDED_BYTES = 5 << 28
"""The most memory, 1.25 GiB, that one product's unpacked weights may take for a while; otherwise our kernel serves."""

_LEAST_M, _MOST_M, _MOST_PACKED_M = 16, 64, 128


# For each size of a block: outputs, inner elements, warps, loads in flight.
_PACKED = {16: (64, 128, 4, 4), 32: (128, 128, 4, 4), 64: (128, 64, 4, 5), 128: (128, 128, 8, 4)}


class ProductSetting(NamedTuple):
    """Outputs and inner elements per block, warps, and loads in flight.

    The first product of a gated layer computes `block_n` gates and as many inputs to them.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int


class ExpertSetting(NamedTuple):
    """Assignments in a block, and the settings of both products."""

    block_m: int
    up: ProductSetting
    down: ProductSetting


def block_m(assignments: int, experts: int, *, packed: bool = False) -> int:
    """Assignments that one block holds: twice the mean of an expert, so that most weights are read once.

    Each block unpacks its weights again, so blocks of packed weights grow larger.
    """
    mean = -(-2 * assignments // experts)
    return min(max(_LEAST_M, 1 << (mean - 1).bit_length()), _MOST_PACKED_M if packed else _MOST_M)


def first_tokens(experts: int, choices: int, *, packed: bool = False) -> list[int]:
    """The smallest number of tokens for each size of a block, so that all of a layer's kernels can be tried."""
    most = _MOST_PACKED_M if packed else _MOST_M
    sizes = [_LEAST_M << shift for shift in range((most // _LEAST_M).bit_length())]
    # A mean of `size / 2` assignments still fits the block of half the size.
    return [1, *(-(-(size // 4 * experts + 1) // choices) for size in sizes[1:])]


def most_blocks(assignments: int, experts: int, size: int) -> int:
    """Blocks of `size` assignments that any routing needs at most."""
    return min(experts, assignments) + assignments // size


def shared_memory(size: int, setting: ProductSetting, itemsize: int, *, gated: bool, packed: bool = False) -> int:
    """Bytes of shared memory that the loads in flight take; for packed weights, the reordered activations, too."""
    outputs, k = setting.block_n * (1 + gated), setting.block_k
    if packed:
        return (outputs * k // 2 + size * k * itemsize) * setting.stages + size * k * itemsize
    return (outputs + size) * k * itemsize * setting.stages


def default_setting(
    assignments: int,
    experts: int,
    hidden: int,
    intermediate: int,
    itemsize: int,
    memory: int,
    *,
    gated: bool,
    packed: bool = False,
) -> ExpertSetting:
    """The setting by rule.

    Args:
        assignments: Tokens times experts per token.
        experts: Number of experts.
        hidden: Size of a token.
        intermediate: Size of an expert.
        itemsize: Bytes of one weight, or of one element of the activations if the weights are packed.
        memory: Shared memory that a program may take, in bytes.
        gated: Whether the first product computes gates, too.
        packed: Whether the weights are MXFP4.
    """
    size = block_m(assignments, experts, packed=packed)
    if packed:
        up, down = _packed_setting(size, itemsize, gated=gated), _packed_setting(size, itemsize, gated=False)
    elif itemsize > 2:  # no tensor cores: the operands pass through registers
        up, down = ProductSetting(32 // (1 + gated), 32, 4, 3), ProductSetting(32, 32, 4, 3)
    else:
        wide = 128 if size > _LEAST_M else 64
        up = ProductSetting(wide // (1 + gated), *_inner(hidden))
        down = ProductSetting(wide, *_inner(intermediate))
    return ExpertSetting(
        size,
        _fitting(size, up, itemsize, memory, gated=gated, packed=packed),
        _fitting(size, down, itemsize, memory, gated=False, packed=packed),
    )


def _packed_setting(size: int, itemsize: int, *, gated: bool) -> ProductSetting:
    if itemsize > 2:
        return ProductSetting(64 // (1 + gated), 64, 4, 2)
    wide, block_k, warps, stages = _PACKED[size]
    return ProductSetting(wide // (1 + gated), block_k, warps, stages)


def _inner(size: int) -> tuple[int, int, int]:
    """Inner elements per block, warps and loads in flight: 128 elements, or 64 where only these divide the size."""
    return (64, 4, 7) if size % 128 and not size % 64 else (128, 4, 4)


def _fitting(
    size: int, setting: ProductSetting, itemsize: int, memory: int, *, gated: bool, packed: bool
) -> ProductSetting:
    def fits() -> bool:
        return shared_memory(size, setting, itemsize, gated=gated, packed=packed) <= memory

    while setting.stages > 2 and not fits():
        setting = setting._replace(stages=setting.stages - 1)
    while setting.block_k > 32 and not fits():
        setting = setting._replace(block_k=setting.block_k // 2)
    return setting
