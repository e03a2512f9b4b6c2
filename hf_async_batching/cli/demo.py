"""`hf-async-batching demo`: starts the page, where its code is; what follows `demo` is the page's."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

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
        found = importlib.util.find_spec("demo.app") is not None and importlib.util.find_spec("gradio") is not None
    except ImportError:
        found = False
    if not found:
        print(f"hf-async-batching demo: {_REMEDY}", file=sys.stderr)
        return 1
    from demo import app

    status = app.main(arguments.rest)
    return int(status or 0)
