"""Check whether tokens influence each other outside of attention: by convolutions, recurrent states or shifts.

Over packed tokens such a family would mix the rows of a batch. In 16-bit numbers, the difference from plain `generate`
could be small enough to pass for rounding. So the check compares with no reference: with attention removed, a token's
logits must not depend on the token before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, cache_utils

from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.linear.rounding import relative_error

# Relative norms. In mixtures of experts, the other token decides which products share a kernel, and thus the rounding.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_OF_16_BITS = 3e-2


def refuse_states(view: PreTrainedModel) -> None:
    """Refuse a family whose cache holds states besides keys and values.

    Raises:
        UnsupportedModelError: The family's cache holds states, or `generate` makes it no cache of the usual class.
    """
    generator: Any = view
    if not generator._supports_default_dynamic_cache():
        raise UnsupportedModelError("it keeps its state in a cache class of its own")
    try:
        layers = DynamicCache(config=generator.config.get_text_config(decoder=True)).layers
    except (AttributeError, KeyError, ValueError):
        return  # the config does not describe its layers
    if any(isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin) for layer in layers):
        raise UnsupportedModelError("it keeps recurrent states or convolves neighbouring tokens")


def refuse_mixing(run: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, vocab_size: int) -> None:
    """Refuse a family whose tokens influence each other without attention.

    Args:
        run: Returns logits [tokens, vocab] for token ids [tokens], with attention that returns zeros.
        tokens: int64 [at least 2].
        vocab_size: Upper bound of token ids, exclusive.

    Raises:
        UnsupportedModelError: The last token's logits change when the other tokens change.
    """
    other = (tokens + vocab_size // 2) % vocab_size
    other[-1] = tokens[-1]
    logits = run(tokens)
    difference = relative_error(run(other)[-1].float(), logits[-1].float())
    # Without attention, some families divide by zero in a normalization: NaN decides nothing.
    if difference > _TOLERANCE.get(logits.dtype, _TOLERANCE_OF_16_BITS):
        raise UnsupportedModelError(f"its tokens influence each other outside of attention (by {difference:.2g})")
