"""Checks every family, each in a process of its own, and writes the table of what is served."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_async_batching.coverage.check import Verdict
from hf_async_batching.coverage.families import check_family

_TITLE = "# Which models are served"
_ROUTES = """\
| served as | which means |
| --- | --- |
| packed | all tokens of a step in one sequence, attention over pages by our kernels: the fast way |
| padded | through the family's own cache class: rows that decode share a batch, padded on the left as by `generate` |
| lockstep | the same, for families that know no padding: rows of equal length share a batch |
| single | a cache object per row, one row at a time: as fast as `generate`, and no faster |
| row states | beside pages, or in place of them, each row has recurrent states; no prefix is shared |
| whole prompts | prompts are not computed in pieces |
"""


def check_families(names: Iterable[str], *, workers: int = 2, timeout: float = 600.0) -> Iterator[tuple[str, Verdict]]:
    """Check classes, each in a process that may crash or hang without harm to the others.

    Args:
        names: Of classes; see `class_names`.
        workers: Processes at a time.
        timeout: Seconds per class.

    Yields:
        Name and verdict, in order of completion.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_async_batching.coverage.families"])
    todo = list(names)[::-1]
    running: dict[Any, tuple[str, Any, float]] = {}
    while todo or running:
        while todo and len(running) < workers:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_check, args=(todo[-1], sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = todo.pop(), process, time.monotonic() + timeout
        first_deadline = min(deadline for _, _, deadline in running.values())
        ready = set(wait(list(running), max(0.0, first_deadline - time.monotonic())))
        for receiver, (name, process, deadline) in list(running.items()):
            if receiver in ready:
                try:
                    verdict = receiver.recv()
                except EOFError:
                    verdict = Verdict("failed", "the process ended without a word")
            elif time.monotonic() >= deadline:
                verdict = Verdict("failed", f"not done after {timeout:g} seconds")
            else:
                continue
            process.kill()
            process.join()
            del running[receiver]
            yield name, verdict


def _check(name: str, sender: Connection) -> None:
    # Families print, warn and log a good deal about configs that nobody would train.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        verdict = check_family(name)
    except Exception as error:
        verdict = Verdict("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
    sender.send(verdict)
    sender.close()


def counts(verdicts: dict[str, Verdict]) -> Counter[str]:
    """How many classes have each status."""
    return Counter(verdict.status for verdict in verdicts.values())


def to_markdown(verdicts: dict[str, Verdict]) -> str:
    """The table; the same for the same releases of torch and transformers."""
    found = ", ".join(f"{count} {status}" for status, count in counts(verdicts).most_common())
    routes = Counter(verdict.route for verdict in verdicts.values() if verdict.status == "exact")
    lines = [
        _TITLE,
        "",
        f"Made by `hf-async-batching coverage` with transformers {transformers.__version__}: every class that",
        "`AutoModelForCausalLM` makes, and all others named `*ForCausalLM`, with tiny random weights in float32, on a",
        "CPU. Ragged prompts, one of them late and one behind a shared prefix, computed in pieces beside rows that",
        "decode; *exact* means that every token and log-probability is the one of `model.generate` for that prompt",
        "alone. `hf-async-batching check MODEL` does the same with a model of yours.",
        "",
        f"{len(verdicts)} classes: {found}.",
        "",
        _ROUTES,
        "Exact, by how they are served: "
        + ", ".join(f"{count} {route}" for route, count in routes.most_common())
        + ".",
        "",
        "| class | | served as | remark |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {verdict.status} | {verdict.route} | {verdict.reason.replace('|', chr(92) + '|')} |"
        for name, verdict in sorted(verdicts.items())
    ]
    return "\n".join(lines) + "\n"


def to_json(verdicts: dict[str, Verdict]) -> str:
    """All that was found, with the versions."""
    found = {name: asdict(verdict) for name, verdict in sorted(verdicts.items())}
    return json.dumps(
        {"transformers": transformers.__version__, "torch": torch.__version__, "classes": found}, indent=1
    )


def read_json(path: Path) -> dict[str, Verdict]:
    """What `to_json` wrote."""
    return {name: Verdict(**found) for name, found in json.loads(path.read_text())["classes"].items()}
