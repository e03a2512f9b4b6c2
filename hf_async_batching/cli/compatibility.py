"""`hf-async-batching compatibility`: a page that says how each argument of `generate` is handled."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_async_batching.inputs.compatibility import page


def add_parser(commands: Any) -> None:
    """Add `compatibility` to the sub-commands of an argument parser."""
    summary = "print how each argument of generate is handled"
    parser: argparse.ArgumentParser = commands.add_parser(
        "compatibility", help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page to FILE instead")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.write is None:
        print(page(), end="")
    else:
        arguments.write.write_text(page(), encoding="utf-8")
        print(f"wrote {arguments.write}")
    return 0
