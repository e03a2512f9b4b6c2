"""What the bar of a run shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hf_async_batching.dataset.run.progress import Progress


def test_rows_of_an_earlier_run_are_shown_and_make_no_speed() -> None:
    manager: Any = SimpleNamespace()
    progress = Progress(manager, 10, bar=True)
    try:
        progress.resumed(4)
        progress.resumed(2)
        assert progress._bar.n == progress._bar.initial == 6
    finally:
        progress._bar.close()
