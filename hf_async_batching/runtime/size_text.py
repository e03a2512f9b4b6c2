"""Sizes in memory, as a person reads them."""

from __future__ import annotations


def size_text(size: float) -> str:
    """A number of bytes in the largest unit that it fills: "512 B", "1.5 MiB", "12.0 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
