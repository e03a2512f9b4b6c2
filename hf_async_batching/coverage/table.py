"""The table of served models: a column for each device and dtype that was checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from hf_async_batching.coverage.results import KINDS, CoverageRun, kind_label, read_json, replace_text, to_json
from hf_async_batching.coverage.verdicts import SERVED, Status, Verdict

_NOT_RUN = "\N{EN DASH}"
_INTRODUCTION = f"""\
# Which models are served

Made by `hf-async-batching coverage`: every class that `AutoModelForCausalLM` makes, and all others named
`*ForCausalLM`, with tiny random weights. Behind a plus sign is what real checkpoints of some classes have beside their
config's defaults. The tiny models have what real ones have (windows, chunks, sparse and recurrent layers, several
groups of states, shared experts, scaled rotary frequencies, ...), so small that the prompts go beyond each length.
Their weights have the dtypes in which `from_pretrained` loads them.

*submit*: ragged prompts, one of them late and one behind a shared prefix, computed in pieces beside rows that decode.
*generate*: the same prompts as one batch, padded on the left, through
`model.generate(custom_generate=hf_async_batching.generate)`. A cell with one result is of both; with two, the first is
of *submit*, and so with numbers. A route in brackets differs from that in "served as".

| a cell says | which means |
| --- | --- |
| exact | every token is that of plain `model.generate` for the prompt alone, every log-probability within tolerance |
| within rounding | some tokens differ; plain `generate` finds each (with a remark: all but few) as likely as its own |
| wrong | other tokens or log-probabilities |
| refused | not served, by an error that says why |
| no reference | plain `generate` fails, or says the same token over and over |
| not built | no tiny model could be made |
| failed | an error that is no refusal |
| crashed | the process ended, or its GPU took no more work |
| timed out | the process was ended at its limit |
| {_NOT_RUN} | not run, or not in that release of transformers |

Log-probabilities may differ by 0.002 in float32, without TF32. The chunked kernels of
flash-linear-attention use TF32, so the reference in float32 computes with transformers' own torch code where that
package is installed. In 16 bits log-probabilities may differ by four times the difference between plain `generate` in
16 bits and plain `generate` in float32 with the same weights, and by 0.06 at least. A router's choice of experts can
hang on one bit, and a token behind it differs by more. So where at most one token in twenty is beyond the tolerance,
the same weights are served in float32, too: where that is exact, the cell says "within rounding", and the remark how
many tokens are beyond; else it says "wrong".
*plain, padded* says what plain `generate` itself makes of the padded batch: the same tokens, others (padding changes
what the family computes), or it fails. `hf-async-batching check MODEL` does the same with a model of yours.
"""
_ROUTES = """\
| served as | which means |
| --- | --- |
| packed | all tokens of a step in one sequence, attention over pages by our kernels: the fast way |
| padded | through the family's own cache class: rows that decode share a batch, padded on the left as by `generate` |
| lockstep | the same, for families that know no padding: rows of equal length share a batch |
| single | a cache object per row, one row at a time: as fast as `generate`, and no faster |
| row states | beside pages, or in place of them, each row has recurrent states; prefixes are shared where packed |
| whole prompts | prompts are not computed in pieces |
"""

Verdicts = dict[str, Verdict]
_STATUSES: tuple[str, ...] = get_args(Status)


def counts(verdicts: Verdicts) -> Counter[str]:
    """Number of entries with each status through `submit`."""
    return Counter(verdict.status for verdict in verdicts.values())


def drop_in_counts(verdicts: Verdicts) -> Counter[str]:
    """Number of entries with each status through `generate(custom_generate=...)`."""
    return Counter(verdict.generate.status for verdict in verdicts.values())


def by_route(verdicts: Verdicts) -> dict[str, Counter[str]]:
    """Number of entries of each route with each status; if the entry points differ, the worse status counts."""
    found: dict[str, Counter[str]] = {}
    for verdict in verdicts.values():
        worse = max(verdict.status, verdict.generate.status, key=_STATUSES.index)
        found.setdefault(verdict.route, Counter())[worse] += 1
    return found


def routes(verdicts: Verdicts) -> Counter[str]:
    """Number of entries with each route, among those served through both entry points."""
    return Counter(verdict.route for verdict in verdicts.values() if verdict.served)


def summary(verdicts: Verdicts) -> list[str]:
    """Summary in readable lines."""
    named = {"submit": counts(verdicts), "generate": drop_in_counts(verdicts), "served as": routes(verdicts)}
    return [f"{name}: " + _listed(counted) for name, counted in named.items() if counted]


def to_markdown(runs: Iterable[CoverageRun]) -> str:
    """The table in Markdown; equal runs give an equal table."""
    runs = list(runs)
    columns = _columns(runs)
    lines = [_INTRODUCTION, *_counted(runs), "", _ROUTES]
    heads = [run.label if run is not None else label for label, run in columns]
    lines += [_row(["class", "served as", *heads, "plain, padded", "remark"]), _row(["---"] * (len(heads) + 4))]
    for name in sorted({name for run in runs for name in run.classes}):
        found = [(run, run.classes.get(name) if run is not None else None) for _, run in columns]
        there = [(run, verdict) for run, verdict in found if run is not None and verdict is not None]
        route = next((verdict.route for _, verdict in there if verdict.route), "")
        padded = next((verdict.plain_padded for _, verdict in there if verdict.plain_padded), "")
        cells = [_cell(verdict, route) for _, verdict in found]
        lines.append(_row([name, route, *cells, padded, _remarks(there)]))
    return "\n".join(lines) + "\n"


def write(path: Path, runs: Iterable[CoverageRun]) -> None:
    """Write the table to `path`, and the data that `read` reads next to it."""
    runs = list(runs)
    replace_text(path.with_suffix(".json"), to_json(runs))
    replace_text(path, to_markdown(runs))


def read(path: Path) -> list[CoverageRun]:
    """Read the runs of the table at `path`; an empty list if there is no such table."""
    return read_json(path.with_suffix(".json"))


def _columns(runs: list[CoverageRun]) -> list[tuple[str, CoverageRun | None]]:
    """All runs, in order, and empty columns for kinds without a run."""
    columns: list[tuple[str, CoverageRun | None]] = []
    for kind in KINDS:
        of_kind = [run for run in runs if (run.device, run.dtype) == kind]
        columns += [(run.label, run) for run in of_kind] or [(kind_label(*kind), None)]
    return columns + [(run.label, run) for run in runs if (run.device, run.dtype) not in KINDS]


def _counted(runs: list[CoverageRun]) -> list[str]:
    """Counts of each status and route, with a column for each run."""
    columns = _columns(runs)
    classes = [_of(run, variants=False) for _, run in columns]
    variants = [_of(run, variants=True) for _, run in columns]
    left = [str(_left(run, runs)) if run else _NOT_RUN for _, run in columns]

    def made_on(run: CoverageRun | None) -> str:
        return ", ".join(filter(None, (f"torch {run.torch}" if run.torch else "", run.card))) if run else _NOT_RUN

    return [
        _row(["", *(run.label if run is not None else label for label, run in columns)]),
        _row(["---"] * (len(columns) + 1)),
        _row(["made on", *(made_on(run) for _, run in columns)]),
        *([_row(["not run yet, of that release", *left])] if set(left) - {"0", _NOT_RUN} else []),
        *_numbers("classes", "", classes),
        _row(["tokens that are plain `generate`'s choice", *(_share(found) for found in classes)]),
        *_numbers("variants", "variants, ", variants),
    ]


def _numbers(label: str, prefix: str, of: list[Verdicts]) -> list[str]:
    """The number of entries: in all, of each status, and of each status by route."""
    ways = [(counts(found), drop_in_counts(found)) for found in of]
    by = [by_route(found) for found in of]
    total: Counter[str] = sum((routes(found) for found in of), Counter())
    named = sorted({route for each in by for route in each}, key=lambda route: (not route, -total[route], route))

    def number(submit: int, generate: int) -> str:
        return str(submit) if submit == generate else f"{submit} / {generate}"

    def row(name: str, cells: Iterable[str]) -> str:
        return _row([name, *(cell if found else _NOT_RUN for cell, found in zip(cells, of, strict=True))])

    return [
        row(f"**{label}**", (f"**{len(found)}**" for found in of)),
        row(f"{prefix}served both ways", map(_served, of)),
        *(
            row(f"{prefix}{status}", (number(submit[status], generate[status]) for submit, generate in ways))
            for status in _STATUSES
            if any(submit[status] or generate[status] for submit, generate in ways)
        ),
        *(
            row(
                prefix + (f"served as {route}" if route else "not served"),
                (_by_status(each.get(route, Counter())) for each in by),
            )
            for route in named
        ),
    ]


def _by_status(counted: Counter[str]) -> str:
    return ", ".join(f"{counted[status]} {status}" for status in _STATUSES if counted[status]) or "0"


def _of(run: CoverageRun | None, variants: bool) -> Verdicts:
    return {name: found for name, found in run.classes.items() if ("+" in name) == variants} if run else {}


def _left(run: CoverageRun, runs: list[CoverageRun]) -> int:
    """Number of entries that this run lacks and another run with the same release has."""
    names = {name for each in runs if each.transformers == run.transformers for name in each.classes}
    return len(names - set(run.classes))


def _served(verdicts: Verdicts) -> str:
    return str(sum(verdict.served for verdict in verdicts.values()))


def _share(verdicts: Verdicts) -> str:
    """Share of the compared tokens that are the plain model's choice after the same tokens."""
    found = [each for verdict in verdicts.values() for each in (verdict, verdict.generate) if each.tokens]
    tokens = sum(each.tokens for each in found)
    return f"{100 * (1 - sum(each.other_tokens for each in found) / tokens):.2f} %" if tokens else _NOT_RUN


def _cell(verdict: Verdict | None, route: str) -> str:
    if verdict is None:
        return _NOT_RUN
    text = str(verdict.status)
    if verdict.generate.status != verdict.status:
        text += f" / {verdict.generate.status}"
    return f"{text} ({verdict.route})" if verdict.route and verdict.route != route else text


def _remarks(found: list[tuple[CoverageRun, Verdict]]) -> str:
    """The remark on each run; runs with equal remarks share one."""
    by_text: dict[str, list[CoverageRun]] = {}
    for run, verdict in found:
        by_text.setdefault(_remark(verdict), []).append(run)
    there = [run for run, _ in found]
    parts = [
        text if len(runs) == len(found) else f"{' and '.join(_labels(runs, there))}: {text}"
        for text, runs in by_text.items()
        if text
    ]
    return "; ".join(parts).replace("|", "\\|")


def _labels(runs: list[CoverageRun], there: list[CoverageRun]) -> dict[str, None]:
    """Labels that identify these runs among all runs with the entry: device and dtype, the release, or both."""
    others = [run for run in there if run not in runs]
    kinds = {run.key: kind_label(run.device, run.dtype) for run in there}
    releases = {run.key: f"transformers {run.transformers}" for run in there}
    for names in (kinds, releases):
        if not {names[run.key] for run in runs} & {names[run.key] for run in others}:
            return dict.fromkeys(names[run.key] for run in runs)
    return dict.fromkeys(run.label for run in runs)


def _remark(verdict: Verdict) -> str:
    # The JSON has the differences that rounding caused.
    parts = [verdict.reason if verdict.status not in SERVED or verdict.beyond else ""]
    found = verdict.generate
    if found.reason and found.reason != verdict.reason and (found.status not in SERVED or found.beyond):
        parts.append(f"generate: {found.reason}")
    if verdict.not_reached:
        parts.append(f"not beyond {', '.join(verdict.not_reached)}")
    return "; ".join(filter(None, parts))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _listed(counted: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counted.most_common())
