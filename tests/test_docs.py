"""The pages: links lead somewhere, files that are named exist, and each measurement is one that a page quotes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for folder in (ROOT, ROOT / "docs", ROOT / "docs/measurements", ROOT / "docs/reference", ROOT / "examples")
    for path in folder.glob("*.md")
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
REPOSITORY = re.compile(
    r"https://(?:github|raw\.githubusercontent)\.com/hf-async-batching/hf_async_batching/(?:(?:blob|tree)/)?main/"
)
MEASUREMENTS = ROOT / "docs" / "measurements"


def prose(path: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The names that GitHub and the site both give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path) -> Iterator[str]:
    for link in LINK.findall(prose(path)):
        ours = REPOSITORY.match(link)
        if ours is None and re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link[ours.end() if ours else 0 :].partition("#")
        target = ((ROOT if ours else path.parent) / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(dead_links(page))


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n[a](other.md) [b](#a-page) [c](#no-such) [d](https://a.com) [e](page.md#a-page)\n")
    assert list(dead_links(page)) == ["other.md", "#no-such"]
    address = "https://github.com/hf-async-batching/hf_async_batching/blob/main"
    page.write_text(f"[a]({address}/README.md) [b]({address}/NONE.md)\n")
    assert list(dead_links(page)) == [f"{address}/NONE.md"]


def test_the_readme_has_addresses_for_paths() -> None:
    """PyPI shows the README, and has no files beside it."""
    assert all(link.startswith(("https:", "#")) for link in LINK.findall(prose(ROOT / "README.md")))


def test_each_measurement_is_one_that_a_page_quotes() -> None:
    """Raw results without a line in the folder's table belong to no figure: they go, or get their line."""
    listed = set(re.findall(r"`([\w.-]+\.(?:json|svg))`", prose(MEASUREMENTS / "README.md")))
    assert listed == {path.name for path in MEASUREMENTS.iterdir()} - {"README.md"}


def test_the_map_names_what_exists() -> None:
    """Every file of "Where is it decided?" exists, and defines the names that stand behind it."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = text.partition("## Where is it decided?")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 8
    for row in rows:
        path = None
        for word in re.findall(r"`([^`]+)`", row.split("|", 2)[2]):
            if "/" in word:
                path = ROOT / "hf_async_batching" / word
                assert path.exists(), word
            else:
                assert path is not None, row
                assert re.search(rf"^\s*(def|class) {word}\b|^{word}\b.* = ", path.read_text(), flags=re.MULTILINE), (
                    row
                )
