"""Hooks of mkdocs: pages that stand outside of docs/, and links that lead out of it.

On GitHub a page links to files of the repository, whatever their folder. On the site, README.md is the home page,
CONTRIBUTING.md and CHANGELOG.md are pages, and every other file of the repository is on GitHub.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

# File of the repository -> page of the site.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_CODE = re.compile(r"(```.*?```)", re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that stand outside of docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    place = page.file.src_uri
    source = next((name for name, of in OUTSIDE.items() if of == place), f"docs/{place}")
    parts = _CODE.split(markdown)
    parts[::2] = [
        _LINK.sub(lambda found: _link(found[0], source, place, config["repo_url"], files), part) for part in parts[::2]
    ]
    return "".join(parts)


def _link(link: str, source: str, place: str, repository: str, files: Files) -> str:
    """The link on the site.

    Args:
        link: As it stands in `source`, without an anchor.
        source: The file that holds it, from the root of the repository.
        place: The page that `source` becomes.
        repository: Address of the repository.
        files: What the site has.
    """
    # README.md has addresses in place of paths, so that PyPI shows them, too.
    raw = repository.replace("github.com", "raw.githubusercontent.com")
    of_repository = re.match(rf"(?:{re.escape(repository)}/(?:blob|tree)|{re.escape(raw)})/main/(.+)", link)
    if of_repository is None and re.match(r"[a-z]+:", link):
        return link
    target = of_repository[1] if of_repository else normpath(str(PurePosixPath(source).parent / link))
    inside = OUTSIDE.get(target) or target.removeprefix("docs/")
    if target in OUTSIDE or (target.startswith("docs/") and files.get_file_from_path(inside) is not None):
        return relpath(inside, str(PurePosixPath(place).parent))
    kind = "tree" if (ROOT / target).is_dir() else "blob"
    return f"{repository}/{kind}/main/{target}"
