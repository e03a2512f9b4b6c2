"""Store the findings of check runs, by device, dtype and release of transformers, in one JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_async_batching.coverage.verdicts import UNFINISHED, Finding, Verdict

Key = tuple[str, str, str]

KINDS = (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16"))
"""Device and dtype of the columns that every table has, in order."""


@dataclass(frozen=True, slots=True)
class CoverageRun:
    """The findings on one device, in one dtype, with one release of transformers.

    Attributes:
        device: Kind of the device: "cpu" or "cuda".
        dtype: Dtype of the weights.
        transformers: Release of transformers.
        torch: Release of torch in the last run.
        card: Name of the GPU; empty on a CPU.
        classes: Verdicts by entry.
    """

    device: str
    dtype: str
    transformers: str
    torch: str = ""
    card: str = ""
    classes: dict[str, Verdict] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What all findings of one column share."""
        return self.device, self.dtype, self.transformers

    @property
    def label(self) -> str:
        """Header of the column."""
        return f"{kind_label(self.device, self.dtype)}, {self.transformers}"

    @property
    def finished(self) -> dict[str, Verdict]:
        """Entries whose check has finished."""
        return {
            name: verdict
            for name, verdict in self.classes.items()
            if not {verdict.status, verdict.generate.status} & UNFINISHED
        }


def kind_label(device: str, dtype: str) -> str:
    """Readable name of a device and dtype."""
    return f"{'GPU' if device == 'cuda' else device.upper()} {dtype}"


def merged(runs: Iterable[CoverageRun], *others: CoverageRun) -> list[CoverageRun]:
    """Merge runs: entries of `others` replace those of the same device, dtype and release; everything else stays."""
    found = {run.key: run for run in runs}
    for run in others:
        classes = found[run.key].classes if run.key in found else {}
        found[run.key] = replace(run, classes={**classes, **run.classes})
    return sorted(found.values(), key=_order)


def _order(run: CoverageRun) -> tuple[int, str, str, list[int | str]]:
    kind = (run.device, run.dtype)
    release = [int(part) if part.isdigit() else part for part in run.transformers.split(".")[:2]]
    return KINDS.index(kind) if kind in KINDS else len(KINDS), *kind, release


def to_json(runs: Iterable[CoverageRun]) -> str:
    """All findings with their versions: one line per entry, without empty fields."""
    listed = []
    for run in runs:
        about = json.dumps({**_less(asdict(replace(run, classes={}))), "classes": {}}).removesuffix("}}")
        lines = (f"{json.dumps(name)}: {json.dumps(_fields(found))}" for name, found in sorted(run.classes.items()))
        listed.append(about + "\n" + ",\n".join(lines) + "\n}}")
    return '{"runs": [\n' + ",\n".join(listed) + "\n]}\n"


def _fields(verdict: Verdict) -> dict[str, Any]:
    drop_in = verdict.drop_in and {"drop_in": _less(asdict(verdict.drop_in))}
    return _less(asdict(replace(verdict, drop_in=None))) | (drop_in or {})


def _less(fields: dict[str, Any]) -> dict[str, Any]:
    """Remove empty fields; 0.0 stays, because it is a measured difference."""
    return {name: value for name, value in fields.items() if value or type(value) is float}


def read_json(path: Path) -> list[CoverageRun]:
    """Read what `to_json` wrote; an empty list if there is no file."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if "runs" not in found:  # written by a release with a single column
        found = {"runs": [{"device": "cpu", "dtype": "float32", **found}]}
    return [
        CoverageRun(**{**run, "classes": {name: _verdict(of) for name, of in run["classes"].items()}})
        for run in found["runs"]
    ]


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: if the process is ended meanwhile, the old content stays."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(text)
    beside.replace(path)


def _verdict(found: dict[str, Any]) -> Verdict:
    drop_in = found.get("drop_in")
    found = {**found, "not_reached": tuple(found.get("not_reached", ()))}
    return Verdict(**{**found, "drop_in": Finding(**drop_in) if drop_in else None})
