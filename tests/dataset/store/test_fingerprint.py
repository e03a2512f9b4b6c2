from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from support.character_tokenizer import character_tokenizer
from support.tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from hf_async_batching.dataset.store.fingerprint import (
    differences,
    fingerprint_of_function,
    fingerprint_of_model,
    fingerprint_of_tokenizer,
)


def test_differences_have_names() -> None:
    before = {"a": 1, "b": {"c": 2, "d": 3}, "e": None}
    assert differences(before, before) == []
    assert differences(before, {"a": 2, "b": {"c": 2, "d": 4}, "f": "x" * 200}) == [
        "a: 1 before, 2 now",
        "b.d: 3 before, 4 now",
        f"f: None before, {'x' * 97}... now",
    ]


def test_models(tmp_path: Path) -> None:
    model = tiny_model("Llama")
    first = fingerprint_of_model(model)
    model.save_pretrained(tmp_path)
    assert fingerprint_of_model(model) == first
    assert fingerprint_of_model(AutoModelForCausalLM.from_pretrained(tmp_path)) == first
    assert fingerprint_of_model(tiny_model("Llama")) == first
    assert fingerprint_of_model(tiny_model("Llama", seed=1))["weights"] != first["weights"]
    assert fingerprint_of_model(tiny_model("Llama").to(torch.bfloat16))["dtype"] == "bfloat16"
    assert fingerprint_of_model(tiny_model("Llama", rms_norm_eps=1e-3))["config"] != first["config"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    assert fingerprint_of_model(model)["weights"] != first["weights"]


def test_tokenizers() -> None:
    first = fingerprint_of_tokenizer(character_tokenizer())
    assert fingerprint_of_tokenizer(character_tokenizer()) == first
    other = character_tokenizer()
    other.add_tokens(["<new>"])
    assert fingerprint_of_tokenizer(other)["content"] != first["content"]  # type: ignore[index]
    assert fingerprint_of_tokenizer(None) is None


def ends_with(text: str, ending: str = "!") -> str:
    return text + ending


class Ending:
    def __init__(self, ending: str) -> None:
        self.ending = ending

    def __call__(self, row: Any) -> str:
        return str(row) + self.ending


def functions() -> list[Any]:
    word = "captured"

    def inner(row: Any) -> str:
        return ends_with(row["a"]) + word

    def outer(row: Any) -> str:
        return inner(row)

    return [
        lambda row: row["a"],
        lambda row: row["b"],
        lambda row: [value for value in row if value in {"x", "y", "z"}],
        inner,
        outer,
        functools.partial(ends_with, ending="?"),
        functools.partial(ends_with, ending="."),
        ends_with,
        Ending("?"),
        Ending("!"),
        Ending("!").__call__,
        str.upper,
        str.lower,
    ]


def test_functions_differ() -> None:
    assert len({fingerprint_of_function(function) for function in functions()}) == len(functions())


def test_functions_are_the_same_in_another_process() -> None:
    """With other addresses, and another order of sets."""
    root = Path(__file__).parents[3]
    code = (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]\n"
        "from dataset.store.test_fingerprint import *\n"
        "print([fingerprint_of_function(function) for function in functions()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "1", "PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([fingerprint_of_function(function) for function in functions()])
