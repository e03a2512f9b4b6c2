"""A tiny model, a manager for it, and its tokenizer."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.character_tokenizer import character_tokenizer
from support.tiny_models import tiny_model

from hf_async_batching import BatchingConfig, GenerationManager


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` keeps of Parquet files that it has read."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="package")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture(scope="package")
def manager(model: Any) -> Iterator[GenerationManager]:
    with GenerationManager(model, BatchingConfig(max_rows=8, page_size=16, max_batch_tokens=64)) as manager:
        yield manager


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    return character_tokenizer()


@pytest.fixture
def unused_port() -> int:
    """A TCP port on which no process listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
