"""Reads the log of compute-sanitizer into reports that can be counted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

_PREFIX = re.compile(r"^=========(?P<indent>\s*)(?P<text>.*?)\s*$")
_SEVERITY = re.compile(r"^(?P<word>error|warning|warn|info):\s*", re.IGNORECASE)
_SUMMARY = re.compile(r"^(?P<tool>ERROR|RACECHECK|LEAK) SUMMARY:\s*(?P<count>[\d,]+)")
_HAZARDS = re.compile(r"\s*\[(?P<count>[\d,]+) hazards?\]\s*$")
_NOT_PRINTED = re.compile(r"(?P<count>[\d,]+) errors? (?:was|were) not printed")
_OF_THE_TOOL = re.compile(
    r"^(?:Internal Sanitizer|Could not|Failed to|Target application|No attachable|process didn't)"
)
_DETAIL = re.compile(
    r"^(?:at |and |by |in |\(?is |Address|Access|(?:Device|Host) Frame|Saved host|(?:Read|Write) Thread|Current Value|"
    r"Uninitialized access|The application|Tracking|\[)"
)
_RACE = re.compile(r"^Race reported between (?P<access>\w+) access at\s*(?P<place>.*)$")
_NAME_FIRST = re.compile(r"^(?P<name>.+?)\+0x[0-9a-f]+(?: in (?P<place>.+))?$")
_OFFSET_FIRST = re.compile(r"^0x[0-9a-f]+ in (?:(?P<place>\S+:\d+):)?(?P<name>.+)$")
_NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\(\d+,\s*\d+,\s*\d+\)")


class Frame(NamedTuple):
    """A place in device code: the function, and the file and line if the log has them."""

    function: str
    place: str


@dataclass(frozen=True, slots=True)
class Report:
    """One error.

    Attributes:
        kind: The headline, without addresses.
        severity: "error" or "warning".
        frames: Places in the code, the innermost first; empty outside of kernels.
        hazards: Number of hazards that a race stands for; 1 for other errors.
    """

    kind: str
    severity: str
    frames: tuple[Frame, ...]
    hazards: int = 1

    @property
    def kernel(self) -> str:
        """The launched function; empty without one."""
        return self.frames[-1].function if self.frames else ""

    @property
    def place(self) -> str:
        """File and line of the access; empty if unknown."""
        return next((frame.place for frame in self.frames if frame.place), "")


@dataclass(frozen=True, slots=True)
class SanitizerLog:
    """The contents of a log.

    Attributes:
        reports: Errors and warnings, in their order.
        summary: Number of errors that the tool has found, printed or not; None if the log ends without it.
        not_printed: Number of errors that the tool did not print.
        troubles: The tool's messages about itself: kernels that it did not watch, a process that did not end well.
    """

    reports: tuple[Report, ...]
    summary: int | None
    not_printed: int
    troubles: tuple[str, ...]


def read_log(text: str) -> SanitizerLog:
    """Parse the contents of `--log-file`, from any tool."""
    reports: list[Report] = []
    troubles: list[str] = []
    summary: int | None = None
    not_printed = 0
    for headline, details in _records(text.splitlines()):
        total = _SUMMARY.match(headline)
        if left_out := _NOT_PRINTED.search(headline):
            not_printed += _number(left_out["count"])
        elif total is not None:
            summary = (summary or 0) + (_number(total["count"]) if total["tool"] != "LEAK" else 0)
        elif headline != "COMPUTE-SANITIZER":
            severity = _SEVERITY.match(headline)
            said = headline[severity.end() :] if severity else headline
            if _OF_THE_TOOL.match(said):
                troubles.append(said)
            else:
                word = severity["word"].lower() if severity else "error"
                if word != "info":
                    reports.append(_report(said, "error" if word == "error" else "warning", details))
    return SanitizerLog(tuple(reports), summary, not_printed, tuple(troubles))


def _records(lines: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Return the headlines with their lines, without the program's own output."""
    records: list[tuple[str, list[str]]] = []
    for line in lines:
        match = _PREFIX.match(line)
        if match is None or not match["text"]:
            continue
        belongs = len(match["indent"]) > 1 or _DETAIL.match(match["text"]) is not None
        if belongs and records:
            records[-1][1].append(match["text"])
        else:
            records.append((match["text"], []))
    return records


def _report(headline: str, severity: str, details: list[str]) -> Report:
    race = _RACE.match(headline)
    if race is not None:
        return _race(race, severity, details)
    frames: list[Frame] = []
    for line in details:
        if line.startswith("Device Frame:"):
            frames.append(_frame(line.removeprefix("Device Frame:").strip()))
        elif line.startswith("at ") and not frames:
            frames.append(_frame(line.removeprefix("at ")))
        elif match := re.match(r"^(?:Read|Write) Thread \([^)]*\) at (?P<place>.*)$", line):
            frames.append(_frame(match["place"]))
        elif line.startswith("Uninitialized access") and " by " in line:
            headline = f"Uninitialized source of {line.rpartition(' by ')[2].removesuffix(' source')}"
    kind = _NUMBERS.sub("", headline.partition(" at host access")[0])
    return Report(" ".join(kind.replace(" in block", "").rstrip(" :").split()), severity, tuple(frames))


def _race(match: re.Match[str], severity: str, details: list[str]) -> Report:
    """Make the report of a race. A race has one place for each access; the others race against the first."""
    hazards, seen, accesses = 0, [match["place"]], [match["access"]]
    for line in details:
        other = re.match(r"^and (?P<access>\w+) access at\s*(?P<place>.*)$", line)
        if other is not None:
            accesses.append(other["access"])
            line = other["place"]
        if found := _HAZARDS.search(line):
            hazards += _number(found["count"])
            line = line[: found.start()]
        seen.append(line)
    frames = tuple(_frame(place) for place in seen if place)
    kind = f"Race between {accesses[0]} and {' and '.join(sorted(set(accesses[1:]))) or 'another'} access"
    return Report(kind, severity, frames, max(1, hazards))


def _frame(text: str) -> Frame:
    """Read function and place from `NAME+0xOFFSET in FILE:LINE`, `0xOFFSET in NAME` or `NAME [0xOFFSET]`."""
    text = _HAZARDS.sub("", text).strip()
    if match := _NAME_FIRST.match(text) or _OFFSET_FIRST.match(text):
        return Frame(match["name"].strip(), match["place"] or "")
    name = re.sub(r"\s*[\[(][^\[(]*0x[0-9a-f]+[\])]$", "", text)
    place, _, function = name.rpartition(" in ")
    return Frame(place or function, function if place else "")


def _number(text: str) -> int:
    return int(text.replace(",", ""))
