"""The table on the screen, and the JSON with all results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_async_batching.bench.accuracy import Accuracy
from hf_async_batching.bench.machine import Machine
from hf_async_batching.bench.measure import BenchRun, Measured
from hf_async_batching.bench.peer_run import PeerRun
from hf_async_batching.bench.workloads import Workload
from hf_async_batching.core.timeline import StepRecord
from hf_async_batching.core.timeline_picture import SAVED_STEPS, Panel, steady_window

# Stands in the table for a figure that was not measured.
_NONE = "-"

_COLUMNS = (
    "system",
    "seconds",
    "output tok/s",
    "total tok/s",
    "ms/step: all",
    "decode (median)",
    "busy %",
    "host ms/step: all",
    "decode",
    "MBU %: decode",
    "run",
    "first token s: mean (p95)",
    "warm-up s",
    "tokens",
)


def header() -> str:
    """Return the first two lines of the table."""
    return f"{_line(_COLUMNS)}\n{_line(('---',) * len(_COLUMNS))}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def run_row(measured: Measured, equal: float) -> str:
    """Return the line of one of our runs; `equal` is the share of completions equal to those of the first run."""
    run, pace = measured.run, measured.run.pace
    first = run.first_token_seconds
    cells = (
        ", ".join([f"hf_async_batching, depth {run.depth}", *_variant(run)]),
        f"{run.seconds:.2f}",
        f"{run.output_tokens_per_second:,.0f}",
        f"{run.total_tokens_per_second:,.0f}",
        f"{pace.ms_per_step:.2f}",
        f"{pace.decode_ms_per_step:.2f} ({pace.median_decode_ms_per_step:.2f})",
        f"{pace.busy_percent:.1f}",
        f"{pace.host_ms_per_step:.3f}",
        f"{pace.decode_host_ms_per_step:.3f}",
        f"{pace.mbu_decode_percent:.1f}",
        f"{pace.mbu_run_percent:.1f}",
        f"{first.mean:.3f} ({first.p95:.3f})" if first else _NONE,
        f"{run.start_seconds:.1f} + {run.warmup_seconds:.1f}",
        f"{100 * equal:.0f} % equal to the first row",
    )
    return _line(cells)


def _variant(run: BenchRun) -> list[str]:
    """List the settings of a run that differ from the usual ones."""
    off = [f"no {name.replace('_', ' ')}" for name in run.switched_off]
    if run.settings["admission"] == "longest_first":
        off.append("longest first")
    return [*off, *(["engine alone"] if run.driver == "engine" else [])]


def peer_row(peer: PeerRun) -> str:
    """Return the line of a peer's run; if the run failed, the line says why."""
    name = _cell(f"{peer.name}, {peer.attention}" if peer.attention else peer.name)
    blank = (_NONE,) * (len(_COLUMNS) - 2)
    if peer.error is not None or peer.seconds is None:
        return _line((name, *blank, _cell(f"failed: {peer.error}")))
    first = peer.first_token_seconds
    equal = (
        [] if peer.equal_to_first_run is None else [f"{100 * peer.equal_to_first_run:.0f} % equal to the first row"]
    )
    remarks = [*equal, *[f"{key}={value}" for key, value in peer.settings.items()], *peer.notes]
    cells = (
        name,
        f"{peer.seconds:.2f}",
        f"{peer.output_tokens_per_second:,.0f}",
        f"{peer.total_tokens_per_second:,.0f}",
        *(_NONE,) * 7,
        f"{first.mean:.3f} ({first.p95:.3f})" if first else _NONE,
        _NONE,
        _cell("; ".join(remarks)) or _NONE,
    )
    return _line(cells)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def document(
    *,
    workload: Workload,
    model: dict[str, Any],
    machine: Machine,
    measured: Sequence[Measured],
    peers: Sequence[PeerRun],
    equal: Sequence[float],
    accuracy: Accuracy | None,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Collect all results for JSON, with a few steps of each run for the picture."""
    return {
        "command": ["hf-async-batching", *arguments],
        "workload": {
            "name": workload.name,
            "requests": workload.num_requests,
            "rows": len(workload.first),
            "prompt_tokens": workload.prompt_tokens,
            "new_tokens": workload.new_tokens,
            "longest": workload.longest,
            "prompt_lengths": _range([prompt for prompt, _ in workload.lengths()]),
            "new_lengths": _range([new for _, new in workload.lengths()]),
        },
        "model": model,
        "machine": machine.as_dict(),
        "runs": [
            {
                **one.run.as_dict(),
                "equal_to_first_run": share,
                "steps": save_steps(steady_window(one.records, SAVED_STEPS)),
            }
            for one, share in zip(measured, equal, strict=True)
        ],
        "peers": [peer.as_dict() for peer in peers],
        "accuracy": accuracy.as_dict() if accuracy else None,
    }


def _range(lengths: Sequence[int]) -> dict[str, float]:
    return {"least": min(lengths), "mean": sum(lengths) / len(lengths), "most": max(lengths)}


def write(path: Path, contents: dict[str, Any]) -> None:
    """Write a JSON file; its folder is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=1, default=str) + "\n", encoding="utf-8")


def save_steps(records: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """Turn steps into plain values; times are seconds since the first step's planning, rounded to 0.1 microseconds."""
    origin = records[0].plan[0] if records else 0.0

    def plain(value: Any) -> Any:
        return [round(at - origin, 7) for at in value] if isinstance(value, tuple) else value

    return [{name: plain(value) for name, value in record._asdict().items()} for record in records]


def load_steps(saved: Sequence[dict[str, Any]]) -> tuple[StepRecord, ...]:
    """Read the steps that `save_steps` has turned into plain values."""
    plain: Any = StepRecord
    return tuple(
        plain(**{name: tuple(value) if isinstance(value, list) else value for name, value in step.items()})
        for step in saved
    )


def panels(contents: dict[str, Any]) -> list[Panel]:
    """Return the panels of a document's picture.

    Raises:
        ValueError: The document is not one of this command.
    """
    try:
        return [
            Panel(
                f"depth {run['depth']}, {'synchronous' if run['depth'] == 1 else 'asynchronous'}",
                load_steps(run["steps"]),
            )
            for run in contents["runs"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no measurement of `hf-async-batching bench`: {error!r}") from error
