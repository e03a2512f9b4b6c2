"""The commands `check` and `coverage`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_async_batching.coverage.check import Verdict, check_model

_CHECK = """\
Serve ragged prompts of random tokens together, and compare every token and log-probability with plain `generate`, one
prompt at a time. The exit status is 0 where all are equal.
"""


def add_parsers(commands: Any) -> None:
    """Add both commands to the command line."""
    check = commands.add_parser("check", help="whether a model is served exactly", description=_CHECK)
    check.add_argument("model", metavar="MODEL", help="name on the Hub, or folder")
    check.add_argument("--device", default="cpu", help="where to run it (default: cpu)")
    check.add_argument("--dtype", default="float32", help="of the weights; float32 can be exact (default)")
    check.add_argument("--new-tokens", type=int, default=12, metavar="N", help="tokens per prompt (default: 12)")
    check.set_defaults(run=_check)

    coverage = commands.add_parser(
        "coverage",
        help="check every causal language model class of the installed transformers",
        description="Check tiny random models of every causal language model class, and write a table.",
    )
    coverage.add_argument("classes", nargs="*", metavar="CLASS", help="only these")
    coverage.add_argument("--out", type=Path, metavar="FILE.md", help="where to write the table, and FILE.json beside")
    coverage.add_argument("--workers", type=int, default=2, metavar="N", help="classes at a time (default: 2)")
    coverage.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="per class (default: 600)")
    coverage.set_defaults(run=_coverage)


def describe(verdict: Verdict) -> str:
    """One line for a person."""
    parts = [verdict.status, f"({verdict.route})" if verdict.route else "", verdict.reason]
    return " ".join(part for part in parts if part)


def _check(arguments: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(arguments.device).eval()
    verdict = check_model(model, new_tokens=arguments.new_tokens)
    print(f"{type(model).__name__}: {describe(verdict)}")
    return 0 if verdict.status == "exact" else 1


def _coverage(arguments: argparse.Namespace) -> int:
    from hf_async_batching.coverage.families import class_names
    from hf_async_batching.coverage.table import check_families, counts, to_json, to_markdown

    verdicts: dict[str, Verdict] = {}
    names = arguments.classes or class_names()
    for name, verdict in check_families(names, workers=arguments.workers, timeout=arguments.timeout):
        verdicts[name] = verdict
        print(f"{len(verdicts)}/{len(names)} {name}: {describe(verdict)}", flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts(verdicts).most_common()))
    if arguments.out is not None:
        arguments.out.write_text(to_markdown(verdicts))
        arguments.out.with_suffix(".json").write_text(to_json(verdicts) + "\n")
    bad = {"wrong", "failed"} & counts(verdicts).keys()
    return 1 if bad else 0
