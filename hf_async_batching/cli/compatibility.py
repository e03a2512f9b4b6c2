"""`hf-async-batching compatibility`: the table of what becomes of each argument, as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_async_batching.inputs.compatibility import page


def add_parser(commands: Any) -> None:
    """Add `compatibility` to the sub-commands of an argument parser."""
    summary = "print what becomes of every generate argument"
    parser: argparse.ArgumentParser = commands.add_parser(
        "compatibility", help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there instead")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.write is None:
        print(page(), end="")
    else:
        arguments.write.write_text(page(), encoding="utf-8")
        print(f"wrote {arguments.write}")
    return 0
