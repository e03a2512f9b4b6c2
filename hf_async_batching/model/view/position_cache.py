"""A cache that holds only positions, for layers that ask their cache how many tokens came before.

Llama-4's attention temperature needs it: the attention counts the step's tokens from the length of the cache and
ignores `position_ids`. Packed tokens belong to many rows, so each token has a length of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Names of the cache argument across transformers releases.
_ARGUMENTS = ("cache", "past_key_values")
_QUESTION = "get_seq_length"


class PositionCache:
    """Reports the number of tokens before the step, for each token; passes keys and values through unchanged.

    Args:
        positions: int64 [tokens], the position of each token in its row.

    Attributes:
        before: int64 [tokens], a token's position minus its index in the step.
    """

    is_compileable = False
    is_sliding: tuple[bool, ...] = ()

    def __init__(self, positions: torch.Tensor) -> None:
        self.before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:  # noqa: ARG002
        """Return `before`."""
        return self.before

    def get_mask_sizes(self, q_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Return the number of keys and the index of the first."""
        return q_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return the index of the first query."""
        return 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,  # noqa: ARG002
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values unchanged."""
        return key_states, value_states


def cache_argument(view: nn.Module, layers: Iterable[nn.Module]) -> str | None:
    """Name of the argument by which a model's forward takes the cache that its attention layers ask for a length.

    Args:
        view: The model.
        layers: Its attention modules.

    Returns:
        The name; None if no layer asks.
    """
    if not any(_asks(type(layer)) for layer in layers):
        return None
    parameters = inspect.signature(inspect.unwrap(type(view).forward)).parameters
    return next((name for name in _ARGUMENTS if name in parameters), _ARGUMENTS[0])


def _asks(layer_class: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(layer_class.forward), "__code__", None)
    return code is not None and _QUESTION in code.co_names
