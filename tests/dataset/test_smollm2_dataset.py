"""200 docstrings through a real chat model: what a plain loop of `model.generate` gives, killed or not."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dataset_job import checksums, ended, in_child, rows_kept
from support.real_texts import docstrings
from support.smollm2 import load_smollm2

from hf_async_batching import BatchingConfig, GenerationManager, generate_dataset

NEW = {"max_new_tokens": 8, "do_sample": False}


def chat(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Complete this text:\n{row['text']}"}]


def plain_loop(model: Any, tokenizer: Any, dataset: Any) -> list[str]:
    texts = []
    for row in dataset:
        inputs = tokenizer.apply_chat_template(
            chat(row), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, **NEW)
        texts.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def test_as_a_plain_loop() -> None:
    model, tokenizer = load_smollm2()
    dataset = docstrings(8)
    with GenerationManager(model, BatchingConfig(attach_check=False)) as manager:
        done = generate_dataset(manager, dataset, tokenizer, prompt=chat, **NEW)
    assert done["completion"][:] == plain_loop(model, tokenizer, dataset)
    assert len(set(done["completion"])) > 4


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_200_rows_killed_20_times(tmp_path: Path) -> None:
    """In this process nothing has run a model yet, so that children can be forked from it."""
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2()
    dataset = docstrings(200)
    folder, whole = tmp_path / "killed", tmp_path / "whole"

    def run(target: Path) -> None:
        with GenerationManager(model) as manager:
            generate_dataset(
                manager, dataset, tokenizer, prompt=chat, resume_dir=target, shard_rows=30, window=40, **NEW
            )

    draw, moments = random.Random(20), []
    for _ in range(20):
        wanted = min(rows_kept(folder) + draw.randint(0, 12), 165)
        child = in_child(lambda: run(folder))
        status = None
        while status is None and rows_kept(folder) < wanted:
            status = ended(child, 0.01)
        assert status is None
        assert ended(child, draw.uniform(0, 2)) is None, "too few rows for 20 kills"
        os.kill(child, signal.SIGKILL)
        ended(child)
        moments.append(rows_kept(folder))
    assert ended(in_child(lambda: run(folder))) == 0
    assert ended(in_child(lambda: run(whole))) == 0
    assert checksums(folder) == checksums(whole)
    assert moments == sorted(moments)
    print(f"rows kept at the kills: {moments}")
    print({name: hashlib.sha256(value.encode()).hexdigest()[:8] for name, value in checksums(folder).items()})

    from datasets import load_dataset

    done = load_dataset("parquet", data_dir=str(folder / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert done["place"][:] == dataset["place"][:]
    assert done["completion"][:] == plain_loop(model, tokenizer, dataset)
