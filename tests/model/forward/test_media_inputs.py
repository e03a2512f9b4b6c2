"""Positions of pictures in a step, and what they add to the first layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from support.tiny_models import tiny_model

from hf_async_batching.core.row_layout import MAX_POSITION_DIMS
from hf_async_batching.coverage.media_models import tiny_media_model
from hf_async_batching.model.forward.media_inputs import merging_at_decoder, position_dims, rope_positions
from hf_async_batching.model.forward.step_inputs import PromptPiece
from hf_async_batching.model.view.model_view import make_view


def test_dimensions_are_those_that_generate_prepares() -> None:
    assert position_dims(make_view(tiny_model("Llama"), None)) == 0
    assert position_dims(make_view(tiny_media_model("LlavaForConditionalGeneration"), None)) == 0
    assert position_dims(make_view(tiny_media_model("Qwen2VLForConditionalGeneration"), None)) == 4


def test_more_dimensions_than_the_tables_hold_count_as_none() -> None:
    class Odd(torch.nn.Linear):
        dims = 3

        def _prepare_position_ids_for_generation(self, tokens: torch.Tensor, _kwargs: Any) -> torch.Tensor:
            return tokens.expand(self.dims, 1, -1)

    odd: Any = Odd(1, 1)
    assert position_dims(odd) == 3
    Odd.dims = MAX_POSITION_DIMS
    assert position_dims(odd) == MAX_POSITION_DIMS
    Odd.dims += 1
    assert position_dims(odd) == 0


def test_pieces_replace_positions() -> None:
    counted = torch.arange(6)
    embeddings = torch.zeros(2, 3)
    assert rope_positions(counted, None, (), 3).tolist() == [list(range(6))] * 3
    given = torch.tensor([[0, 1], [7, 8], [9, 9]])
    rope = counted + torch.tensor([[0], [10], [20]])
    before = rope.clone()
    pieces = (PromptPiece(0, embeddings), PromptPiece(3, embeddings, given))
    got = rope_positions(counted, rope, pieces, 3)
    assert got[:, 3:5].tolist() == given.tolist()
    assert torch.equal(got[:, [0, 1, 2, 5]], rope[:, [0, 1, 2, 5]])
    assert torch.equal(rope, before), "a captured step's tensor stays as it is"


def test_a_decoder_reads_merged_pieces() -> None:
    """Their embeddings in place of its tokens', and additions to layers; no hook stays."""
    seen: list[dict[str, Any]] = []

    class Decoder(torch.nn.Module):
        def forward(self, **kwargs: Any) -> None:
            seen.append(kwargs)

    decoder = Decoder()
    view = SimpleNamespace(get_decoder=lambda: decoder)
    layer = torch.arange(6.0).view(2, 3)
    plain = PromptPiece(0, torch.full((1, 3), 7.0))
    merged = PromptPiece(2, torch.full((2, 3), 8.0), None, (layer, layer + 1), merged=True)
    embedded = torch.zeros(1, 5, 3)
    for pieces in ((plain, merged), (merged._replace(layers=()),), (plain,)):
        with merging_at_decoder(view, pieces, 5):
            decoder(inputs_embeds=embedded)
    decoder(inputs_embeds=embedded)
    assert seen[0]["inputs_embeds"][0, :, 0].tolist() == [7, 0, 8, 8, 0]
    assert seen[0]["visual_pos_masks"].tolist() == [[False, False, True, True, False]]
    assert [one.tolist() for one in seen[0]["deepstack_visual_embeds"]] == [layer.tolist(), (layer + 1).tolist()]
    assert seen[1]["inputs_embeds"][0, :, 0].tolist() == [0, 0, 8, 8, 0]
    assert set(seen[1]) == {"inputs_embeds"}
    assert [one["inputs_embeds"] is embedded for one in seen[2:]] == [True, True], "others are embedded elsewhere"
    assert not embedded.any()
