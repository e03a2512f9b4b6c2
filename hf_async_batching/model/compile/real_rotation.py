"""Write rotary embeddings by complex numbers as real arithmetic, which inductor can fuse with its neighbours.

DeepSeek-V2 and Llama 4 multiply queries and keys by complex frequencies. Inductor generates no code for complex
numbers and would launch a kernel of torch for each operation.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

_PRODUCTS = (operator.mul, torch.mul)


def make_rotations_real(graph: fx.Graph) -> int:
    """Replace each `view_as_real(view_as_complex(x) * frequencies)` by products of real numbers.

    Args:
        graph: The graph that Dynamo traced; it is changed in place.

    Returns:
        The number of rotations that were replaced.
    """
    replaced = 0
    for node in list(graph.nodes):
        if not _calls(node, (torch.view_as_real,)):
            continue
        product = node.args[0]
        if not _calls(product, _PRODUCTS) or len(product.args) != 2 or product.kwargs or len(product.users) != 1:
            continue
        number, frequencies = product.args
        if not _calls(number, (torch.view_as_complex,)):
            number, frequencies = frequencies, number
        if not _calls(number, (torch.view_as_complex,)) or not _is_complex(frequencies):
            continue
        with graph.inserting_before(node):
            pairs = number.args[0]
            turns = graph.call_function(torch.view_as_real, (frequencies,))
            real, imaginary = (graph.call_function(torch.select, (pairs, -1, part)) for part in (0, 1))
            cosine, sine = (graph.call_function(torch.select, (turns, -1, part)) for part in (0, 1))
            parts = [
                graph.call_function(join, tuple(graph.call_function(operator.mul, pair) for pair in terms))
                for join, terms in (
                    (operator.sub, ((real, cosine), (imaginary, sine))),
                    (operator.add, ((real, sine), (imaginary, cosine))),
                )
            ]
            rotated = graph.call_function(torch.stack, (parts, -1))
        rotated.meta.update(node.meta)
        node.replace_all_uses_with(rotated)
        graph.erase_node(node)
        graph.erase_node(product)
        if not number.users:
            graph.erase_node(number)
        replaced += 1
    return replaced


def _calls(node: object, functions: tuple[object, ...]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in functions


def _is_complex(node: object) -> bool:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.complex64
