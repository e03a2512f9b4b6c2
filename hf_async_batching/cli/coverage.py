"""The commands `check` and `coverage`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_async_batching.cli.load_model import load_model
from hf_async_batching.coverage.verdicts import BAD, LONGEST, describe

_CHECK = """\
Serve random prompts of different lengths together, through `submit` and as one padded batch through
`generate(custom_generate=...)`. Compare every token and log-probability with plain `generate`, one prompt at a time.
The exit status is 0 if all are equal or differ only by rounding.
"""


def add_check_parser(commands: Any) -> None:
    """Add `check` to the sub-commands of an argument parser."""
    check = commands.add_parser("check", help="check that a model is served exactly", description=_CHECK)
    check.add_argument("model", metavar="MODEL", help="a model's folder or its name on the Hub")
    check.add_argument("--device", default="cpu", help="device to run on (default: cpu)")
    check.add_argument(
        "--dtype",
        default="float32",
        help="dtype of the weights (default: float32; for others, the comparison allows for rounding)",
    )
    check.add_argument("--new-tokens", type=int, default=12, metavar="N", help="tokens per prompt (default: 12)")
    check.add_argument(
        "--longest",
        type=int,
        default=LONGEST,
        metavar="N",
        help="longest prompt; prompts go beyond windows and chunks of the config up to this (default: %(default)s)",
    )
    check.add_argument("--trust-remote-code", action="store_true", help="allow code that comes with the model to run")
    check.set_defaults(run=_check)


def add_coverage_parser(commands: Any) -> None:
    """Add `coverage` to the sub-commands of an argument parser."""
    coverage = commands.add_parser(
        "coverage",
        help="check every causal language model class of the installed transformers",
        description="Check tiny random models of every causal language model class, and write a table.",
    )
    coverage.add_argument(
        "classes", nargs="*", metavar="CLASS", help="only these classes, or variants (CLASS+VARIANT)"
    )
    coverage.add_argument("--device", default="cpu", help="device to run on, cpu or cuda (default: cpu)")
    coverage.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="dtype of the weights"
    )
    coverage.add_argument(
        "--out",
        type=Path,
        metavar="FILE.md",
        help="write the results into this table, and FILE.json beside it; results of other devices, dtypes, releases "
        "of transformers and classes stay in it",
    )
    coverage.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="check nothing; only merge the results in these files into the table (--out)",
    )
    coverage.add_argument(
        "--resume",
        action="store_true",
        help="check only classes that failed or are missing in FILE.json for this device, dtype and release",
    )
    coverage.add_argument(
        "--workers", type=int, metavar="N", help="classes at a time (default: 2; on a GPU one per CPU, up to 16)"
    )
    coverage.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="time limit of a class (default: 600; on a GPU 120)"
    )
    coverage.add_argument(
        "--limit-minutes", type=float, metavar="M", help="start no class after M minutes (default: no limit)"
    )
    coverage.add_argument(
        "--media",
        action="store_true",
        help="check the classes that read pictures or sounds, with these, on the CPU; --out writes their own table",
    )
    coverage.set_defaults(run=_coverage, go_on=_go_on)


def _check(arguments: argparse.Namespace) -> int:
    import torch

    from hf_async_batching.coverage.check import check_model

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    model = load_model(arguments.model, dtype=arguments.dtype, trust_remote_code=arguments.trust_remote_code)
    model = model.to(arguments.device).eval()
    verdict = check_model(model, new_tokens=arguments.new_tokens, longest=arguments.longest)
    print(f"{type(model).__name__}: {describe(verdict)}")
    return 0 if verdict.served else 1


def _go_on(arguments: argparse.Namespace) -> str:
    return "the same command with --resume continues" if arguments.out is not None and arguments.out.exists() else ""


def _cannot_write(out: Path | None) -> str:
    """Say why the table cannot be written, before hours of checks; make its folder. Empty if it can be written."""
    if out is None:
        return ""
    if out.suffix == ".json":
        return f"--out names the table, and FILE.json is written beside it: pass --out {out.with_suffix('.md')}"
    if out.is_dir():
        return f"--out names a file, and {out} is a folder: pass --out {out / 'model-coverage.md'}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--out {out}: its folder cannot be made: {error}"
    return "" if os.access(out.parent, os.W_OK) else f"--out {out}: its folder is not writable"


def _cannot_read(paths: Iterable[Path]) -> str:
    absent = [str(path) for path in paths if not path.is_file()]
    return f"--merge: there is no file {', '.join(absent)}" if absent else ""


def _media(arguments: argparse.Namespace) -> int:
    from hf_async_batching.coverage.media_check import check_media_class, media_entries, media_page

    out: Path | None = arguments.out
    if mistake := _cannot_write(out):
        print(mistake, file=sys.stderr)
        return 2
    verdicts = {}
    for name in arguments.classes or media_entries():
        verdicts[name] = verdict = check_media_class(name)
        print(f"{name}: {' '.join(filter(None, (verdict.status, verdict.route, verdict.note)))}", flush=True)
    if out is not None:
        out.write_text(media_page(verdicts), encoding="utf-8")
    return 1 if any(verdict.status == "wrong" for verdict in verdicts.values()) else 0


def _coverage(arguments: argparse.Namespace) -> int:
    if arguments.media:
        return _media(arguments)
    import torch
    import transformers

    from hf_async_batching.coverage.families import entry_names, is_there
    from hf_async_batching.coverage.processes import check_families, start_method
    from hf_async_batching.coverage.results import CoverageRun, merged, read_json
    from hf_async_batching.coverage.table import read, summary, write

    out: Path | None = arguments.out
    if mistake := _cannot_write(out) or _cannot_read(arguments.merge or ()):
        print(mistake, file=sys.stderr)
        return 2
    runs = read(out) if out is not None else []
    if arguments.merge is not None:
        if out is None:
            print("--merge needs --out", file=sys.stderr)
            return 2
        write(out, merged(runs, *(run for path in arguments.merge for run in read_json(path))))
        return 0

    begun = time.monotonic()
    on_gpu = arguments.device.startswith("cuda")
    workers = arguments.workers or (min(16, os.cpu_count() or 2) if on_gpu else 2)
    timeout = arguments.timeout or (120.0 if on_gpu else 600.0)
    until = begun + 60 * arguments.limit_minutes if arguments.limit_minutes is not None else float("inf")
    try:
        method, card = start_method(arguments.device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    if method != "forkserver":
        print("an imported package uses the GPU, so each class starts its own Python process", flush=True)

    kind = arguments.device.partition(":")[0]
    run = CoverageRun(kind, arguments.dtype, transformers.__version__, str(torch.__version__), card)
    known = next((each.finished for each in runs if each.key == run.key), {}) if arguments.resume else {}
    elsewhere = {name for each in runs for name in each.classes}
    asked = arguments.classes or entry_names()
    names = [name for name in asked if is_there(name)]
    if absent := sorted(name for name in arguments.classes or elsewhere if not is_there(name)):
        print(f"not in transformers {transformers.__version__}, skipped: {', '.join(absent)}", flush=True)
    run.classes.update({name: verdict for name, verdict in known.items() if name in set(names)})
    print(f"{run.label}{f' on {card}' if card else ''}: {len(names)} classes and variants, {workers} at a time")

    missing = [name for name in names if name not in run.classes]
    for checked in check_families(
        missing,
        device=arguments.device,
        dtype=arguments.dtype,
        workers=workers,
        timeout=timeout,
        until=until,
        method=method,
    ):
        run.classes[checked.name] = checked.verdict
        print(f"{len(run.classes)}/{len(names)} {checked.name}: {describe(checked.verdict)}", flush=True)
        if checked.log:
            print("".join(f"    {line}\n" for line in checked.log.splitlines()), end="", flush=True)
        if out is not None:
            write(out, merged(runs, run))
    for line in summary(run.classes):
        print(line)
    left = len(names) - len(run.classes)
    if left:
        print(f"{left} were not started within the limit: --resume checks them")
    print(f"{time.monotonic() - begun:.0f} seconds")
    statuses = {each for verdict in run.classes.values() for each in (verdict.status, verdict.generate.status)}
    return 1 if statuses & BAD else 0
