"""What a decoder reads of prompts with pictures, and what refuses them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from hf_async_batching import UnsupportedArgumentError
from hf_async_batching.coverage.media_models import IMAGE, media_batch, tiny_media_model
from hf_async_batching.inputs.media_arguments import media_of, split_media, user_name
from hf_async_batching.inputs.prompts import MediaInputs, Prompt
from hf_async_batching.model.forward.prompt_encoder import PromptEncoder, prompt_encoder


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_media_model("LlavaForConditionalGeneration")


@pytest.fixture(scope="module")
def qwen() -> Any:
    return tiny_media_model("Qwen2VLForConditionalGeneration")


def encode(model: Any, batch: dict[str, torch.Tensor]) -> list[Prompt]:
    """As `submit` does it for one row; a batch goes without the preparation of `generate`."""
    encoder = PromptEncoder(model)
    arguments = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    return encoder.encode(*encoder.prepare(batch["input_ids"], arguments), "pixel_values")


def media(prompt: Prompt) -> MediaInputs:
    assert isinstance(prompt.embeddings, MediaInputs)
    return prompt.embeddings


def test_embeddings_are_the_model_s(llava: Any) -> None:
    batch = media_batch(llava, [[1, 2]])
    (prompt,) = encode(llava, batch)
    ids = batch["input_ids"][0]
    with torch.no_grad():
        features = torch.cat(list(llava.get_image_features(batch["pixel_values"], return_dict=True).pooler_output))
        embedded = llava.get_input_embeddings()(ids)
    embedded[ids == IMAGE] = features
    assert torch.equal(media(prompt).embeddings, embedded)
    assert prompt.tokens == prompt.shown == ids.tolist()
    assert media(prompt).positions is None
    assert prompt.shifts == ()


def test_padding_and_rows_without_pictures(llava: Any) -> None:
    batch = media_batch(llava, [[], [1]])
    mask = batch["attention_mask"]
    arguments = {"attention_mask": mask, "pixel_values": batch["pixel_values"]}
    text, picture = PromptEncoder(llava).encode(batch["input_ids"], arguments, "pixel_values")
    assert text == Prompt(batch["input_ids"][0][mask[0].bool()].tolist(), batch["input_ids"][0].tolist())
    assert len(media(picture).embeddings) == len(picture.tokens) == int(mask[1].sum())
    assert picture.shown == batch["input_ids"][1].tolist()


def test_positions_and_shifts(qwen: Any) -> None:
    batch = media_batch(qwen, [[1]])  # 2 x 4 placeholders, which count as 4 positions
    (prompt,) = encode(qwen, batch)
    expected, _ = qwen.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    positions = media(prompt).positions
    assert positions is not None
    assert torch.equal(positions[1:], expected[:, 0])
    assert positions[0].tolist() == list(range(len(prompt.tokens)))
    assert prompt.shifts == (0, -4, -4, -4)


def test_keys_follow_from_contents_and_positions(qwen: Any) -> None:
    def keys(pictures: list[int], **changes: Any) -> list[int]:
        (prompt,) = encode(qwen, {**media_batch(qwen, [pictures], seed=3), **changes})
        assert prompt.keys is not None
        return list(prompt.keys)

    ids = media_batch(qwen, [[1, 4]], seed=3)["input_ids"][0]
    one, same, other = keys([1, 4]), keys([1, 4]), keys([1, 7])
    assert one == same
    first = int((ids == IMAGE).nonzero()[0])
    assert one[:first] == ids[:first].tolist(), "text before a picture has the usual keys"
    assert {key < 0 for key, token in zip(one, ids.tolist(), strict=True) if token == IMAGE} == {True}
    differing = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    assert ids[differing].tolist() == [IMAGE] * 8
    # The same placeholders and pixels as 4 x 2 patches instead of 2 x 4: other features and positions.
    turned = keys([1, 4], image_grid_thw=torch.tensor([[1, 8, 4], [1, 4, 8]]))
    assert turned[first] != one[first]
    behind = int((ids == IMAGE).nonzero()[7]) + 1
    assert one[behind] >= 2**32, "text behind a picture is shifted"


def test_placeholders_beyond_the_vocabulary() -> None:
    model: Any = tiny_media_model("LlavaForConditionalGeneration")
    beyond = model.get_input_embeddings().num_embeddings + 5
    batch = media_batch(model, [[1]])
    model.config.image_token_id = model.model.config.image_token_id = beyond
    with torch.no_grad():
        lookup = model.get_input_embeddings().forward
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, beyond)
    # The family itself looks placeholders up; others replace the id before.
    encoder = PromptEncoder(model)
    table: Any = encoder._view.get_input_embeddings()
    table.forward = lambda given: lookup(given.masked_fill(given == beyond, 0))
    (prompt,) = encoder.encode(ids, {"pixel_values": batch["pixel_values"]}, "pixel_values")
    assert prompt.shown == ids[0].tolist()
    assert max(prompt.tokens) < beyond
    assert prompt.keys is not None
    assert [key < 0 for key in prompt.keys] == [token == beyond for token in prompt.shown]


def test_other_arguments_of_the_decoder_are_refused(llava: Any) -> None:
    encoder = PromptEncoder(llava)
    plain = encoder._view.model.forward

    def with_more(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs, cross_attention_states=torch.zeros(1))

    encoder._view.model.forward = with_more
    batch = media_batch(llava, [[1]])
    with pytest.raises(UnsupportedArgumentError, match=r"`pixel_values` .* also reads `cross_attention_states`"):
        encoder.encode(batch["input_ids"], {"pixel_values": batch["pixel_values"]}, "pixel_values")


def test_fractions_of_positions_are_refused(qwen: Any) -> None:
    batch = media_batch(qwen, [[1]])
    encoder = PromptEncoder(qwen)
    arguments = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    ids, prepared = encoder.prepare(batch["input_ids"], arguments)
    whole = prepared["position_ids"].double()
    (prompt,) = encoder.encode(ids, {**prepared, "position_ids": whole}, "pixel_values")
    positions = media(prompt).positions
    assert positions is not None
    assert positions.dtype == torch.int64
    with pytest.raises(UnsupportedArgumentError, match="no whole numbers"):
        encoder.encode(ids, {**prepared, "position_ids": whole + 0.25}, "pixel_values_videos")


def test_an_encoder_follows_its_model_and_dies_with_it() -> None:
    model: Any = tiny_media_model("LlavaForConditionalGeneration")
    encoder = prompt_encoder(model)
    assert prompt_encoder(model) is encoder
    model.model.vision_tower = torch.nn.Sequential()
    assert prompt_encoder(model) is not encoder
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


def test_arguments_about_pictures() -> None:
    pixels, types = torch.zeros(1), torch.zeros(1, 2)
    assert media_of({"max_new_tokens": 3, "pixel_values": None, "mm_encoder_outputs": {}}) == []
    assert media_of({"image_grid_thw": pixels, "pixel_values": pixels}) == ["pixel_values", "image_grid_thw"]
    given = {"top_k": 3, "pixel_values": pixels, "mm_token_type_ids": types}
    assert split_media(given) == ({"pixel_values": pixels, "mm_token_type_ids": types}, {"top_k": 3})
    assert split_media({"top_k": 3, "pixel_values": None}) == ({}, {"top_k": 3})
    assert user_name(["image_grid_thw", "input_features"]) == "input_features"
    assert user_name([]) == "mm_encoder_outputs"
