"""In which order a view's products read their weights, so that one can ask for the next one's before it is wanted."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter

import torch
from torch import nn

# By address: of a view's counters, then of a weight. Compiled code serves many layers, and does not say which.
_orders: dict[int, dict[int, torch.Tensor]] = {}


def following_weight(counters: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """The weight [n, k] that the view with these `counters` reads after `weight`; None where it is not known."""
    return _orders.get(counters.data_ptr(), {}).get(weight.data_ptr())


def set_order(view: nn.Module, calls: list[nn.Linear], attention: set[int], counters: torch.Tensor) -> None:
    """Remember which weight follows which, for as long as the view lives.

    Nothing follows a layer's projections: between them and their output's, attention reads more than a cache holds.

    Args:
        view: Whose linear layers are `EngineLinear`s.
        calls: These layers, in the order in which a forward calls them.
        attention: Identities of the attention modules.
        counters: Of the view's products.
    """
    parents = {id(child): id(parent) for parent in view.modules() for child in parent.children()}
    if any(times > 1 for times in Counter(map(id, calls)).values()):
        return  # a layer that serves in several places has no one follower
    steps: list[tuple[torch.Tensor, int]] = []
    for module in calls:
        bundle = getattr(module, "bundle", None)
        weight: torch.Tensor = module.weight if bundle is None else bundle.weight
        if not steps or steps[-1][0].data_ptr() != weight.data_ptr():
            steps.append((weight, parents[id(module)]))
    address = counters.data_ptr()
    _orders[address] = {
        weight.data_ptr(): after
        for (weight, parent), (after, next_parent) in itertools.pairwise(steps)
        if parent != next_parent or parent not in attention
    }
    weakref.finalize(view, _orders.pop, address, None).atexit = False
