"""A cache that holds positions alone, for layers that ask their cache how many tokens came before.

Llama-4's temperature is the case in point: its attention counts the tokens of the step from the length of the cache,
whatever `position_ids` say. Packed tokens are of many rows, so that each has a length of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Names of the argument in the releases of transformers.
_ARGUMENTS = ("cache", "past_key_values")
_QUESTION = "get_seq_length"


class PositionCache:
    """Answers as a cache whose tokens are those before the step; keys and values go through it as they are.

    Args:
        positions: int64 [tokens], of each token in its row.

    Attributes:
        before: int64 [tokens], what must be added to a token's place in the step to come to its position.
    """

    is_compileable = False
    is_sliding: tuple[bool, ...] = ()

    def __init__(self, positions: torch.Tensor) -> None:
        self.before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:  # noqa: ARG002
        """See `before`."""
        return self.before

    def get_mask_sizes(self, q_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Keys, and where they begin."""
        return q_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Where queries begin."""
        return 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,  # noqa: ARG002
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values as they are."""
        return key_states, value_states


def cache_argument(view: nn.Module, layers: Iterable[nn.Module]) -> str | None:
    """Under which name a model's forward takes the cache that its attention layers ask for a length.

    Args:
        view: The model.
        layers: Its attention modules.

    Returns:
        The name; None where no layer asks.
    """
    if not any(_asks(type(layer)) for layer in layers):
        return None
    parameters = inspect.signature(inspect.unwrap(type(view).forward)).parameters
    return next((name for name in _ARGUMENTS if name in parameters), _ARGUMENTS[0])


def _asks(layer_class: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(layer_class.forward), "__code__", None)
    return code is not None and _QUESTION in code.co_names
