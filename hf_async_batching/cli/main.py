"""The command line `hf-async-batching`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` is what follows the program's name. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="hf-async-batching",
        description="Asynchronous continuous batching for Hugging Face generate.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    dataset.add_parser(commands)
    bench.add_parser(commands)
    compatibility_command.add_parser(commands)
    coverage.add_parsers(commands)
    demo.add_parser(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    arguments.argv = None if argv is None else list(argv)
    status: int = arguments.run(arguments)
    return status
