"""`hf-async-batching demo`: starts the page as a program of its own, if its code is available.

The page is built on this package, so the package does not import it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Any

_PAGE = "demo.app"
_CHECKOUT = Path(__file__).parents[2]

SUMMARY = "start the web page that chats"

_NO_PAGE = """\
the page is not part of the installed package; get a checkout of the repository and run `make demo` there"""
_NO_GRADIO = "the page needs packages that are not installed: pip install -e '.[demo]' in the checkout, or `make demo`"


def add_parser(commands: Any) -> None:
    """Add `demo` to the sub-commands of an argument parser; it is listed if the page's code is available."""
    listed = {"help": SUMMARY} if _find_page() else {}
    parser: argparse.ArgumentParser = commands.add_parser("demo", add_help=False, **listed)
    parser.set_defaults(run=_run, takes_rest=True)


def _find_page() -> bool:
    """Whether the page can be imported. In a checkout, that is possible from any working folder."""
    if (_CHECKOUT / "demo" / "app.py").exists() and str(_CHECKOUT) not in sys.path:
        sys.path.append(str(_CHECKOUT))
    try:
        return importlib.util.find_spec(_PAGE) is not None
    except ImportError:
        return False


def _run(arguments: argparse.Namespace) -> int:
    if not _find_page():
        return _cannot(_NO_PAGE)
    # The page's own parser runs without the page: `--help` and mistakes need no Gradio.
    importlib.import_module("demo.arguments").make_parser("hf-async-batching demo").parse_args(arguments.rest)
    if importlib.util.find_spec("gradio") is None:
        return _cannot(_NO_GRADIO)
    before, sys.argv = sys.argv, ["hf-async-batching demo", *arguments.rest]
    try:
        runpy.run_module(_PAGE, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


def _cannot(why: str) -> int:
    print(f"hf-async-batching demo: {why}", file=sys.stderr)
    return 1
