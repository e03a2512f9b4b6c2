"""The recipes for `Dataset.map` and Ray Data, as they stand in docs/recipes.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.character_tokenizer import character_tokenizer
from support.tiny_models import greedy_alone, tiny_model

ROOT = Path(__file__).parent.parent.parent
PROMPTS = [f"text-{chr(40 + i)}" for i in range(20)]


def recipe(heading: str) -> str:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    code = re.search(rf"## {heading}\n.*?```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    return code[1]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    model, tokenizer = tiny_model("Llama"), character_tokenizer()
    ids = [greedy_alone(model, tokenizer(text).input_ids, 40) for text in PROMPTS]
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in ids]


def test_map(expected: list[str]) -> None:
    names: dict[str, Any] = {
        "model": tiny_model("Llama"),
        "tokenizer": character_tokenizer(),
        "dataset": Dataset.from_dict({"prompt": PROMPTS}),
    }
    exec(recipe(r"Dataset\.map").replace("max_new_tokens=40", "max_new_tokens=40, do_sample=False"), names)
    assert names["dataset"]["completion"][:] == expected


@pytest.mark.slow
def test_ray_data(tmp_path: Path, expected: list[str]) -> None:
    pytest.importorskip("ray")
    tiny_model("Llama").save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    Dataset.from_dict({"prompt": PROMPTS, "n": range(20)}).to_parquet(str(tmp_path / "prompts.parquet"))
    code = recipe("Ray Data")
    for old, new in (
        ('("owner/name", "cuda")', f'("{tmp_path / "model"}", "cpu")'),
        ("batch_size=256", "batch_size=6"),
        (", num_gpus=1", ""),
        ("max_new_tokens=40", "max_new_tokens=40, do_sample=False"),
    ):
        assert old in code
        code = code.replace(old, new)
    start = "ray.init(num_cpus=2, include_dashboard=False)\n"
    (tmp_path / "script.py").write_text(code.replace("import ray\n", f"import ray\n{start}"))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr
    rows = Dataset.from_parquet(
        [str(p) for p in (tmp_path / "completions").glob("*.parquet")], cache_dir=str(tmp_path / "cache")
    )
    assert {row["prompt"]: row["completion"] for row in rows} == dict(zip(PROMPTS, expected, strict=True))
