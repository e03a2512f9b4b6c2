"""`hf-async-batching demo`: starts the page as a program of its own, if its code is there.

The page is built on this package, so the package does not import it.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from typing import Any

_PAGE = "demo.app"

SUMMARY = "start the web page that chats"

_REMEDY = """\
the page is not part of the installed package; get a checkout of the repository and run `make demo` there, or
`python -m hf_async_batching demo` from its folder once its requirements are there: pip install -e '.[demo]'"""


def add_parser(commands: Any) -> None:
    """Add `demo` to the sub-commands of an argument parser."""
    parser: argparse.ArgumentParser = commands.add_parser("demo", help=SUMMARY, add_help=False)
    parser.set_defaults(run=_run, takes_rest=True)


def _run(arguments: argparse.Namespace) -> int:
    try:
        found = importlib.util.find_spec(_PAGE) is not None and importlib.util.find_spec("gradio") is not None
    except ImportError:
        found = False
    if not found:
        print(f"hf-async-batching demo: {_REMEDY}", file=sys.stderr)
        return 1
    before, sys.argv = sys.argv, ["hf-async-batching demo", *arguments.rest]
    try:
        runpy.run_module(_PAGE, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0
