"""The command line `hf-async-batching`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from hf_async_batching.cli import bench, coverage, dataset, demo
from hf_async_batching.cli import compatibility as compatibility_command

_EXAMPLES = """\

examples:
  hf-async-batching dataset questions.csv --model path/or/hub-name --prompt-column question --output answers
  hf-async-batching bench seed --shape llama-3.1-8b --depth 1 2 --out results
  hf-async-batching bench mix --model path/or/hub-name --peer generate_batch
  hf-async-batching check path/or/hub-name
  hf-async-batching demo

`hf-async-batching COMMAND --help` has more of them.
"""


class _DeveloperCommands:
    """Adds sub-commands that `--help` lists apart from those for users.

    Args:
        commands: The sub-commands of the parser.
    """

    def __init__(self, commands: Any) -> None:
        self._commands = commands
        self._summaries: dict[str, str] = {}

    def add_parser(self, name: str, *, help: str, **options: Any) -> argparse.ArgumentParser:
        """Add a sub-command, with the arguments of argparse's own `add_parser`."""
        self._summaries[name] = help
        parser: argparse.ArgumentParser = self._commands.add_parser(name, **options)
        return parser

    def listed(self) -> str:
        """The commands and their summaries, one to a line, below a heading."""
        lines = [f"  {name:<20}  {summary}\n" for name, summary in self._summaries.items()]
        return "commands for developers:\n" + "".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` is what follows the program's name. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="hf-async-batching",
        description="Asynchronous continuous batching for Hugging Face generate.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    developers = _DeveloperCommands(commands)
    dataset.add_parser(commands)
    coverage.add_check_parser(commands)
    demo.add_parser(commands)
    bench.add_parser(developers)
    coverage.add_coverage_parser(developers)
    compatibility_command.add_parser(developers)
    parser.epilog = f"{developers.listed()}{_EXAMPLES}"
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    arguments.argv = None if argv is None else list(argv)
    status: int = arguments.run(arguments)
    return status
