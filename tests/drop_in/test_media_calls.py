"""Calls of `generate` with pictures: its outputs, in ragged batches, in any company, in pieces."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedArgumentError, UnsupportedModelError
from hf_async_batching.coverage.media_models import AUDIO, IMAGE, media_batch, tiny_media_model

CONFIG = BatchingConfig(page_size=16, max_batch_tokens=32, max_rows=6, debug=True)
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FULL: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
ROWS = [[], [1], [2, 3], [4, 1, 5]]

# One class for each way in which pictures reach a decoder. The table of coverage has all classes.
CLASSES = [
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
]


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_media_model("LlavaForConditionalGeneration")


@pytest.fixture(scope="module")
def qwen() -> Any:
    return tiny_media_model("Qwen2VLForConditionalGeneration")


def same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    for mine, want in zip(got.logits, expected.logits, strict=True):
        logprobs, wanted = mine.log_softmax(-1), want.log_softmax(-1)
        assert torch.allclose(logprobs, wanted, atol=2e-4), (logprobs - wanted).abs().max()


@pytest.mark.parametrize("name", CLASSES)
def test_equal_to_generate(name: str) -> None:
    """None to three pictures a row, in pieces of at most 32 tokens; the same tokens without pictures differ."""
    model: Any = tiny_media_model(name)
    batch = media_batch(model, ROWS)
    expected = model.generate(**batch, max_new_tokens=9, **FULL)
    with GenerationManager(model, CONFIG) as manager:
        plug = manager.bind()
        same(model.generate(**batch, max_new_tokens=9, custom_generate=plug, **FULL), expected)
        same(hf_async_batching.generate(model, manager=manager, **batch, max_new_tokens=9, **FULL), expected)
        alone = media_batch(model, [[2, 3]], seed=4)
        same(
            model.generate(**alone, max_new_tokens=9, custom_generate=plug, **FULL),
            model.generate(**alone, max_new_tokens=9, **FULL),
        )
    others = model.generate(**media_batch(model, [[], [6], [7, 8], [9, 6, 8]]), max_new_tokens=1, **FULL)
    for row in (1, 2, 3):
        assert not torch.allclose(others.logits[0][row], expected.logits[0][row], atol=1e-3), "pictures must matter"


def test_late_joins(qwen: Any) -> None:
    """Calls with other pictures, and texts, that come while others decode."""
    batches = [media_batch(qwen, [[n], [n + 1, n]], seed=n) for n in range(3)]
    expected = [qwen.generate(**batch, max_new_tokens=14 - 3 * i, **GREEDY) for i, batch in enumerate(batches)]
    text = qwen.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, **GREEDY)
    got: dict[int, torch.Tensor] = {}
    with GenerationManager(qwen, CONFIG) as manager:
        handle = manager.submit([5, 6, 7], max_new_tokens=20, do_sample=False, eos_token_id=None)
        next(iter(handle))

        def call(i: int) -> None:
            got[i] = qwen.generate(**batches[i], max_new_tokens=14 - 3 * i, custom_generate=manager.bind(), **GREEDY)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [5, 6, 7, *handle.result(60).token_ids] == text[0].tolist()
    assert all(torch.equal(got[i], want) for i, want in enumerate(expected))


def test_preempted_rows_are_computed_again(qwen: Any) -> None:
    """Positions behind pictures follow a row through a preemption."""
    config = BatchingConfig(page_size=16, num_pages=14, max_rows=4, max_batch_tokens=64, prefix_cache=False)
    batch = media_batch(qwen, [[1, 2], [3, 4], [5, 6]], seed=2)
    expected = qwen.generate(**batch, max_new_tokens=40, **GREEDY)
    with GenerationManager(qwen, config) as manager:
        got = qwen.generate(**batch, max_new_tokens=40, custom_generate=manager.bind(), **GREEDY)
        assert manager.stats().preemptions > 0, "no row was preempted"
    assert torch.equal(got, expected)


def test_several_sequences_per_prompt(llava: Any, qwen: Any) -> None:
    for model in (llava, qwen):
        batch = media_batch(model, [[1], [2]])
        expected = model.generate(**batch, max_new_tokens=5, **GREEDY).repeat_interleave(2, 0)
        with GenerationManager(model, CONFIG) as manager:
            got = model.generate(
                **batch,
                max_new_tokens=5,
                num_return_sequences=2,
                custom_generate=manager.bind(seed=1),
                **{**GREEDY, "do_sample": True, "top_k": 1},
            )
        assert torch.equal(got, expected)


def test_options_that_read_the_history(llava: Any) -> None:
    """Penalties count the placeholders, as in `generate`; stop strings and criteria see the ids."""
    batch = media_batch(llava, [[1], [2, 3]])
    seen: list[int] = []

    def watch(ids: torch.Tensor, _scores: Any) -> torch.Tensor:
        seen.append(int((ids == IMAGE).sum()))
        return torch.zeros(len(ids), dtype=torch.bool)

    options: dict[str, Any] = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "max_new_tokens": 8}
    expected = llava.generate(**batch, **options, **GREEDY)
    with GenerationManager(llava, CONFIG) as manager:
        got = llava.generate(**batch, **options, custom_generate=manager.bind(), stopping_criteria=[watch], **GREEDY)
    assert torch.equal(got, expected)
    assert set(seen) == {12}


def test_text_calls_with_neutral_arguments_are_packed(qwen: Any) -> None:
    batch = media_batch(qwen, [[], []])
    neutral = {"pixel_values": None, "image_grid_thw": None, "pixel_values_videos": None}
    expected = qwen.generate(**batch, max_new_tokens=6, **GREEDY)
    with GenerationManager(qwen, CONFIG) as manager:
        got = qwen.generate(**batch, image_grid_thw=None, max_new_tokens=6, custom_generate=manager.bind(), **GREEDY)
        assert manager.assembly is not None
        assert manager.assembly.forward.route == "packed"
        # transformers itself calls the tower with `pixel_values=None`.
        direct = hf_async_batching.generate(qwen, manager=manager, **batch, **neutral, max_new_tokens=6, **GREEDY)
    assert torch.equal(got, expected)
    assert torch.equal(direct, expected)


def test_both_directions_are_refused_before_a_tower_runs() -> None:
    """Gemma-3's pictures see their own later tokens."""
    model: Any = tiny_media_model("Gemma3ForConditionalGeneration")
    batch = media_batch(model, [[1], [2, 3]])
    with GenerationManager(model, CONFIG) as manager:
        assert manager.submit([5, 6], max_new_tokens=1, do_sample=False).result(60)
        with pytest.raises(UnsupportedArgumentError, match=r"`pixel_values` .* Gemma3.*both directions"):
            model.generate(**batch, max_new_tokens=4, custom_generate=manager.bind(), **GREEDY)
        expected = model.generate(**batch, max_new_tokens=4, **GREEDY)
        plain = manager.bind(on_unsupported="generate")
        assert torch.equal(model.generate(**batch, max_new_tokens=4, custom_generate=plain, **GREEDY), expected)
        features = model.get_image_features
        model.get_image_features = model.model.get_image_features = None  # a tower that ran would fail
        try:
            with pytest.raises(UnsupportedArgumentError, match="`pixel_values` is not served for Gemma3"):
                hf_async_batching.generate(model, manager=manager, **batch, max_new_tokens=4, **GREEDY)
        finally:
            del model.get_image_features, model.model.get_image_features
            assert model.get_image_features == features
        text = media_batch(model, [[], []])
        got = model.generate(**text, max_new_tokens=4, custom_generate=manager.bind(), **GREEDY)
        assert torch.equal(got, model.generate(**text, max_new_tokens=4, **GREEDY))


def test_experts_chosen_by_pictures_are_refused() -> None:
    """ERNIE-4.5-VL routes the tokens of a picture to experts of their own."""
    model: Any = tiny_media_model("Ernie4_5_VLMoeForConditionalGeneration")
    batch = media_batch(model, [[1], [2, 3]])
    with GenerationManager(model, CONFIG) as manager:
        for call in (
            lambda: model.generate(**batch, max_new_tokens=4, custom_generate=manager.bind(), **GREEDY),
            lambda: hf_async_batching.generate(model, manager=manager, **batch, max_new_tokens=4, **GREEDY),
        ):
            with pytest.raises(UnsupportedArgumentError, match=r"`pixel_values` .* reads `moe_mm_token_type_ids`"):
                call()


def hits(manager: GenerationManager) -> int:
    return manager.stats().prefix_hit_tokens


def questions(model: Any, pictures: list[int], *, same_text: int = 20) -> dict[str, torch.Tensor]:
    """One prompt: text that is always the same, pictures, and a question by the pictures' last number."""
    batch = media_batch(model, [pictures], seed=3)
    head = torch.arange(10, 10 + same_text)[None]
    batch["input_ids"] = torch.cat([head, batch["input_ids"]], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    return batch


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Qwen3VLForConditionalGeneration"])
def test_prefixes_are_known_by_their_pictures(name: str) -> None:
    """A second question about the same pictures starts behind them; other pictures with the same tokens share none."""
    model: Any = tiny_media_model(name)
    # Numbers 1, 4, 7 and 10 have the same size, so that their placeholders are equal.
    first = questions(model, [1, 4, 7, 10])
    other = questions(model, [1, 4, 10, 7])
    second = {key: value.clone() for key, value in first.items()}
    second["input_ids"][:, -3:] = torch.tensor([[31, 32, 33]])
    assert torch.equal(first["input_ids"], other["input_ids"]), "only the pictures differ"
    length = first["input_ids"].shape[1]
    with GenerationManager(model, CONFIG) as manager:
        plug = manager.bind()

        def check(batch: dict[str, torch.Tensor]) -> int:
            before = hits(manager)
            expected = model.generate(**batch, max_new_tokens=6, **FULL)
            same(model.generate(**batch, max_new_tokens=6, custom_generate=plug, **FULL), expected)
            return hits(manager) - before

        assert check(first) == 0
        assert check(second) == length // 16 * 16 - (16 if length % 16 < 4 else 0)
        shared = check(other)
        third = (first["input_ids"][0] == IMAGE).nonzero()[2 * int((first["input_ids"] == IMAGE).sum()) // 4]
        assert shared <= int(third), "pages of another picture"
        assert shared > 0, "the text and the first two pictures are the same"
        text = {"input_ids": first["input_ids"], "attention_mask": first["attention_mask"]}
        got = manager.submit(text["input_ids"][0], max_new_tokens=6, do_sample=False, eos_token_id=None).result(60)
        assert got.token_ids == model.generate(**text, max_new_tokens=6, **GREEDY)[0, length:].tolist()


def test_answers_are_known_behind_their_pictures(qwen: Any) -> None:
    """A chat's next turn starts behind the answer: shifted positions are part of the key."""
    first = questions(qwen, [1, 2, 3])
    with GenerationManager(qwen, CONFIG) as manager:
        plug = manager.bind()
        words: dict[str, Any] = {"suppress_tokens": [IMAGE], "max_new_tokens": 40, **GREEDY}
        answer = qwen.generate(**first, custom_generate=plug, **words)
        turn = {key: value for key, value in first.items() if key in ("pixel_values", "image_grid_thw")}
        turn["input_ids"] = torch.cat([answer, torch.tensor([[40, 41, 42]])], 1)
        turn["attention_mask"] = torch.ones_like(turn["input_ids"])
        turn["mm_token_type_ids"] = (turn["input_ids"] == IMAGE).long()
        before = hits(manager)
        same(
            qwen.generate(**turn, max_new_tokens=6, custom_generate=plug, **FULL),
            qwen.generate(**turn, max_new_tokens=6, **FULL),
        )
        assert hits(manager) - before > first["input_ids"].shape[1]


def test_submit_takes_pictures(qwen: Any, llava: Any) -> None:
    """A prompt of a processor, token by token, with text and other pictures beside it."""
    for model in (qwen, llava):
        with GenerationManager(model, CONFIG) as manager:
            handles, expected = [], []
            for pictures in ([1], [2, 3], [4, 1, 5]):
                batch = media_batch(model, [pictures])
                length = batch["input_ids"].shape[1]
                expected.append(model.generate(**batch, max_new_tokens=7, **GREEDY)[0, length:].tolist())
                del batch["attention_mask"]
                handles.append(manager.submit(**batch, max_new_tokens=7, do_sample=False, eos_token_id=None))
            assert [handle.result(60).token_ids for handle in handles] == expected


def test_submit_refuses_what_it_cannot_read(llava: Any) -> None:
    batch = media_batch(llava, [[1]])
    with GenerationManager(llava, CONFIG) as manager:
        with pytest.raises(ValueError, match="`pixel_values` needs the `input_ids` that the processor returned"):
            manager.submit("a text", pixel_values=batch["pixel_values"], max_new_tokens=2)
        with pytest.raises(ValueError, match="do not match"):
            manager.submit(batch["input_ids"][0, :5], pixel_values=batch["pixel_values"], max_new_tokens=2)
        got = manager.submit([5, 6], pixel_values=None, max_new_tokens=2, do_sample=False, eos_token_id=None)
        assert len(got.result(60).token_ids) == 2


def test_a_placeholder_in_a_completion() -> None:
    """The family looks up another token for it, also beside prompts with sounds that are computed in pieces."""
    model: Any = tiny_media_model("GraniteSpeechForConditionalGeneration")
    batch = media_batch(model, ROWS)
    expected = model.generate(**batch, max_new_tokens=6, **FULL)
    assert (expected.sequences[:, batch["input_ids"].shape[1] :] == AUDIO).any(), "no completion has the placeholder"
    config = BatchingConfig(page_size=16, max_batch_tokens=24, max_rows=4)
    with GenerationManager(model, config) as manager:
        same(model.generate(**batch, max_new_tokens=6, custom_generate=manager.bind(), **FULL), expected)


def test_a_refused_model_is_refused_by_the_picture_too() -> None:
    model: Any = tiny_media_model("Florence2ForConditionalGeneration")
    ids, pixels = torch.tensor([[5, 6, 7]]), torch.zeros(1, 3, 16, 16)
    with pytest.raises(UnsupportedModelError, match=r"`pixel_values` is not served: .* an encoder and a decoder"):
        hf_async_batching.generate(model, input_ids=ids, pixel_values=pixels, max_new_tokens=2)
    with pytest.raises(UnsupportedModelError, match=r"^Florence2"):
        hf_async_batching.generate(model, input_ids=ids, max_new_tokens=2)


def test_other_forwards_than_those_of_transformers_are_refused(llava: Any) -> None:
    class Own(type(llava)):  # type: ignore[misc]
        def forward(
            self, input_ids: Any = None, pixel_values: Any = None, inputs_embeds: Any = None, **kwargs: Any
        ) -> Any:
            return super().forward(input_ids, pixel_values, inputs_embeds=inputs_embeds, **kwargs)

    own: Any = Own(llava.config).eval()
    own.generation_config = llava.generation_config
    batch = media_batch(llava, [[1]])
    del batch["attention_mask"]
    with GenerationManager(own, CONFIG) as manager:
        with pytest.raises(UnsupportedArgumentError, match=r"`pixel_values` .* forward is not transformers' own"):
            own.generate(**batch, max_new_tokens=2, custom_generate=manager.bind(), **GREEDY)
        expected = own.generate(**batch, max_new_tokens=2, **GREEDY)
        plain = manager.bind(on_unsupported="generate")
        assert torch.equal(own.generate(**batch, max_new_tokens=2, custom_generate=plain, **GREEDY), expected)
