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
    _plain,
    _shown,
    _weights,
    differences,
    digest,
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


def test_fingerprints_stay_what_earlier_versions_made_them() -> None:
    """A folder that a version began is continued by the next one."""
    assert digest("a", b"bc") == "95881179b567b09c5fdcaa10"
    assert digest("ab", b"c") == "fbb52a8f5facee1a3d278bb4"
    assert digest() == _weights(torch.nn.ReLU()) == "b8e1dda3ac0aa3820ad2990b"  # type: ignore[arg-type]
    layer = torch.nn.Linear(40, 10, bias=False)
    layer.weight = torch.nn.Parameter(torch.arange(400.0).view(10, 40))
    assert _weights(layer) == "4523d6586170c9347609caac"  # type: ignore[arg-type]
    layer.weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4).t())
    assert _weights(layer) == "c365d81e4a7ab49ef8a94f48"  # type: ignore[arg-type]
    value = {"b": [1, (2.5, None)], "a": {3, 1, 2}, 2: frozenset("yx"), 3: Ending("!")}
    assert _plain(value) == "{'a':{1,2,3},'b':[1,[2.5,None]],2:{'x','y'},3:Ending{'ending':'!'}}"
    assert (_plain(torch.float16), _plain(print)) == ("torch.float16", "builtin_function_or_method")


def test_a_change_of_a_part_of_a_large_weight_is_seen() -> None:
    layer: Any = torch.nn.Linear(64, 64, bias=False)
    before = _weights(layer)
    with torch.no_grad():
        layer.weight[60:] += 1
    assert _weights(layer) != before


def test_values_of_a_hundred_letters_are_shown_whole() -> None:
    assert (_shown("x" * 100), _shown("x" * 101), _shown(3)) == ("x" * 100, "x" * 97 + "...", "3")


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
