"""Find projections of one input (q/k/v, gate/up) by watching a forward, and pack their weights without a copy.

The weights of a group move, one group at a time, into one tensor, and the model's own parameters become views of it.
They stay the same `Parameter` objects with the same values. So `state_dict`, in-place updates, optimizers and saving
still work, and the product reads what an in-place update writes. torch.compile does not merge parallel products;
vLLM's transformers backend had to fuse them as well (vllm #45284).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_async_batching.devices.cuda import synchronize_device
from hf_async_batching.linear.engine_linear import bundle_together, is_plain
from hf_async_batching.runtime.forking import ForkSafeLock

logger = logging.getLogger(__name__)

_packing = ForkSafeLock()


class LinearCalls:
    """Calls of linear layers in one forward, in order: each module with its input tensor."""

    def __init__(self) -> None:
        # The inputs are kept, so that no later tensor reuses their ids.
        self.calls: list[tuple[nn.Linear, torch.Tensor]] = []


@contextmanager
def watch_linears(view: nn.Module) -> Iterator[LinearCalls]:
    """Record the calls of a view's plain linear layers."""
    seen = LinearCalls()

    def remember(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        if len(inputs) == 1:
            seen.calls.append((module, inputs[0]))

    hooks = [m.register_forward_pre_hook(remember) for m in view.modules() if is_plain(m)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def parallel_projections(view: PreTrainedModel, seen: LinearCalls) -> list[list[nn.Linear]]:
    """Groups of two or more linear layers of one parent module that were each called once, with the same tensor."""
    times = Counter(id(module) for module, _ in seen.calls)
    owners = Counter(id(p) for m in view.modules() for p in m.parameters(recurse=False))
    parent = {id(child): id(module) for module in view.modules() for child in module.children()}
    groups: dict[tuple[int, int], list[nn.Linear]] = {}
    for module, x in seen.calls:
        if times[id(module)] == 1 and all(owners[id(p)] == 1 for p in module.parameters()):
            groups.setdefault((id(x), parent[id(module)]), []).append(module)
    return [group for group in groups.values() if len(group) > 1 and _alike(group)]


def _alike(group: list[nn.Linear]) -> bool:
    first = group[0]
    return all(
        module.in_features == first.in_features
        and (module.bias is None) == (first.bias is None)
        and module.weight.dtype == first.weight.dtype
        and module.weight.device == first.weight.device
        and module.weight.is_contiguous()
        for module in group
    )


def pack(groups: list[list[nn.Linear]]) -> int:
    """Pack each group's weights, and let its layers share a product. Returns the number of packed groups.

    If an earlier engine has packed a group's weights, the group uses that tensor. A group whose parameters share
    memory with other tensors is left unchanged.

    Args:
        groups: `EngineLinear`s of a view, each group in the order of its layers' calls.
    """
    packed = 0
    # Outside inference mode, because tensors made in it could not be trained later.
    with _packing, torch.inference_mode(False):
        for group in groups:
            weight = _together([module.weight for module in group])
            if weight is None:
                continue
            bias = None
            if group[0].bias is not None:
                bias = _together([module.bias for module in group])
                if bias is None:
                    continue
            bundle_together(group, weight, bias)
            packed += 1
    return packed


def _together(parameters: list[torch.Tensor]) -> torch.Tensor | None:
    """One tensor that consists of the parameters in order; None if they cannot be moved."""
    first = parameters[0]
    rows = [p.shape[0] for p in parameters]
    shape = (sum(rows), *first.shape[1:])
    following = first.data_ptr()
    for p in parameters:
        if p.data_ptr() != following or p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            break
        following += p.nbytes
    else:
        return torch.as_strided(first.data, shape, first.stride(), first.storage_offset())
    if any(p.untyped_storage().nbytes() != p.nbytes for p in parameters):
        return None
    together = torch.empty(shape, dtype=first.dtype, device=first.device)
    old = [p.data for p in parameters]
    try:
        for p, part in zip(parameters, torch.split(together, rows), strict=True):
            part.copy_(p.data)
            p.data = part
    except RuntimeError:
        logger.debug("weights cannot be packed", exc_info=True)
        for p, before in zip(parameters, old, strict=True):
            p.data = before
        return None
    if first.is_cuda:
        # Another thread's forward may still read the old memory, which the allocator gets back here.
        synchronize_device(first.device)
    return together
