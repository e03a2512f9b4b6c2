"""What a run that goes on from a folder tells: how many rows were there, and nothing false beside an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_async_batching import ResumeMismatchError, generate_dataset
from hf_async_batching.dataset.run.progress import DatasetProgress

NEW = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
TEXTS = [f"text-{i}" for i in range(12)]


def test_rows_of_an_earlier_run_are_counted(manager: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": TEXTS})
    arguments = {"resume_dir": tmp_path / "run", **NEW}
    generate_dataset(manager, rows, tokenizer, **arguments)
    seen: list[DatasetProgress] = []
    generate_dataset(manager, rows, tokenizer, callback=seen.append, **arguments)
    assert (seen[-1].rows, seen[-1].resumed, seen[-1].tokens) == (12, 12, 0)


def test_a_mismatch_that_is_found_late_is_told_alone(
    manager: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same call would end in the same way, so that nothing may advise it."""
    stream = Dataset.from_dict({"prompt": TEXTS}).to_iterable_dataset()
    arguments = {"resume_dir": tmp_path / "run", "shard_rows": 5, **NEW}
    generate_dataset(manager, stream, tokenizer, **arguments)
    with pytest.raises(ResumeMismatchError, match="another number of rows"):
        generate_dataset(manager, stream.take(9), tokenizer, **arguments)
    assert "call again with the same arguments" not in caplog.text


@pytest.mark.timeout(60)
def test_rows_that_are_kept_make_room_for_others(
    manager: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_async_batching.dataset.rows.source.CHUNK_ROWS", 4)
    rows = Dataset.from_dict({"prompt": TEXTS})
    done = generate_dataset(manager, rows, tokenizer, window=4, resume_dir=tmp_path / "run", **NEW)
    assert len(done) == 12
