"""Two processes and models that transformers spread over them: the tokens of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tensor_parallel_job import NEW, PROMPTS, SAMPLED, config
from support.tiny_models import greedy_alone, tiny_model

from hf_async_batching import GenerationManager

ROOT = Path(__file__).parents[2]
FAMILIES = ("Llama", "Qwen3")


def launch(folder: Path, module: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    own["HF_DATASETS_CACHE"] = str(folder / "cache")
    return subprocess.run(
        [*command, "-m", module, str(folder)],
        env={**os.environ, **own},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one launch of two ranks gave, by family: imports take longer than the runs."""
    folder = tmp_path_factory.mktemp("ranks")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(folder / family / "model")
    done = launch(folder, "support.tensor_parallel_job")
    assert done.returncode == 0, done.stderr
    for family in FAMILIES:
        assert f"{family}, rank 0: 12 rows" in done.stdout
        assert f"{family}, rank 1: 12 rows" in done.stdout
    return {family: json.loads((folder / family / "result.json").read_text()) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_one_process(results: Any, family: str) -> None:
    model: Any = tiny_model(family)
    result = results[family]
    greedy = [greedy_alone(model, prompt, NEW["max_new_tokens"]) for prompt in PROMPTS]
    with GenerationManager(model, config(2)) as manager:
        handles = [manager.submit(prompt, seed=i, **SAMPLED) for i, prompt in enumerate(PROMPTS)]
        sampled = [handle.result().token_ids for handle in handles]
    for depth in (1, 2):
        served = result[f"depth {depth}"]
        assert served["greedy"] == greedy
        assert served["sampled"] == sampled
        assert served["again"] == greedy[5]
        assert served["preemptions"] > 0
    leading, following = result["captured"]
    assert leading["replayed"] == leading["greedy"] == greedy
    assert (leading["failures"], following["failures"]) == (0, 3)
    assert leading["captures"] == following["captures"] == 6
    assert result["dataset"] == greedy
