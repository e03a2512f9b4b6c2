"""What the tests of stopping share: a tiny model, its manager, a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.tiny_models import tiny_model
from support.tiny_tokenizer import tiny_tokenizer

from hf_async_batching import BatchingConfig, GenerationManager

CONFIG = BatchingConfig(page_size=16, max_batch_tokens=64, debug=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def manager(model: Any) -> Iterator[GenerationManager]:
    with GenerationManager(model, CONFIG) as manager:
        yield manager


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()
