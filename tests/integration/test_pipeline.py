"""transformers' text-generation pipeline: the plug is one of its generate arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from support.tiny_tokenizer import tiny_tokenizer
from transformers import TextGenerationPipeline, pipeline

import hf_async_batching
from hf_async_batching import get_manager

CHATS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is a batch"}],
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}, {"role": "user", "content": "gh"}],
]
TEXTS = ["hello", "a longer beginning of a text", "b"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] | replace(' ', '') }}z{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    pipe = pipeline("text-generation", model=tiny_model("Llama"), tokenizer=tokenizer, device="cpu")
    assert isinstance(pipe, TextGenerationPipeline)
    yield pipe
    get_manager(pipe.model).close()


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 9},
        {"max_new_tokens": 9, "batch_size": 3},
        {"max_new_tokens": 9, "return_full_text": False, "batch_size": 4},
        {"max_new_tokens": 4, "min_new_tokens": 4, "return_tensors": True},
        {"max_length": 40, "max_new_tokens": None, "return_full_text": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("inputs", [CHATS, TEXTS], ids=["chats", "texts"])
def test_greedy_equals_the_plain_pipeline(pipe: Any, inputs: Any, arguments: dict[str, Any]) -> None:
    want = pipe(inputs, do_sample=False, **arguments)
    got = pipe(inputs, do_sample=False, custom_generate=hf_async_batching.generate, **arguments)
    assert got == want
    assert len({str(answer) for answer in want}) > 2


def test_several_answers_to_each_prompt(pipe: Any) -> None:
    arguments = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 12, "return_full_text": False}
    answers = pipe(CHATS, custom_generate=hf_async_batching.generate, batch_size=2, **arguments)
    assert [len(chat) for chat in answers] == [3] * 4
    assert [[type(answer["generated_text"]) for answer in chat] for chat in answers] == [[str] * 3] * 4
    assert len({answer["generated_text"] for chat in answers for answer in chat}) > 6, "they are drawn apart"
    # Nothing is left to chance where only one token can be drawn: the same as plain sampling.
    one = {**arguments, "top_k": 1}
    assert pipe(CHATS, custom_generate=hf_async_batching.generate, **one) == pipe(CHATS, **one)


def test_bound_to_the_pipeline_once(pipe: Any) -> None:
    """Given to the constructor it holds for every call."""
    always = pipeline(
        "text-generation",
        model=pipe.model,
        tokenizer=pipe.tokenizer,
        device="cpu",
        custom_generate=hf_async_batching.generate,
    )
    arguments = {"do_sample": False, "max_new_tokens": 6}
    manager = get_manager(pipe.model)
    manager.close()
    want = pipe(CHATS, **arguments)
    assert get_manager(pipe.model).stats().steps == 0
    assert always(CHATS, **arguments) == want
    assert get_manager(pipe.model).stats().steps > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert always(CHATS[1], **arguments) == pipe(CHATS[1], **arguments)
