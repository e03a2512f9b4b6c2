"""The table of arguments: complete for the installed transformers, and the page is what the command writes."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path

import pytest
from transformers import GenerationConfig, GenerationMixin

from hf_async_batching.cli.main import main
from hf_async_batching.inputs import compatibility
from hf_async_batching.inputs.compatibility import ARGUMENTS, ENTRIES, FIELDS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
INSTALLED = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))
PARAMETERS = sorted(set(inspect.signature(GenerationMixin.generate).parameters) - {"self"})


@pytest.mark.parametrize("name", INSTALLED)
def test_every_field_of_the_installed_transformers_is_decided(name: str) -> None:
    assert name in FIELDS, f"`{name}` needs a line in compatibility.ENTRIES"


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_argument_of_the_installed_generate_is_decided(name: str) -> None:
    assert name in ARGUMENTS, f"`{name}` needs a line in compatibility.ENTRIES"


def test_no_name_has_two_lines() -> None:
    counts = Counter((entry.kind, entry.name) for entry in ENTRIES)
    assert max(counts.values()) == 1


def test_lines_say_something() -> None:
    for entry in ENTRIES:
        if entry.status == "no effect":
            assert entry.note, f"{entry.name}: why has it no effect?"
        if entry.status == "refused":
            assert entry.remedy, f"{entry.name}: what is to be done instead?"
        assert "|" not in entry.note + entry.remedy


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    assert main(["compatibility", "--write", str(tmp_path / "page.md")]) == 0
    written = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert written == PAGE.read_text(encoding="utf-8"), (
        "run: hf-async-batching compatibility --write docs/compatibility.md"
    )


def test_the_page_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compatibility"]) == 0
    printed = capsys.readouterr().out
    assert printed == compatibility.page()
    for entry in ENTRIES:
        assert f"| `{entry.name}` | {entry.status} |" in printed
