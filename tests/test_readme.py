"""The README's code, run as it stands there, on the real chat model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.smollm2 import load_smollm2

import hf_async_batching
from demo.serving.embedded_model import embedded_model_dir

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
FIRST, IN_PLACE, ENGINE, DATASET, COMPLETE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    model, tokenizer = load_smollm2()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    yield {"model": model, "tokenizer": tokenizer, "inputs": inputs}
    hf_async_batching.get_manager(model).close()


def test_first(capsys: pytest.CaptureFixture[str]) -> None:
    code = FIRST.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(embedded_model_dir())))
    space: dict[str, Any] = {}
    exec(code.replace("max_new_tokens=20", "max_new_tokens=8, do_sample=False"), space)
    hf_async_batching.get_manager(space["model"]).close()
    out = capsys.readouterr().out
    assert "The capital of France is Paris" in out
    assert "three" in out


def test_in_place(names: dict[str, Any]) -> None:
    code = IN_PLACE.replace("max_new_tokens=200", "max_new_tokens=5, do_sample=False")
    assert code != IN_PLACE
    space = {**names, "hf_async_batching": hf_async_batching}  # which the first example imports
    exec(code, space)
    expected = names["model"].generate(**names["inputs"], max_new_tokens=5, do_sample=False)
    assert torch.equal(space["outputs"], expected)


def test_engine(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    exec(ENGINE.replace("max_new_tokens=200", "max_new_tokens=12"), dict(names))
    assert len(capsys.readouterr().out) > 12


def test_both_ways_in_one_script_share_an_engine(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    code = (IN_PLACE + ENGINE).replace("max_new_tokens=200", "max_new_tokens=5")
    space = {**names, "hf_async_batching": hf_async_batching}
    exec(code, space)
    assert capsys.readouterr().out
    assert space["manager"] is hf_async_batching.get_manager(names["model"])
    assert not [record for record in caplog.records if "second engine" in record.message]


def test_dataset(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    prompts = ["The sun rises in the", "One, two, three,", "Water freezes at"]
    Dataset.from_dict({"prompt": prompts}).to_csv(tmp_path / "prompts.csv")
    space = dict(names)
    exec(DATASET.replace("max_new_tokens=40", "max_new_tokens=6, do_sample=False"), space)
    assert space["dataset"].column_names[:2] == ["prompt", "completion"]
    for prompt, completion in zip(prompts, space["dataset"]["completion"], strict=True):
        ids = names["tokenizer"](prompt, return_tensors="pt")
        out = names["model"].generate(**ids, max_new_tokens=6, do_sample=False)
        expected = names["tokenizer"].decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert completion == expected


def test_complete_example(capsys: pytest.CaptureFixture[str]) -> None:
    code = COMPLETE.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(embedded_model_dir())))
    assert code != COMPLETE
    code = code.replace("max_new_tokens=60", "max_new_tokens=20")
    space: dict[str, Any] = {}
    exec(code, space)
    hf_async_batching.get_manager(space["model"]).close()
    out = capsys.readouterr().out
    assert "Bananas" in out
    assert "blue" in out
    assert "17" in out
