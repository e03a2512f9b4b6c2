"""What a caller may have meant by a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(names: Iterable[str], known: Iterable[str]) -> str:
    """The end of a message about unknown names: "; did you mean `max_rows`?", or nothing where no name is close.

    Args:
        names: The unknown names.
        known: The names that exist.
    """
    known = list(known)
    close = [match for name in names for match in get_close_matches(name, known, n=1)]
    return f"; did you mean {' and '.join(f'`{name}`' for name in dict.fromkeys(close))}?" if close else ""
