"""The arguments of the page's command line; imports nothing heavy, so that `--help` comes at once."""

from __future__ import annotations

import argparse
import os
import socket
from typing import NoReturn

MODEL_VARIABLE = "HF_ASYNC_BATCHING_MODEL"
DEVICE_VARIABLE = "HF_ASYNC_BATCHING_DEVICE"

_DESCRIPTION = "The demo page: many chats at once on one engine, your own among them, and the engine's live figures."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong without the list of all options."""
        self.exit(2, f"{self.prog}: {message}\n(`{self.prog} --help` lists the options)\n")


def make_parser(prog: str = "python -m demo.app") -> argparse.ArgumentParser:
    """Return the parser of the page's arguments; `prog` is the command that the user typed."""
    parser = _Parser(prog=prog, description=_DESCRIPTION)
    parser.add_argument(
        "--model",
        default=os.environ.get(MODEL_VARIABLE) or None,
        help=f"a Hub id, a local folder, or random:SHAPE (default: ${MODEL_VARIABLE}, else SmolLM2-135M-Instruct)",
    )
    parser.add_argument("--host", help="address to listen on (default: this machine only; 0.0.0.0 for everyone)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="open a public Gradio link")
    parser.add_argument(
        "--depth", type=int, help="steps in flight; 1 is synchronous (default: 2 on a GPU, 1 on a CPU)"
    )
    parser.add_argument(
        "--device",
        default=os.environ.get(DEVICE_VARIABLE) or None,
        help=f"cuda, cuda:1, cpu … (default: ${DEVICE_VARIABLE}, else the GPU when there is one)",
    )
    parser.add_argument("--dtype", help="float32, bfloat16 … (default: bfloat16 on a GPU, else float32)")
    return parser


def port_problem(host: str | None, port: int | None) -> str | None:
    """Say in one line what is wrong with a port; None if the page can listen on it, or if none is given."""
    if port is None:
        return None
    address = host or "127.0.0.1"
    try:
        with socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET):
            return None
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        return f"--port {port}: the page cannot listen on {address} ({reason}); choose another port, or leave it out"
