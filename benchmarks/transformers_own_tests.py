"""Runs transformers' own generation tests through the plug: its `GenerationTesterMixin`, greedy and sampling.

    pip install parameterized timeout-decorator
    python -m benchmarks.transformers_own_tests CHECKOUT [--families llama gemma2] [--out PAGE.md --tests-of TEXT]

CHECKOUT is a clone of transformers at the installed release, because its wheels hold no tests. Nothing of transformers
is patched: each family's own test class is subclassed, and its models are subclasses whose `generate` calls the plug.
A test that fails also runs without the plug. If it fails there too, it says nothing about the plug.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import unittest
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

import hf_async_batching
from hf_async_batching import UnsupportedArgumentError, UnsupportedModelError

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "stablelm",
    "olmo2",
    "granite",
    "mixtral",
    "qwen3_moe",
    "starcoder2",
]
# Tests of other search methods, or of the cache object itself, are left out.
WANTED = re.compile(
    r"test_((greedy|sample)_generate"
    r"|prompt_lookup_decoding"
    r"|generate_(without_input_ids|from_(random_)?inputs_embeds|methods_with_logits_to_keep|with_and_without_position_ids))"
    r"(?!.*(beam|static_cache))"
)

Outcome = tuple[str, str]


def served(model_class: type) -> type:
    """Make a subclass of a model class, with the same name, whose `generate` calls the plug."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return model_class.generate(self, *args, custom_generate=hf_async_batching.generate, **kwargs)

    members = {"generate": generate, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), members)


def through_the_plug(test_class: type) -> type:
    """Make a subclass of a family's test class that tests served models."""

    class Served(test_class):  # type: ignore[misc]
        @property
        def all_generative_model_classes(self) -> tuple[type, ...]:
            return tuple(served(model_class) for model_class in super().all_generative_model_classes)

        @all_generative_model_classes.setter
        def all_generative_model_classes(self, _: Any) -> None:
            raise AttributeError("set on the instance by this release's tests, which this script does not know")

    Served.__name__ = Served.__qualname__ = test_class.__name__
    return Served


def test_classes(family: str) -> Iterator[type]:
    """Yield the classes with generation tests in a family's module."""
    module = importlib.import_module(f"tests.models.{family}.test_modeling_{family}")
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and value.__module__ == module.__name__
            and issubclass(value, unittest.TestCase)
            and any(base.__name__ == "GenerationTesterMixin" for base in value.__mro__)
        ):
            yield value


def run(test_class: type, name: str) -> Outcome:
    """Run a test; return "passed", "not applicable" or "failed", and the reason."""
    result = unittest.TestResult()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        test = test_class(name)
        test.run(result)
    if result.skipped:
        return "not applicable", f"skipped: {result.skipped[0][1]}"
    problems = [*result.errors, *result.failures]
    if not problems:
        return "passed", ""
    last = problems[0][1].strip().splitlines()[-1]
    refused = any(error.__name__ in last for error in (UnsupportedArgumentError, UnsupportedModelError))
    return ("not applicable" if refused else "failed"), last.rpartition("errors.")[2]


def outcomes(families: list[str]) -> Iterator[tuple[str, str, Outcome]]:
    """Yield family, test and outcome of every test."""
    for family in families:
        try:
            classes = list(test_classes(family))
        except ImportError as error:
            yield family, "(import)", ("failed", str(error))
            continue
        for test_class in classes:
            plugged = through_the_plug(test_class)
            for name in filter(WANTED.match, unittest.TestLoader().getTestCaseNames(test_class)):
                outcome = run(plugged, name)
                if outcome[0] == "failed":
                    control = run(test_class, name)
                    if control[0] != "passed":
                        outcome = "not applicable", f"does not pass without the plug: {control[1]}"
                yield family, name, outcome


def report(found: list[tuple[str, str, Outcome]], tests_of: str) -> str:
    """Write the outcomes as a page; `tests_of` says where the tests come from."""
    counts = Counter(outcome[0] for _, _, outcome in found)
    lines = [
        "# transformers' own generation tests through the plug",
        "",
        f"`GenerationTesterMixin`, greedy and sampling, transformers {transformers.__version__}: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        + f". Made by `python -m benchmarks.transformers_own_tests CHECKOUT`{tests_of and '; tests: ' + tests_of}.",
        "",
        "| family | test | outcome | reason |",
        "| --- | --- | --- | --- |",
    ]
    for family, name, (kind, reason) in found:
        short = reason.replace("|", "\\|")
        lines.append(f"| {family} | `{name}` | {kind} | {short[:300]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tests-of", default="", help="origin of CHECKOUT, for the page")
    arguments = parser.parse_args()
    if not (arguments.checkout / "tests" / "generation" / "test_utils.py").exists():
        parser.error(f"{arguments.checkout} holds no tests/generation/test_utils.py; pass a clone of transformers")
    sys.path.insert(0, str(arguments.checkout.resolve()))
    found = []
    for family, name, outcome in outcomes(arguments.families):
        print(f"{family:12} {name:50} {outcome[0]:15} {outcome[1][:120]}", flush=True)
        found.append((family, name, outcome))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(report(found, arguments.tests_of))
    return int(not found or any(outcome[0] == "failed" for _, _, outcome in found))


if __name__ == "__main__":
    sys.exit(main())
