"""Replace what routers of experts compute by our operators, in the graphs that Dynamo traced.

A router takes a small product, a softmax, a selection and a sort, each with a launch of its own. And torch's selection
keeps all compiled code beside it from programmatic dependent launch (`pdl_check`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from hf_async_batching.experts.topk import MOST_CHOSEN, MOST_SCORES

_TOPK = (torch.topk, "topk")
_SOFTMAX = (torch.softmax, torch.nn.functional.softmax, "softmax")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LINEAR = torch.nn.functional.linear


def fuse_routers(graph: fx.Graph) -> tuple[int, int]:
    """Replace each choice of the largest scores, and each product of an activation and a plain weight.

    Args:
        graph: The graph that Dynamo traced; it is changed in place.

    Returns:
        How many choices and how many products were replaced.
    """
    nodes = list(graph.nodes)
    return sum(_fuse_choice(graph, node) for node in nodes), sum(_fuse_product(graph, node, nodes) for node in nodes)


def _fuse_choice(graph: fx.Graph, node: fx.Node) -> bool:
    """Replace `topk` over the last dimension, with the softmax before it."""
    if not _calls(node, _TOPK):
        return False
    given = _arguments(node, ("input", "k", "dim", "largest", "sorted"))
    x, k = given.get("input"), given.get("k")
    scores = _example(x)
    if (
        scores is None
        or not isinstance(x, fx.Node)
        or type(k) is not int
        or scores.dtype not in _FLOATS
        or not _is_last(given.get("dim", -1), scores)
        or given.get("largest", True) is not True
        or type(scores.shape[-1]) is not int
        or not 0 < k <= min(scores.shape[-1], MOST_CHOSEN)
        or scores.shape[-1] > MOST_SCORES
        or any(user.target is not operator.getitem for user in node.users)
    ):
        return False
    source = _before_softmax(x)
    with graph.inserting_before(node):
        packed = graph.call_function(
            torch.ops.hf_async_batching.topk.default, (x if source is None else source, k, source is not None)
        )
        first = graph.call_method("narrow", (packed, -1, 0, k))
        last = graph.call_method("narrow", (packed, -1, k, k))
        # Copies, because models change the scores in place.
        values = graph.call_method("clone", (graph.call_method("view", (first, torch.float32)),))
        results = graph.call_method("to", (values, scores.dtype)), graph.call_method("to", (last, torch.int64))
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        results[user.args[1]].meta.update(user.meta)  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)
    if source is not None and not x.users:
        graph.erase_node(x)
    return True


def _before_softmax(x: fx.Node) -> fx.Node | None:
    """The input of a softmax in float32 whose result only one node uses; None if `x` is no such softmax."""
    if not _calls(x, _SOFTMAX) or len(x.users) != 1:
        return None
    names = ("input", "dim", "_stacklevel", "dtype") if x.target is _SOFTMAX[1] else ("input", "dim", "dtype")
    given = _arguments(x, names)
    source, result = given.get("input"), _example(x)
    before = _example(source)
    if before is None or result is None or not isinstance(source, fx.Node):
        return None
    if result.dtype != torch.float32 or before.dtype not in _FLOATS or not _is_last(given.get("dim"), result):
        return None
    return source


def _fuse_product(graph: fx.Graph, node: fx.Node, nodes: list[fx.Node]) -> bool:
    """Replace `linear` of a weight that belongs to no linear layer by the operator of those that do."""
    if not _calls(node, (_LINEAR,)):
        return False
    given = _arguments(node, ("input", "weight", "bias"))
    x, weight, bias = _example(given.get("input")), _example(given.get("weight")), given.get("bias")
    counters = next((other.args[3] for other in nodes if _is_product(other)), None)
    if counters is None or x is None or weight is None or getattr(given["weight"], "op", "") != "placeholder":
        return False
    if x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16) or weight.dim() != 2:
        return False
    if isinstance(counters, fx.Node) and counters.op != "placeholder":
        return False  # it may come after this node
    with graph.inserting_before(node):
        product = graph.call_function(
            torch.ops.hf_async_batching.linear.default, (given["input"], given["weight"], bias, counters)
        )
    product.meta.update(node.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    return True


def _is_product(node: fx.Node) -> bool:
    targets = (torch.ops.hf_async_batching.linear, torch.ops.hf_async_batching.linear.default)
    return node.op == "call_function" and node.target in targets


def _calls(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments by name; a method's tensor is its "input"."""
    return dict(zip(names, node.args, strict=False)) | {
        {"self": "input"}.get(name, name): value for name, value in node.kwargs.items()
    }


def _example(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _is_last(dim: Any, tensor: torch.Tensor) -> bool:
    return type(dim) is int and dim in (-1, tensor.dim() - 1)
