"""When the engine fails, is full, or is shared."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.character_tokenizer import character_tokenizer
from support.tiny_models import greedy_alone, tiny_model

from hf_async_batching import BatchingConfig, EngineClosedError, EngineFailedError, GenerationManager, generate_dataset
from hf_async_batching.engine import Engine

NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
ROWS = Dataset.from_dict({"prompt": [f"text-{chr(40 + i)}" for i in range(40)]})


@pytest.fixture(scope="module")
def expected(model: Any, tokenizer: Any) -> list[list[int]]:
    return [greedy_alone(model, tokenizer(text).input_ids, 6, eos_token_id=None) for text in ROWS["prompt"]]


def config(**changes: Any) -> BatchingConfig:
    return BatchingConfig(**{"max_rows": 4, "page_size": 16, "max_batch_tokens": 32, **changes})


def failing(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    step, count = Engine.step, 0

    def failing_step(self: Engine) -> Any:
        nonlocal count
        count += 1
        if count in steps:
            raise torch.OutOfMemoryError(f"step {count}")
        return step(self)

    monkeypatch.setattr(Engine, "step", failing_step)


def test_an_engine_that_fails_costs_nothing(
    model: Any, tokenizer: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {15, 40})
    with GenerationManager(model, config()) as manager:
        done = generate_dataset(manager, ROWS, tokenizer, **NEW)
    assert done["completion_ids"][:] == expected


def test_one_that_always_fails_ends_the_run(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, expected: Any
) -> None:
    with monkeypatch.context() as patched:
        failing(patched, set(range(30, 10_000)))
        with GenerationManager(model, config()) as manager, pytest.raises(EngineFailedError, match="step"):
            generate_dataset(manager, ROWS, tokenizer, resume_dir=tmp_path / "run", **NEW)
    with GenerationManager(model, config()) as manager:
        done = generate_dataset(manager, ROWS, tokenizer, resume_dir=tmp_path / "run", **NEW)
    assert done["completion_ids"][:] == expected


@pytest.mark.parametrize("max_waiting", [1, 3])
def test_a_small_inbox(model: Any, tokenizer: Any, expected: Any, max_waiting: int) -> None:
    with GenerationManager(model, config(max_waiting=max_waiting)) as manager:
        done = generate_dataset(manager, ROWS, tokenizer, **NEW)
    assert done["completion_ids"][:] == expected


def test_a_manager_that_is_closed_ends_the_run(tokenizer: Any) -> None:
    manager = GenerationManager(tiny_model("Llama"), config())

    def prompt(row: dict[str, Any]) -> str:
        if row["prompt"] == ROWS["prompt"][-1]:
            threading.Thread(target=manager.close).start()
        return str(row["prompt"])

    with pytest.raises(EngineClosedError):
        generate_dataset(manager, ROWS, character_tokenizer(), prompt=prompt, max_new_tokens=400, do_sample=False)


def test_two_runs_share_a_manager(model: Any, tokenizer: Any, expected: Any) -> None:
    results: list[Any] = [None, None]
    with GenerationManager(model, config()) as manager:

        def go(i: int) -> None:
            results[i] = generate_dataset(manager, ROWS, tokenizer, **NEW)["completion_ids"][:]

        threads = [threading.Thread(target=go, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [expected, expected]


def test_a_dataset_that_raises_ends_the_run(manager: Any, tokenizer: Any) -> None:
    def rows() -> Any:
        yield from ({"prompt": f"{i}"} for i in range(70))
        raise OSError("the network is gone")

    lazy = generate_dataset(manager, rows(), tokenizer, **NEW)
    with pytest.raises(OSError, match="network"):
        list(lazy)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hf_async_batching-dataset")]
