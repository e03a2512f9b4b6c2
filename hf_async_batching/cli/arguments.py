"""What all commands share: argument types, the start of a command's parser, and its errors."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class CommandError(Exception):
    """A mistake that the user can correct; the message says how, in a line or two."""


class CommandParser(argparse.ArgumentParser):
    """Reports an error without the list of all options."""

    def error(self, message: str) -> NoReturn:
        """Print the error, and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n(`{self.prog} --help` lists the options)\n")


def count(text: str) -> int:
    """Read a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: The number is smaller.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def command_parser(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """Add a sub-command, and return its parser.

    Args:
        commands: Sub-commands of an argument parser.
        name: The name that users type.
        summary: One sentence, in lower case and without a full stop.
        examples: Text after the options; its line breaks are kept.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
