"""The commands `check` and `coverage`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_async_batching.coverage.check import LONGEST, Verdict, check_model

_CHECK = """\
Serve ragged prompts of random tokens together, through `submit` and as one padded batch through
`generate(custom_generate=...)`, and compare every token and log-probability with plain `generate`, one prompt at a
time. The exit status is 0 where all are equal.
"""


def add_parsers(commands: Any) -> None:
    """Add both commands to the command line."""
    check = commands.add_parser("check", help="whether a model is served exactly", description=_CHECK)
    check.add_argument("model", metavar="MODEL", help="name on the Hub, or folder")
    check.add_argument("--device", default="cpu", help="where to run it (default: cpu)")
    check.add_argument("--dtype", default="float32", help="of the weights; float32 can be exact (default)")
    check.add_argument("--new-tokens", type=int, default=12, metavar="N", help="tokens per prompt (default: 12)")
    check.add_argument(
        "--longest",
        type=int,
        default=LONGEST,
        metavar="N",
        help="tokens up to which prompts go beyond windows, chunks and the like of the config (default: %(default)s)",
    )
    check.set_defaults(run=_check)

    coverage = commands.add_parser(
        "coverage",
        help="check every causal language model class of the installed transformers",
        description="Check tiny random models of every causal language model class, and write a table.",
    )
    coverage.add_argument(
        "classes", nargs="*", metavar="CLASS", help="only these classes, or variants (CLASS+VARIANT)"
    )
    coverage.add_argument("--out", type=Path, metavar="FILE.md", help="where to write the table, and FILE.json beside")
    coverage.add_argument(
        "--resume", action="store_true", help="keep what FILE.json has of this release, and check what is missing"
    )
    coverage.add_argument("--workers", type=int, default=2, metavar="N", help="classes at a time (default: 2)")
    coverage.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="per class (default: 600)")
    coverage.set_defaults(run=_coverage)


def describe(verdict: Verdict) -> str:
    """One line for a person."""
    found = verdict.generate
    parts = [verdict.status, f"({verdict.route})" if verdict.route else "", verdict.reason]
    if found.status != verdict.status or found.reason != verdict.reason:
        parts += [f"through submit; {found.status} through generate", found.reason]
    if verdict.not_reached:
        parts.append(f"[no prompt went beyond {', '.join(verdict.not_reached)}]")
    return " ".join(part for part in parts if part)


def _check(arguments: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(arguments.device).eval()
    verdict = check_model(model, new_tokens=arguments.new_tokens, longest=arguments.longest)
    print(f"{type(model).__name__}: {describe(verdict)}")
    return 0 if verdict.exact else 1


def _coverage(arguments: argparse.Namespace) -> int:
    from hf_async_batching.coverage.families import entry_names
    from hf_async_batching.coverage.table import check_families, counts, drop_in_counts, read_known, write

    names = arguments.classes or entry_names()
    verdicts: dict[str, Verdict] = {}
    if arguments.resume and arguments.out is not None:
        verdicts = {name: verdict for name, verdict in read_known(arguments.out).items() if name in set(names)}
    missing = [name for name in names if name not in verdicts]
    for name, verdict in check_families(missing, workers=arguments.workers, timeout=arguments.timeout):
        verdicts[name] = verdict
        print(f"{len(verdicts)}/{len(names)} {name}: {describe(verdict)}", flush=True)
        if arguments.out is not None:
            write(arguments.out, verdicts)
    ways = {"submit": counts(verdicts), "generate": drop_in_counts(verdicts)}
    for way, found in ways.items():
        print(f"{way}: " + ", ".join(f"{count} {status}" for status, count in found.most_common()))
    bad = {"wrong", "failed"}
    return 1 if any(bad & found.keys() for found in ways.values()) else 0
