"""Reads the names of the package's Triton functions from its sources, so that triton need not be installed."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

GENERATED = "triton_"
"""Prefix of the names of the kernels that Inductor generates from the model's layers."""


def package_kernels(folder: Path | None = None) -> frozenset[str]:
    """Return the names of all functions under `triton.jit`, with those that kernels call.

    Args:
        folder: Folder of the sources; None for the package's own.
    """
    if folder is None:
        # The package is not imported: that would import torch into a process that only starts others.
        spec = find_spec("hf_async_batching")
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
    names: set[str] = set()
    for file in folder.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        if "triton.jit" in source:
            names |= {
                node.name
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list))
            }
    return frozenset(names)


def is_ours(function: str, names: frozenset[str]) -> bool:
    """Whether a function in a log is one of the package, or a kernel that Inductor made for it.

    Args:
        function: Name in the log: a plain name for Triton, with arguments and namespaces for C++.
        names: The package's own functions.
    """
    # Triton appends the types of the arguments to the names of functions that are not inlined.
    return function in names or function.partition("__")[0] in names or function.startswith(GENERATED)


def _is_jit(decorator: ast.expr) -> bool:
    if isinstance(decorator, ast.Call):
        decorator = decorator.func
    return ast.unparse(decorator) == "triton.jit"
