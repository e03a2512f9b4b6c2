"""Check whether a model accepts prompts as embeddings, and whether given embeddings fit it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_async_batching.checks.logits_tolerance import logits_tolerance
from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.linear.rounding import relative_error
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.view.model_view import make_view

_CHECK_TOKENS = 7


def check_embeddings(embeddings: torch.Tensor, length: int, forward: PackedForward | CacheForward) -> None:
    """Refuse embeddings that do not fit the model or a prompt of `length` tokens.

    Args:
        embeddings: [length, hidden], floating point.
        length: Tokens of the prompt.
        forward: The engine's forward.

    Raises:
        ValueError: The shape, the layout or the dtype is wrong.
    """
    if not isinstance(embeddings, torch.Tensor) or embeddings.layout is not torch.strided or embeddings.is_meta:
        raise ValueError(
            "`inputs_embeds` must be a dense tensor with values, got "
            f"{getattr(embeddings, 'layout', type(embeddings).__name__)} on {getattr(embeddings, 'device', None)}"
        )
    if embeddings.dim() != 2 or embeddings.shape[1] != forward.embedding_size or not embeddings.is_floating_point():
        raise ValueError(
            f"`inputs_embeds` of a prompt must be floating point [length, {forward.embedding_size}], "
            f"got {tuple(embeddings.shape)} and {embeddings.dtype}"
        )
    if len(embeddings) != length:
        raise ValueError(f"`inputs_embeds` has {len(embeddings)} positions for a prompt of {length} tokens")


@torch.inference_mode()
def check_takes_embeddings(model: PreTrainedModel, forward: PackedForward | CacheForward) -> None:
    """Compare the plain forward over token ids with the plain forward over their embeddings.

    Args:
        model: The user's model; the check runs on a view of it.
        forward: The engine's forward.

    Raises:
        UnsupportedModelError: The model takes no embeddings, or also needs the token ids.
    """
    view: Any = make_view(model, None)
    why = "its forward does not accept them"
    if not forward.takes_embeddings:
        why = "it is served through its own cache class, by token ids"
    elif "inputs_embeds" in inspect.signature(view.forward).parameters:
        ids = torch.arange(3, 3 + _CHECK_TOKENS, device=forward.device)[None] % forward.vocab_size
        given: dict[str, Any] = {"use_cache": False}
        if forward.position_dims:
            # Such a model would compute positions from what its last call left in its modules.
            counted = torch.arange(_CHECK_TOKENS, device=forward.device)
            given["position_ids"] = counted.expand(forward.position_dims, 1, -1)
        try:
            expected = view(input_ids=ids, **given).logits.float()
            got = view(inputs_embeds=view.get_input_embeddings()(ids), **given).logits.float()
        except Exception as error:
            why = repr(error)
        else:
            difference = relative_error(got, expected)
            if difference <= logits_tolerance(forward):
                return
            why = f"its logits differ by {difference:.2g} (relative norm) from its logits for the token ids"
    raise UnsupportedModelError(
        f"`inputs_embeds` is not served for {forward.name}: {why}. Use plain `model.generate` for this call."
    )
