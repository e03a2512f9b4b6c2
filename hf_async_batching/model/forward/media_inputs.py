"""What pictures, videos and sounds bring to a packed step besides embeddings: positions, and additions to layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from hf_async_batching.core.row_layout import MAX_POSITION_DIMS
from hf_async_batching.model.forward.step_inputs import PromptPiece


def position_dims(view: PreTrainedModel) -> int:
    """Dimensions of the positions that `generate` prepares for a model; 0 if a position is one number.

    Args:
        view: A view of the model; `generate` keeps state in some models' modules.

    Returns:
        The dimensions; 0 also if the row tables hold fewer: then texts are served, and pictures are refused.
    """
    tokens = torch.ones(1, 2, dtype=torch.long, device=next(view.parameters()).device)
    model: Any = view
    try:
        positions = model._prepare_position_ids_for_generation(tokens, {})
    except Exception:  # a family's own code; `generate` then fails too, or never calls it
        return 0
    if positions is None or positions.dim() != 3:
        # MiniCPM-V 4.7 prepares four dimensions for prompts with pictures alone.
        name = "_prepare_position_ids_for_generation"
        own = getattr(type(view), name, None) is not getattr(GenerationMixin, name, None)
        return 4 if own and any("rope_deltas" in vars(module) for module in view.modules()) else 0
    dims: int = positions.shape[0]
    return dims if dims <= MAX_POSITION_DIMS else 0


def rope_positions(
    positions: torch.Tensor, rope: torch.Tensor | None, pieces: Sequence[PromptPiece], dims: int
) -> torch.Tensor:
    """int64 [dims, tokens]: the positions of a step's tokens in each dimension.

    Args:
        positions: int64 [tokens], numbers of tokens before each token.
        rope: int64 [dims, tokens], positions of tokens behind their rows' prompts; None if these are `positions`.
        pieces: Pieces of prompts, with positions of their own.
        dims: Dimensions.
    """
    if rope is None:
        rope = positions.expand(dims, -1)
    if any(piece.positions is not None for piece in pieces):
        rope = rope.clone()
        for piece in pieces:
            if piece.positions is not None:
                rope[:, piece.start : piece.start + piece.positions.shape[1]] = piece.positions
    return rope


@contextmanager
def merging_at_decoder(view: Any, pieces: Sequence[PromptPiece], tokens: int) -> Iterator[None]:
    """Let the decoder of a view read the pieces that its model has merged, in place of the tokens' embeddings.

    The model embeds the ids of the step itself: some families replace a placeholder's id, which a completion can
    contain too.

    Args:
        view: The view.
        pieces: Pieces of prompts in the step; if one is merged, all are given to the decoder.
        tokens: Tokens of the step.
    """
    if not any(piece.merged for piece in pieces):
        yield
        return
    added: dict[str, Any] = {}
    with_layers = [piece for piece in pieces if piece.layers]
    if with_layers:
        mask = torch.zeros(1, tokens, dtype=torch.bool, device=with_layers[0].embeddings.device)
        for piece in with_layers:
            mask[0, piece.start : piece.start + len(piece.embeddings)] = True
        # Zeros where a piece is text: as good as nothing.
        layers = [torch.cat(layer) for layer in zip(*(piece.layers for piece in with_layers), strict=True)]
        added = {"visual_pos_masks": mask, "deepstack_visual_embeds": layers}

    def merge(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embedded = kwargs["inputs_embeds"].clone()
        for piece in pieces:
            embedded[0, piece.start : piece.start + len(piece.embeddings)] = piece.embeddings
        return args, {**kwargs, "inputs_embeds": embedded, **added}

    hook = view.get_decoder().register_forward_pre_hook(merge, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
