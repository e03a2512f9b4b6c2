"""Settings by measurement: the fastest wins, is remembered across processes, and nothing on disk can stop a start."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from hf_async_batching.runtime import autotune as tuning
from hf_async_batching.runtime.autotune import Tuning, cache_folder, source_version

CPU = torch.device("cpu")


class Setting(NamedTuple):
    size: int
    fast: bool = False


SETTINGS = [Setting(1), Setting(2, True), Setting(3)]
DEFAULT = Setting(9)


class Bench:
    """Times launches by a table, and counts."""

    def __init__(self, times: dict[Setting, float]) -> None:
        self.times, self.launched, self.measured = times, [], []  # type: ignore[var-annotated]

    def run(self, setting: Setting) -> Callable[[], None]:
        if setting not in self.times:
            raise RuntimeError("out of shared memory")
        self.measured.append(setting)
        return lambda: self.launched.append(setting)

    def timer(self, launch: Callable[[], None]) -> float:
        launch()
        return self.times[self.launched[-1]]


def make(tmp_path: Path) -> tuple[Tuning, Bench]:
    bench = Bench({DEFAULT: 0.5, Setting(1): 0.4, Setting(2, True): 0.2, Setting(3): 0.3})
    return Tuning(CPU, tmp_path, bench.timer), bench


def test_the_rule_answers_until_something_was_measured(tmp_path: Path) -> None:
    settings, bench = make(tmp_path)
    assert settings.choose("kernel", "a", SETTINGS, DEFAULT) == DEFAULT
    assert settings.tune("kernel", "a", SETTINGS, bench.run, DEFAULT) == Setting(2, True)
    assert set(bench.measured) == {DEFAULT, *SETTINGS}
    assert len(bench.measured) == 4
    chosen = settings.choose("kernel", "a", SETTINGS, DEFAULT)
    assert chosen == Setting(2, True)
    assert isinstance(chosen, Setting)
    for kernel, key in (("kernel", "b"), ("other", "a")):
        assert settings.choose(kernel, key, SETTINGS, DEFAULT) == DEFAULT


def test_another_process_remembers(tmp_path: Path) -> None:
    settings, bench = make(tmp_path / "made" / "here")
    settings.tune("kernel", "a", SETTINGS, bench.run, DEFAULT)
    again, idle = make(tmp_path / "made" / "here")
    assert again.choose("kernel", "a", SETTINGS, DEFAULT) == Setting(2, True)
    assert again.tune("kernel", "a", SETTINGS, idle.run, DEFAULT) == Setting(2, True)
    assert not idle.measured, "it was measured before"
    assert [path.name for path in again.path.parent.iterdir()] == [again.path.name], "no temporary file is left"
    content = json.loads(again.path.read_text())
    assert content["about"] == tuning.describe(CPU)


def test_processes_add_to_what_the_others_found(tmp_path: Path) -> None:
    first, bench = make(tmp_path)
    second, other = make(tmp_path)
    first.tune("kernel", "a", SETTINGS, bench.run, DEFAULT)
    second.tune("kernel", "b", SETTINGS, other.run, DEFAULT)
    third, _ = make(tmp_path)
    assert [third.choose("kernel", key, SETTINGS, DEFAULT) for key in "ab"] == [Setting(2, True)] * 2


def test_what_does_not_run_is_left_out(tmp_path: Path) -> None:
    settings, bench = make(tmp_path)
    del bench.times[Setting(2, True)]
    assert settings.tune("kernel", "a", SETTINGS, bench.run, DEFAULT) == Setting(3)
    bench.times.clear()
    assert settings.tune("kernel", "b", SETTINGS, bench.run, DEFAULT) == DEFAULT
    bench.times[Setting(1)] = 0.1
    assert settings.tune("kernel", "b", SETTINGS, bench.run, DEFAULT) == Setting(1), "a failure is not remembered"


def test_the_default_may_win(tmp_path: Path) -> None:
    settings, bench = make(tmp_path)
    bench.times[DEFAULT] = 0.01
    assert settings.tune("kernel", "a", SETTINGS, bench.run, DEFAULT) == DEFAULT
    assert settings.choose("kernel", "a", SETTINGS, Setting(1)) == Setting(1), "it is no candidate of this caller"


def test_what_is_no_candidate_any_more_is_not_chosen(tmp_path: Path) -> None:
    settings, bench = make(tmp_path)
    settings.tune("kernel", "a", SETTINGS, bench.run, DEFAULT)
    assert settings.choose("kernel", "a", [Setting(1), Setting(2)], DEFAULT) == DEFAULT


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"best": 3}', '{"best": {"kernel: a": 7}}', "\x00\xff"])
def test_a_corrupt_file_is_as_none(tmp_path: Path, content: str) -> None:
    settings, bench = make(tmp_path)
    settings.path.write_text(content, encoding="latin-1")
    settings, bench = make(tmp_path)
    assert settings.choose("kernel", "a", SETTINGS, DEFAULT) == DEFAULT
    settings.tune("kernel", "b", SETTINGS, bench.run, DEFAULT)
    assert make(tmp_path)[0].choose("kernel", "b", SETTINGS, DEFAULT) == Setting(2, True)


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    settings, bench = make(file / "folder")
    assert settings.tune("kernel", "a", SETTINGS, bench.run, DEFAULT) == Setting(2, True)
    assert settings.choose("kernel", "a", SETTINGS, DEFAULT) == Setting(2, True), "the process keeps it"
    assert "cannot be kept" in caplog.text


def test_a_failing_rename_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space")

    settings, bench = make(tmp_path)
    monkeypatch.setattr(Path, "replace", fail)
    settings.tune("kernel", "a", SETTINGS, bench.run, DEFAULT)
    assert not list(tmp_path.iterdir())


def test_threads_may_tune_at_once(tmp_path: Path) -> None:
    settings = Tuning(CPU, tmp_path, lambda launch: 1.0)

    def tune(key: str) -> None:
        for index in range(20):
            settings.tune("kernel", f"{key}{index}", [Setting(1)], lambda setting: lambda: None, DEFAULT)

    threads = [threading.Thread(target=tune, args=(key,)) for key in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(settings.path.read_text())["best"]) == 80


def test_versions_and_cards_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {Tuning(CPU, tmp_path).path}
    monkeypatch.setattr(torch, "__version__", "99.0")
    paths.add(Tuning(CPU, tmp_path).path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        paths.add(Tuning(torch.device("cuda"), tmp_path).path)
    assert len(paths) == 4


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ASYNC_BATCHING_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert Tuning(CPU).path.parent == tmp_path
    monkeypatch.delenv("HF_ASYNC_BATCHING_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/hf_async_batching")


def test_a_changed_source_is_another_version(tmp_path: Path) -> None:
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("one")
    second.write_text("two")
    before = source_version(str(first), str(second))
    assert before == source_version(str(first), str(second))
    second.write_text("three")
    assert before != source_version(str(first), str(second))
