"""The main job on a real chat model: 64 threads call `model.generate` at once, token for token as alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.smollm2 import chat_token_ids, load_smollm2

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager

CONFIGS = [
    (1, 16),
    (2, 256),
    (3, 16),
    pytest.param(1, 256, marks=pytest.mark.slow),
    pytest.param(2, 16, marks=pytest.mark.slow),
    pytest.param(3, 256, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    model, tokenizer = load_smollm2()
    prompts = chat_token_ids(tokenizer)
    new_tokens = [4 + 3 * i % 13 for i in range(len(prompts))]
    expected = []
    for prompt, count in zip(prompts, new_tokens, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        expected.append(out)
    return model, prompts, new_tokens, expected


def test_the_prompts_are_what_they_should_be(smollm2: Any) -> None:
    _, prompts, _, expected = smollm2
    lengths = [len(prompt) for prompt in prompts]
    assert len({tuple(prompt) for prompt in prompts}) == 64
    assert min(lengths) == 1
    assert 600 < max(lengths) <= 700 + 100
    assert len({token for out in expected for token in out[0, -4:].tolist()}) > 60


@pytest.mark.parametrize(("depth", "page_size"), CONFIGS)
def test_64_threads(smollm2: Any, depth: int, page_size: int) -> None:
    model, prompts, new_tokens, expected = smollm2
    got: list[Any] = [None] * len(prompts)
    barrier = threading.Barrier(len(prompts))

    def call(i: int) -> None:
        ids = torch.tensor([prompts[i]])
        barrier.wait()
        try:
            got[i] = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens[i],
                do_sample=False,
                custom_generate=manager.bind(),
            )
        except BaseException as error:
            got[i] = error

    with GenerationManager(model, BatchingConfig(depth=depth, page_size=page_size)) as manager:
        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert manager.stats().rows_in_use == 0
        assert manager.stats().pages_in_use == 0
    different = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if not torch.equal(a, b)]
    assert different == []


def test_threads_meet_in_the_shared_manager(smollm2: Any) -> None:
    model, prompts, new_tokens, expected = smollm2
    got: list[Any] = [None] * 8

    def call(i: int) -> None:
        got[i] = hf_async_batching.generate(
            model, torch.tensor([prompts[i]]), max_new_tokens=new_tokens[i], do_sample=False
        )

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manager = hf_async_batching.get_manager(model)
    rows = max(step.decode_rows for step in manager.timeline().steps)
    manager.close()
    assert all(torch.equal(a, b) for a, b in zip(got, expected[:8], strict=True))
    assert rows > 1, "the threads never shared a step"
