"""What the bar of a run shows."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from hf_async_batching import Stats
from hf_async_batching.dataset.run import progress as module
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


class Manager:
    def stats(self) -> Stats:
        return Stats(running=3, waiting=4, tokens_per_second=1234.5)


def shown(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Progress:
    """A run of 10 rows whose clock is this test's."""
    monkeypatch.setattr(module.time, "perf_counter", lambda: NOW[0])
    NOW[0] = 100.0
    return Progress(Manager(), 10, **settings)  # type: ignore[arg-type]


NOW = [0.0]


def test_a_line_is_logged_each_30_seconds_where_there_is_no_terminal(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(module.sys, "stderr", io.StringIO())
    progress = shown(monkeypatch)
    with caplog.at_level(logging.INFO):
        for second in range(0, 80, 10):
            NOW[0] = 100.0 + second
            progress.finished(7, failed=second == 10)
            progress.show()
    assert progress._bar is None
    assert [record.getMessage() for record in caplog.records] == [
        "4 of 10 rows, 1,234 tok/s, 3 running, 4 waiting, 1 failed, 0:00:45 left",
        "7 of 10 rows, 1,234 tok/s, 3 running, 4 waiting, 1 failed, 0:00:26 left",
    ]


@pytest.mark.parametrize("bar", [True, False])
def test_nothing_is_logged_where_a_bar_was_decided_on(monkeypatch: Any, caplog: Any, bar: bool) -> None:
    progress = shown(monkeypatch, bar=bar)
    with caplog.at_level(logging.INFO):
        NOW[0] = 200.0
        progress.show()
        progress.close()
    assert not caplog.records


@pytest.mark.parametrize(("shell", "draws"), [("ZMQInteractiveShell", True), ("TerminalInteractiveShell", False)])
def test_a_notebook_gets_a_bar(monkeypatch: Any, shell: str, draws: bool) -> None:
    monkeypatch.setattr(module.sys, "stderr", io.StringIO())
    kernel = type(shell, (), {})()
    monkeypatch.setitem(module.sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    progress = shown(monkeypatch)
    assert (progress._bar is not None) is draws
    progress.close()
