"""Prompts of embeddings: the outputs of `generate`, in any company, in pieces, and after a preemption."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
import transformers
from support.criteria import RowWise
from support.pace import held
from support.tiny_models import VOCAB, greedy_alone, ragged_prompts, tiny_model
from support.toy_engine import ToyEngine
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedArgumentError, UnsupportedModelError
from hf_async_batching.core.plan import Chunk, NewRow, Plan
from hf_async_batching.core.request import Request
from hf_async_batching.runner.prompt_embeddings import PromptEmbeddings

CONFIG = BatchingConfig(page_size=16, max_batch_tokens=32, max_rows=8, debug=True)
PROMPTS = ragged_prompts(4, 40, seed=6)
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def manager(model: Any) -> Any:
    with GenerationManager(model, CONFIG) as manager:
        yield manager


def soft(model: Any, length: int, seed: int) -> torch.Tensor:
    """Embeddings [length, hidden] of no token."""
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    picked = embedding[torch.randint(3, VOCAB, (2, length), generator=generator)]
    return (0.7 * picked[0] + 0.3 * picked[1]).detach()


def padded(model: Any, side: str = "left") -> dict[str, torch.Tensor]:
    rows = [soft(model, len(prompt), i) for i, prompt in enumerate(PROMPTS)]
    width = max(map(len, rows))
    batch, mask = (
        torch.full((len(rows), width, rows[0].shape[1]), 9.0),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        batch[i, place], mask[i, place] = row, 1
    return {"inputs_embeds": batch, "attention_mask": mask}


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Gemma3Text", "GPTNeoX", "StableLm", "Qwen3Moe"])
def test_equal_to_generate(family: str) -> None:
    """Padded, in pieces of at most 32 tokens, beside requests of tokens."""
    model = tiny_model(family)
    inputs = padded(model)
    expected = model.generate(**inputs, max_new_tokens=9, **GREEDY)
    with GenerationManager(model, CONFIG) as manager:
        beside = [manager.submit(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None) for prompt in PROMPTS]
        got = model.generate(**inputs, max_new_tokens=9, custom_generate=manager.bind(), **GREEDY)
        others = [handle.result(60).token_ids for handle in beside]
    assert torch.equal(got, expected)
    assert got.shape == (4, 9), "the new tokens alone"
    assert others == [greedy_alone(model, prompt, 12, eos_token_id=None) for prompt in PROMPTS]
    assert len({tuple(row) for row in got.tolist()}) > 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 7},
        {"max_length": 46},
        {"max_new_tokens": 7, "min_new_tokens": 5, "eos_token_id": [20, 21, 22, 23, 24, 25]},
        {"max_new_tokens": 12, "eos_token_id": list(range(3, 40))},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("ids", [False, True], ids=["alone", "with ids"])
def test_lengths_and_ends(model: Any, manager: Any, arguments: dict[str, Any], ids: bool) -> None:
    inputs = padded(model)
    if ids:
        inputs["input_ids"] = torch.randint(3, VOCAB, inputs["attention_mask"].shape)
    arguments = {**GREEDY, **arguments}
    expected = model.generate(**inputs, **arguments)
    assert torch.equal(model.generate(**inputs, custom_generate=manager.bind(), **arguments), expected)
    assert torch.equal(hf_async_batching.generate(model, manager=manager, **inputs, **arguments), expected)


def test_without_a_mask_and_with_gradients(model: Any, manager: Any) -> None:
    given = torch.stack([soft(model, 11, 1), soft(model, 11, 2)]).requires_grad_()
    expected = model.generate(inputs_embeds=given, max_new_tokens=6, **GREEDY)
    got = model.generate(inputs_embeds=given, max_new_tokens=6, custom_generate=manager.bind(), **GREEDY)
    assert torch.equal(got, expected)
    several = model.generate(
        inputs_embeds=given,
        max_new_tokens=6,
        custom_generate=manager.bind(seed=3),
        num_return_sequences=2,
        do_sample=True,
        top_k=1,
        eos_token_id=None,
    )
    assert torch.equal(several, expected.repeat_interleave(2, 0))


def test_padding_on_the_right_is_refused(model: Any, manager: Any) -> None:
    with pytest.raises(UnsupportedArgumentError, match="Pad on the left"):
        model.generate(**padded(model, "right"), max_new_tokens=6, custom_generate=manager.bind(), **GREEDY)


def test_criteria_and_streamers_see_what_generate_shows_them(model: Any, manager: Any) -> None:
    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.calls.append((tuple(value.shape), value.tolist()))

        def end(self) -> None:
            self.calls.append("end")

    given = soft(model, 11, 1)[None]
    seen = []
    for plug in (None, manager.bind()):
        criterion, streamer = RowWise(set(range(40)), least=3), Recorder()
        out = model.generate(
            inputs_embeds=given,
            max_new_tokens=20,
            custom_generate=plug,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([criterion]),
            **GREEDY,
        )
        seen.append((out.tolist(), criterion.calls, streamer.calls))
    assert seen[0] == seen[1]


def test_pages_are_not_shared(model: Any, manager: Any) -> None:
    """Neither with other embeddings under the same tokens, nor with the tokens themselves."""
    ids = torch.full((1, 40), 7)
    expected, got = [], []
    before = manager.stats().prefix_hit_tokens
    for seed in (1, 2, None, 1):
        given = {} if seed is None else {"inputs_embeds": soft(model, 40, seed)[None]}
        expected.append(model.generate(ids, max_new_tokens=6, **given, **GREEDY).tolist())
        got.append(model.generate(ids, max_new_tokens=6, custom_generate=manager.bind(), **given, **GREEDY).tolist())
    assert got == expected
    assert len({str(out) for out in got}) == 3
    assert manager.stats().prefix_hit_tokens == before


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_preempted_requests_are_computed_again(model: Any, depth: int) -> None:
    lengths = [40, 33, 17, 5]
    given = [soft(model, length, i) for i, length in enumerate(lengths)]
    config = BatchingConfig(page_size=16, max_batch_tokens=32, max_rows=4, num_pages=9, depth=depth, debug=True)
    with GenerationManager(model, config) as manager:
        with held(manager):
            handles = [
                manager.submit(inputs_embeds=embeddings, max_new_tokens=60, do_sample=False, eos_token_id=None)
                for embeddings in given
            ]
        got = [handle.result(120).token_ids for handle in handles]
        assert manager.stats().preemptions > 0, "nobody was preempted"
    for embeddings, tokens in zip(given, got, strict=True):
        assert tokens == model.generate(inputs_embeds=embeddings[None], max_new_tokens=60, **GREEDY)[0].tolist()


def test_submitted_embeddings_may_be_overwritten(model: Any, manager: Any) -> None:
    given = soft(model, 30, 4)
    expected = model.generate(inputs_embeds=given[None], max_new_tokens=5, **GREEDY)[0].tolist()
    handle = manager.submit([9] * 30, inputs_embeds=given, max_new_tokens=5, do_sample=False, eos_token_id=None)
    given.zero_()
    assert handle.result(60).token_ids == expected


def test_image_and_text_by_their_embeddings() -> None:
    """A tiny LLaVA: what the vision tower makes of an image stands in for the image's tokens."""
    image_token = 5
    text = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, num_attention_heads=4, max_position_embeddings=256),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        image_token_index=image_token,
        image_token_id=image_token,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    ids = torch.tensor([[7, 8, image_token, image_token, image_token, image_token, 9, 10]])
    pixels = torch.randn(1, 3, 8, 8)
    expected = model.generate(ids, pixel_values=pixels, max_new_tokens=8, **GREEDY)
    with torch.no_grad():
        features = model.get_image_features(pixels)
        features = getattr(features, "pooler_output", features)
        embedded = model.get_input_embeddings()(ids)
        embedded[0, 2:6] = torch.cat(list(features), 0).view(4, 64)
    with GenerationManager(model, CONFIG) as manager:
        plug = manager.bind()
        got = model.generate(inputs_embeds=embedded, max_new_tokens=8, custom_generate=plug, **GREEDY)
        assert torch.equal(got, expected[:, ids.shape[1] :])
        assert not torch.equal(got, model.generate(ids[:, :2], max_new_tokens=8, **GREEDY)[:, 2:])
        assert torch.equal(
            model.generate(ids, pixel_values=pixels, max_new_tokens=8, custom_generate=plug, **GREEDY), expected
        )


@pytest.mark.filterwarnings("ignore:Passing `.*` with `inputs_embeds` and without `input_ids`:UserWarning")
def test_histories_without_a_prompt_are_not_served_yet(model: Any, manager: Any) -> None:
    """`generate` counts the completion alone; with token ids beside the embeddings, these are the history."""
    given = soft(model, 6, 1)[None]
    ids = torch.tensor([[9, 20, 31, 9, 20, 31]])
    for arguments in ({"repetition_penalty": 1.6}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[7, 8]]}):
        plug = manager.bind()
        with pytest.raises(UnsupportedArgumentError, match="`inputs_embeds` is not served together with penalties"):
            model.generate(inputs_embeds=given, max_new_tokens=6, custom_generate=plug, **arguments, **GREEDY)
        with pytest.raises(UnsupportedArgumentError, match="`inputs_embeds` is not served together with penalties"):
            manager.submit(inputs_embeds=given[0], max_new_tokens=6, do_sample=False, **arguments)
        both = {"input_ids": ids, "inputs_embeds": given, "max_new_tokens": 12, **arguments, **GREEDY}
        assert torch.equal(model.generate(**both, custom_generate=plug), model.generate(**both))
        plug = manager.bind(on_unsupported="generate")
        alone = {"inputs_embeds": given, "max_new_tokens": 12, **arguments, **GREEDY}
        assert torch.equal(model.generate(**alone, custom_generate=plug), model.generate(**alone))


def test_mistakes_are_told(model: Any, manager: Any) -> None:
    for wrong in (torch.zeros(1, 4, 63), torch.zeros(1, 4, 64, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"`inputs_embeds` of a prompt must be floating point \[length, 64\]"):
            hf_async_batching.generate(model, inputs_embeds=wrong, max_new_tokens=3, manager=manager)
    with pytest.raises(UnsupportedArgumentError, match="`inputs_embeds`"):
        model.generate(
            torch.tensor([[5, 6]]),
            inputs_embeds=torch.zeros(1, 4, 64),
            max_new_tokens=3,
            custom_generate=manager.bind(),
        )
    with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds`"):
        manager.submit(max_new_tokens=3)
    with pytest.raises(ValueError, match="4 positions and `input_ids` 2 tokens"):
        manager.submit([5, 6], inputs_embeds=torch.zeros(4, 64), max_new_tokens=3)
    with pytest.raises(ValueError, match="at least one token"):
        manager.submit(inputs_embeds=torch.zeros(0, 64), max_new_tokens=3)


def test_models_that_need_the_tokens_themselves_are_refused() -> None:
    """As those do that look up something else by them."""
    model = tiny_model("Llama")
    plain = type(model).forward

    class NeedsTokens(type(model)):  # type: ignore[misc]
        @wraps(plain)
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
            if inputs_embeds is not None:
                inputs_embeds = inputs_embeds * 1.1
            return plain(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    model.__class__ = NeedsTokens
    given = {"inputs_embeds": soft(model, 5, 1)[None], "max_new_tokens": 3}
    with GenerationManager(model, CONFIG) as manager:
        with pytest.raises(
            UnsupportedModelError, match="`inputs_embeds` is not served for NeedsTokens: its logits differ"
        ):
            model.generate(custom_generate=manager.bind(), **given)
        assert manager.submit([5, 6], max_new_tokens=3, eos_token_id=None).result(60).finish_reason == "length"


def test_pieces_of_a_step() -> None:
    embeddings = torch.arange(10.0)[:, None].expand(-1, 3)
    given = Request("given", (0,) * 10, 5, prompt_embeddings=embeddings)
    tokens = Request("tokens", (5,) * 6, 5)
    tracked = PromptEmbeddings()

    def pieces(plan: Plan) -> list[tuple[int, list[float]]]:
        return [(start, piece[:, 0].tolist()) for start, piece, *_ in tracked.pieces(plan)]

    first = Plan(
        0, (3, 4), (Chunk(2, (5,) * 6, True), Chunk(1, (0,) * 4, False)), (NewRow(2, tokens), NewRow(1, given))
    )
    assert pieces(first) == [(8, [0, 1, 2, 3])]
    # It was preempted after its second token, say, and comes back in one piece.
    assert pieces(Plan(1, (3,), (Chunk(1, (0,) * 6 + (7, 8), True),))) == [(1, [4, 5, 6, 7, 8, 9])]
    assert pieces(Plan(2, (1, 3), ())) == []
    again = Plan(3, (), (Chunk(1, (0,) * 10, False),), (NewRow(1, given),))
    assert pieces(again) == [(0, list(range(10)))]
    assert pieces(Plan(4, (), (Chunk(1, (7, 8), True),))) == [], "its own tokens alone"
    # Another request takes the row over before the prompt has come to its end.
    assert pieces(Plan(5, (), (Chunk(1, (0,) * 4, False),), (NewRow(1, given),))) != []
    assert pieces(Plan(6, (), (Chunk(1, (5,) * 6, True),), (NewRow(1, tokens),))) == []
    assert [step for step, _ in tracked._read] == [0, 1, 3, 5]
    tracked.completed(3)
    assert [step for step, _ in tracked._read] == [5]


def test_the_runner_lets_go_of_what_completed_steps_have_read() -> None:
    given = Request("given", (0,) * 4, 5, prompt_embeddings=torch.zeros(4, 3))
    runner = ToyEngine(1, 0).runner
    runner._prompt_embeddings.pieces(Plan(3, (), (Chunk(1, (0,) * 4, True),), (NewRow(1, given),)))
    runner.completed(2)
    assert runner._prompt_embeddings._read
    runner.completed(3)
    assert not runner._prompt_embeddings._read


def test_a_step_reads_embeddings_if_any_of_its_rows_does() -> None:
    given = Request("given", (0,) * 10, 5, prompt_embeddings=torch.zeros(10, 3))
    rows = (NewRow(2, Request("tokens", (5,) * 6, 5)), NewRow(1, given))
    chunks = (Chunk(2, (5,) * 6, True), Chunk(1, (0,) * 4, False))
    tracked = PromptEmbeddings()
    assert not tracked.concerns(Plan(0, (), chunks, rows[:1]))
    assert not tracked.concerns(Plan(0, (), chunks))
    assert tracked.concerns(Plan(0, (), chunks, rows))
    tracked.pieces(Plan(0, (), chunks, rows))
    assert tracked.concerns(Plan(1, (), chunks)), "the rest of the prompt"
    assert not tracked.concerns(Plan(1, (), chunks[:1]))
