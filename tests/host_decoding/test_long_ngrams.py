"""Long n-grams are banned as transformers bans them, with little work."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.host_decoding.long_ngrams import LongNGrams


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9, 31, 32, 33, 64, 100, 199, 200, 201])
@pytest.mark.parametrize("kinds", [1, 2, 90])
def test_bans_are_those_of_transformers(size: int, kinds: int) -> None:
    generator = torch.Generator().manual_seed(size)
    period = torch.randint(0, kinds, (3, 70), generator=generator)
    tokens = torch.cat([period, period, period], 1)[:, :200]  # so that long ones come again
    tokens[2, 150:] = torch.randint(0, kinds, (50,), generator=generator)
    scores = torch.randn(3, 80, generator=generator)  # fewer than there are tokens
    expected = NoRepeatNGramLogitsProcessor(size)(tokens, scores)
    assert torch.equal(LongNGrams(size)(tokens, scores), expected)
    if size < 70 and kinds > 1:
        assert expected.isinf().any()


def test_work_is_bounded_by_the_history() -> None:
    tokens, scores = torch.full((1, 30_000), 7), torch.zeros(1, 80)
    began = time.perf_counter()
    for size in (65, 15_000, 2**31, 2**62):
        LongNGrams(size)(tokens, scores)
    assert time.perf_counter() - began < 2  # where each window is compared token by token: 225 million comparisons


def test_neither_an_ngram_that_is_longer_than_all_nor_a_long_one_stalls_others() -> None:
    model: Any = tiny_model("Llama", max_position_embeddings=2048)
    prompt = [5 + i % 80 for i in range(1200)]
    with GenerationManager(model, BatchingConfig(page_size=16)) as manager:
        for size in (65, 1000, 10_000, 2**31):
            arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "no_repeat_ngram_size": size}
            expected = model.generate(torch.tensor([prompt]), **arguments)[0, 1200:].tolist()
            began = time.perf_counter()
            assert manager.submit(prompt, **arguments).result(60).token_ids == expected
            assert time.perf_counter() - began < 3
