"""Inputs of a model's forward that change nothing: processors return token types for plain text too."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_async_batching.model.view.model_view import make_view

_known: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = weakref.WeakKeyDictionary()


def zeros_are_neutral(model: PreTrainedModel, name: str) -> bool:
    """Whether the input `name`, if it is all zeros, leaves the model's logits unchanged; cached for each model.

    It does in most families. GPT-2 adds an embedding for type 0.
    """
    known = _known.setdefault(model, {})
    if name not in known:
        known[name] = _compare(model, name)
    return known[name]


@torch.inference_mode()
def _compare(model: PreTrainedModel, name: str) -> bool:
    view: Any = make_view(model, None)
    ids = torch.arange(3, 9, device=model.device)[None] % view.config.get_text_config().vocab_size
    try:
        expected = view(input_ids=ids, use_cache=False).logits
        got = view(input_ids=ids, use_cache=False, **{name: torch.zeros_like(ids)}).logits
    except Exception:  # a forward that lacks this input can raise anything
        return False
    return bool(torch.allclose(got.float(), expected.float(), rtol=1e-3, atol=1e-4))
