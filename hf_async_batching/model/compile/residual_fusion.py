"""Fuse residual sums into the product, or the experts, before them: a kernel and a pass over memory less per sum."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_SUMS = (operator.add, operator.iadd, torch.add)
# By names, because the operators exist once the experts' room is imported.
_EXPERTS = "hf_async_batching.experts", "hf_async_batching.experts.default"


def fuse_residual_sums(graph: fx.Graph) -> int:
    """Replace each sum of an `EngineLinear` product and a tensor of the same shape by one operator.

    Args:
        graph: The graph that Dynamo traced; it is changed in place.

    Returns:
        The number of sums that were replaced.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _SUMS or len(node.args) != 2 or node.kwargs:
            continue
        products = [arg for arg in node.args if _is_product(arg) and len(arg.users) == 1]
        if not products:
            continue
        # If both terms are products, take the later one: the other is ready by then.
        product = max(products, key=lambda one: order[one])
        residual = node.args[0] if node.args[1] is product else node.args[1]
        if residual is product or not _alike(product, residual):
            continue
        with graph.inserting_before(node):
            both = graph.call_function(_with_residual(product.target), (*product.args, residual))
        both.meta.update(node.meta)
        node.replace_all_uses_with(both)
        graph.erase_node(node)
        graph.erase_node(product)
        order[both] = order[node]
        merged += 1
    return merged


def fuse_expert_sums(graph: fx.Graph) -> int:
    """Replace each sum of a layer's experts and a tensor with as many elements by one operator.

    Args:
        graph: The graph that Dynamo traced; it is changed in place.

    Returns:
        The number of sums that were replaced.
    """
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _SUMS or len(node.args) != 2 or node.kwargs:
            continue
        for term, residual in (node.args, node.args[::-1]):
            shaped = _shaped_experts(term)
            if not shaped or residual is term or not _alike(shaped[0], residual):
                continue
            with graph.inserting_before(node):
                both = graph.call_function(
                    torch.ops.hf_async_batching.experts_add.default, (*shaped[-1].args, residual)
                )
            both.meta.update(node.meta)
            node.replace_all_uses_with(both)
            graph.erase_node(node)
            for unused in shaped:
                graph.erase_node(unused)
            merged += 1
            break
    return merged


def _shaped_experts(arg: object) -> list[fx.Node]:
    """The operator of the experts behind changes of shape, as the last of its nodes; empty if there is none."""
    found: list[fx.Node] = []
    while isinstance(arg, fx.Node) and len(arg.users) == 1:
        found.append(arg)
        if arg.op == "call_function" and str(arg.target) in _EXPERTS:
            return found
        if arg.op != "call_method" or arg.target not in ("view", "reshape"):
            break
        arg = arg.args[0]
    return []


def _is_product(arg: object) -> bool:
    return isinstance(arg, fx.Node) and arg.op == "call_function" and _with_residual(arg.target) is not None


def _with_residual(target: object) -> Any:
    """The operator that adds a residual to what another one computes; None if there is none."""
    ops = torch.ops.hf_async_batching
    for name in ("linear", "quantized_linear"):
        plain = getattr(ops, name, None)  # a room that nothing imported has defined no operator
        if plain is not None and target in (plain, plain.default):
            return getattr(ops, f"{name}_add").default
    return None


def _alike(product: fx.Node, residual: object) -> bool:
    if not isinstance(residual, fx.Node):
        return False
    left, right = product.meta.get("example_value"), residual.meta.get("example_value")
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    # Symbolic sizes are compared by name: comparing their values would add a guard.
    return left.dtype == right.dtype and str(left.shape) == str(right.shape)
