"""Every usual form of a prompt is the same prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_tokenizer import tiny_tokenizer

from hf_async_batching.inputs.prompts import read_prompt

IDS = [5, 6, 7]

FORMS = [
    *(IDS, tuple(IDS), range(5, 8), [np.int64(5), 6, torch.tensor(7).item()]),
    *(
        torch.tensor(IDS).to(dtype)
        for dtype in (
            *(torch.int64, torch.int32, torch.int16, torch.int8),
            *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        )
    ),
    torch.tensor([IDS]),
    *(np.array(IDS, dtype) for dtype in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4")),
    np.array([IDS], "u2"),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{type(form).__name__}-{getattr(form, 'dtype', '')}")
def test_forms_of_token_ids(form: Any) -> None:
    prompt = read_prompt(form, None)
    assert prompt.tokens == prompt.shown == IDS
    assert all(type(token) is int for token in prompt.tokens)


def test_a_text_is_tokenized_as_the_tokenizer_does_it() -> None:
    tokenizer = tiny_tokenizer()
    assert read_prompt("helloworld", None, tokenizer).tokens == tokenizer("helloworld").input_ids
    with pytest.raises(ValueError, match=r"`input_ids` is a text.*tokenizer=\.\.\. to GenerationManager or to submit"):
        read_prompt("helloworld", None)


@pytest.mark.parametrize("batch", [torch.ones(2, 3, dtype=torch.long), np.ones((2, 3), int)])
def test_a_batch_is_no_prompt(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*submit each row.*hf_async_batching\.generate"):
        read_prompt(batch, None)


@pytest.mark.parametrize("wrong", [torch.ones(3), np.ones(3), np.ones(3, bool), torch.tensor(5), [[5, 6]], b"abc", 5])
def test_what_is_no_prompt(wrong: Any) -> None:
    with pytest.raises(
        ValueError, match="`input_ids` must be a 1-D integer tensor or array, a list of ints or a text"
    ):
        read_prompt(wrong, None)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"input_ids": [5, 6]}, "is a mapping.*submit its entry"),
        ([{"role": "user", "content": "x"}], r"holds messages; submit what tokenizer\.apply_chat_template"),
        ([{"role": "user"}, 5], "must be a 1-D integer tensor"),
        ([5, 6.5], "must be a 1-D integer tensor"),
    ],
    ids=str,
)
def test_the_remedy_for_what_a_tokenizer_takes_or_returns(wrong: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_prompt(wrong, None)
