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

from hf_async_batching.coverage.check import Finding, Verdict
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
    """How many entries have each status through `submit`."""
    return Counter(verdict.status for verdict in verdicts.values())


def drop_in_counts(verdicts: dict[str, Verdict]) -> Counter[str]:
    """How many entries have each status through `generate(custom_generate=...)`."""
    return Counter(verdict.generate.status for verdict in verdicts.values())


def to_markdown(verdicts: dict[str, Verdict]) -> str:
    """The table; the same for the same releases of torch and transformers."""
    classes = {name: verdict for name, verdict in verdicts.items() if "+" not in name}
    variants = {name: verdict for name, verdict in verdicts.items() if "+" in name}
    routes = Counter(verdict.route for verdict in classes.values() if verdict.status == "exact")
    both = sum(verdict.exact for verdict in classes.values())
    lines = [
        _TITLE,
        "",
        f"Made by `hf-async-batching coverage` with transformers {transformers.__version__}: every class that",
        "`AutoModelForCausalLM` makes, and all others named `*ForCausalLM`, with tiny random weights in float32, on a",
        "CPU; and, behind a plus sign, what real checkpoints of some classes have beside their config's defaults.",
        "The tiny models have what real ones have (windows, chunks, sparse and recurrent layers, several groups of",
        "states, shared experts, scaled rotary frequencies, ...), so small that the prompts go beyond each length.",
        "",
        "*submit*: ragged prompts, one of them late and one behind a shared prefix, computed in pieces beside rows",
        "that decode. *generate*: the same prompts as one batch, padded on the left, through",
        "`model.generate(custom_generate=hf_async_batching.generate)`. *exact* means that every token and",
        "log-probability is the one of plain `model.generate` for that prompt alone. *plain, padded* says what plain",
        "`generate` itself makes of the padded batch: the same tokens, others (padding changes what the family",
        "computes), or it fails. `hf-async-batching check MODEL` does the same with a model of yours.",
        "",
        f"{len(classes)} classes. submit: {_most_common(counts(classes))}. generate: "
        f"{_most_common(drop_in_counts(classes))}. Exact in both ways: {both}.",
        "",
        f"{len(variants)} variants. submit: {_most_common(counts(variants))}. generate: "
        f"{_most_common(drop_in_counts(variants))}.",
        "",
        _ROUTES,
        "Classes that are exact, by how they are served: "
        + "; ".join(f"{count} {route}" for route, count in routes.most_common())
        + ".",
        "",
        "| class | submit | generate | served as | plain, padded | remark |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {verdict.status} | {verdict.generate.status} | {verdict.route} | {verdict.plain_padded} | "
        f"{_remark(verdict)} |"
        for name, verdict in sorted(verdicts.items())
    ]
    return "\n".join(lines) + "\n"


def _most_common(counted: Counter[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counted.most_common())


def _remark(verdict: Verdict) -> str:
    parts = [verdict.reason]
    if verdict.generate.reason and verdict.generate.reason != verdict.reason:
        parts.append(f"generate: {verdict.generate.reason}")
    if verdict.not_reached:
        parts.append(f"not beyond {', '.join(verdict.not_reached)}")
    return "; ".join(filter(None, parts)).replace("|", "\\|")


def to_json(verdicts: dict[str, Verdict]) -> str:
    """All that was found, with the versions."""
    found = {name: asdict(verdict) for name, verdict in sorted(verdicts.items())}
    return json.dumps(
        {"transformers": transformers.__version__, "torch": torch.__version__, "classes": found}, indent=1
    )


def read_json(path: Path) -> dict[str, Verdict]:
    """What `to_json` wrote."""
    return {name: _verdict(found) for name, found in json.loads(path.read_text())["classes"].items()}


def write(path: Path, verdicts: dict[str, Verdict]) -> None:
    """Write the table to `path`, and beside it what `read_json` reads."""
    path.write_text(to_markdown(verdicts))
    path.with_suffix(".json").write_text(to_json(verdicts) + "\n")


def read_known(path: Path) -> dict[str, Verdict]:
    """What stands beside a table, if this release of transformers made it and the check came to its end."""
    beside = path.with_suffix(".json")
    if not beside.exists() or json.loads(beside.read_text())["transformers"] != transformers.__version__:
        return {}
    return {name: verdict for name, verdict in read_json(beside).items() if verdict.status != "failed"}


def _verdict(found: dict[str, Any]) -> Verdict:
    drop_in = found.get("drop_in")
    found = {**found, "not_reached": tuple(found.get("not_reached", ()))}
    return Verdict(**{**found, "drop_in": Finding(**drop_in) if drop_in else None})
