"""A real text dataset that is on every machine: the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

from datasets import Dataset


def docstrings(rows: int, longest: int = 400) -> Dataset:
    """The beginnings of `rows` docstrings and where they stand, sorted by place: equal for one Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts, places = [], []
    for path in sorted(library.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node)
                if text and len(text) > 60 and text not in texts:
                    texts.append(text[: 60 + 37 * len(texts) % (longest - 60)])
                    places.append(f"{path.stem}.{getattr(node, 'name', '')}")
        if len(texts) >= rows:
            break
    return Dataset.from_dict({"text": texts[:rows], "place": places[:rows]})
