"""The table of classes with pictures: what a check finds, and what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from hf_async_batching.cli.main import main
from hf_async_batching.coverage import media_check
from hf_async_batching.coverage.media_check import MediaVerdict, check_media_class, media_entries, media_page

PAGE = Path(__file__).parents[2] / "docs" / "media-coverage.md"


def rows_of_page() -> dict[str, list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells if len(row) == 4 and row[0] not in ("class", "---")}


EXACT = sorted(name for name, row in rows_of_page().items() if row[0] == "exact")
QUICK = ["Qwen2_5_VLForConditionalGeneration", "VoxtralForConditionalGeneration"]


@pytest.mark.parametrize("name", QUICK)
def test_served_classes_are_exact(name: str) -> None:
    assert check_media_class(name).status == "exact"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_every_class_that_the_page_calls_exact_is(name: str) -> None:
    assert check_media_class(name).status == "exact"


def test_the_page_has_every_class_and_nothing_wrong() -> None:
    rows = rows_of_page()
    if f"transformers {transformers.__version__}:" in PAGE.read_text(encoding="utf-8"):
        assert set(rows) == set(media_entries())
    assert "wrong" not in {row[0] for row in rows.values()}
    images = set(media_check.image_entries())
    assert len(images & set(EXACT)) >= 20


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Gemma3ForConditionalGeneration", "`pixel_values` is not served for Gemma3.*both directions"),
        ("T5Gemma2ForConditionalGeneration", "an encoder and a decoder"),
        ("PaliGemmaForConditionalGeneration", "`pixel_values` is not served for PaliGemma"),
    ],
)
def test_refusals_say_why(name: str, reason: str) -> None:
    verdict = check_media_class(name)
    assert verdict.status == "refused"
    assert re.search(reason, verdict.note)


def test_other_outputs_are_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions behind pictures that are not shifted."""
    from hf_async_batching.runner.row_tables import RowTables

    plain: Any = RowTables._rope_positions
    monkeypatch.setattr(RowTables, "_rope_positions", lambda self, rows, ids: plain(self, rows * 0, ids))
    assert check_media_class("Qwen2VLForConditionalGeneration").status == "wrong"


def test_a_class_that_cannot_be_built_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> Any:
        raise ImportError("it needs timm | more")

    monkeypatch.setattr(media_check, "tiny_media_model", fail)
    verdict = check_media_class("GemmaForNobody")
    assert verdict == MediaVerdict("not built", note="ImportError: it needs timm | more")
    page = media_page({"GemmaForNobody": verdict, "Other": MediaVerdict("exact", "packed")})
    assert "| GemmaForNobody | not built |  | ImportError: it needs timm \\| more |" in page
    assert "1 not built, 1 exact" in page


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {"Right": MediaVerdict("exact", "packed"), "Wrong": MediaVerdict("wrong", "packed")}
    monkeypatch.setattr(media_check, "check_media_class", verdicts.__getitem__)
    page = tmp_path / "page.md"
    assert main(["coverage", "--media", "--out", str(page), "Right"]) == 0
    assert page.read_text(encoding="utf-8") == media_page({"Right": verdicts["Right"]})
    assert main(["coverage", "--media", "Right", "Wrong"]) == 1
    assert main(["coverage", "--media", "--out", str(tmp_path), "Right"]) == 2
