"""Types of the command line's arguments, how a command's parser begins, and how it says what is wrong."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class CommandError(Exception):
    """What a person can put right; the message says how, in a line or two."""


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong without the list of all options."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and end with status 2."""
        self.exit(2, f"{self.prog}: {message}\n(`{self.prog} --help` lists the options)\n")


def count(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: It is smaller.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def command_parser(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a sub-command, added to the others.

    Args:
        commands: Sub-commands of an argument parser.
        name: What a person types.
        summary: One sentence, which begins in lower case and has no full stop.
        examples: Text behind the options; its lines stay as they are.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
