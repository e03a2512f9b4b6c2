"""The command line `hf-async-batching`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from typing import Any

import hf_async_batching
from hf_async_batching.cli import bench_arguments, coverage, dataset_arguments, demo
from hf_async_batching.cli import compatibility as compatibility_command
from hf_async_batching.cli.arguments import CommandError, CommandParser

_EXAMPLES = """\

examples:
  hf-async-batching dataset questions.csv --model path/or/hub-name --prompt-column question --output answers
  hf-async-batching bench seed --shape llama-3.1-8b --depth 1 2 --out results
  hf-async-batching bench mix --model path/or/hub-name --peer generate_batch
  hf-async-batching check path/or/hub-name
  hf-async-batching demo

`hf-async-batching COMMAND --help` shows more examples.
"""


class _DeveloperCommands:
    """Adds sub-commands that `--help` lists after those for users.

    Args:
        commands: The sub-commands of the parser.
    """

    def __init__(self, commands: Any) -> None:
        self._commands = commands
        self._summaries: dict[str, str] = {}

    def add_parser(self, name: str, *, help: str, **options: Any) -> argparse.ArgumentParser:
        """Add a sub-command; the arguments are those of argparse's `add_parser`."""
        self._summaries[name] = help
        parser: argparse.ArgumentParser = self._commands.add_parser(name, **options)
        return parser

    def listed(self) -> str:
        """Return a heading, and a line with name and summary for each command."""
        lines = [f"  {name:<20}  {summary}\n" for name, summary in self._summaries.items()]
        return "commands for developers:\n" + "".join(lines)


class _Version(argparse.Action):
    """Prints the versions that a bug report needs. It reads them from the metadata and imports no package."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        versions = [f"Python {platform.python_version()}"]
        for name in ("torch", "transformers"):
            try:
                versions.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                versions.append(f"no {name}")
        print(f"{parser.prog} {hf_async_batching.__version__} ({', '.join(versions)})")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with the arguments `argv`, without the program's name. Returns the exit status."""
    parser = CommandParser(
        prog="hf-async-batching",
        description="Asynchronous continuous batching for Hugging Face generate.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    developers = _DeveloperCommands(commands)
    dataset_arguments.add_parser(commands)
    coverage.add_check_parser(commands)
    demo.add_parser(commands)
    bench_arguments.add_parser(developers)
    coverage.add_coverage_parser(developers)
    compatibility_command.add_parser(developers)
    parser.epilog = f"{developers.listed()}{_EXAMPLES}"
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "takes_rest", False):
        commands.choices[arguments.command].error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    arguments.argv = None if argv is None else list(argv)
    name = f"{parser.prog} {arguments.command}"
    try:
        status: int = arguments.run(arguments)
    except CommandError as error:
        parser.exit(2, f"{name}: {error}\n")
    except KeyboardInterrupt:
        go_on = getattr(arguments, "go_on", lambda _: None)(arguments)
        print(f"{name}: interrupted{f'; {go_on}' if go_on else ''}", file=sys.stderr)
        return 130
    return status
