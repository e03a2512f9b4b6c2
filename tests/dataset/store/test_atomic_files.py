"""File systems that cannot do a thing (exFAT, FUSE, SMB): no hard links, no locks, no fsync."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from datasets import Dataset

from hf_async_batching import ResumeMismatchError, generate_dataset
from hf_async_batching.dataset.store import owner_file
from hf_async_batching.dataset.store.atomic_files import sync_folder, write_if_first, write_whole
from hf_async_batching.dataset.store.journal import Journal, read_journal
from hf_async_batching.dataset.store.owner_file import Owner, owner_path, read_owner, take_owner_file
from hf_async_batching.dataset.store.ranks import RankLock, is_alive

NEW: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "shard_rows": 4}
NOT_SUPPORTED = [errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS, errno.EINVAL]
CALLS: list[tuple[Any, str]] = [(os, "link"), (fcntl, "flock"), (os, "fsync")]


def refuse(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, code: int) -> None:
    call = getattr(module, name)

    def refused(file: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "flock" and isinstance(file, int):  # `datasets` locks its cache, which is elsewhere
            return call(file, *args, **kwargs)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, name, refused)


@pytest.mark.parametrize("code", [*NOT_SUPPORTED, errno.ENOLCK])
def test_a_run_without(
    manager: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    data = Dataset.from_dict({"prompt": [f"text-{i}" for i in range(10)]})
    plain = generate_dataset(manager, data, tokenizer, resume_dir=tmp_path / "plain", **NEW).to_list()
    for module, name in CALLS:
        refuse(monkeypatch, module, name, code)
    for _ in range(2):
        assert generate_dataset(manager, data, tokenizer, resume_dir=tmp_path / "run", **NEW).to_list() == plain
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["num_rows"] == 10
    # Nothing of the locks is left.
    assert not [path for path in (tmp_path / "run" / "work").iterdir() if path.name.endswith((".owner", ".tmp"))]


@pytest.mark.parametrize(("module", "name"), CALLS)
def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    refuse(monkeypatch, module, name, errno.EIO)
    calls = {
        "link": lambda: write_if_first(tmp_path / "a", "x"),
        "flock": lambda: RankLock(tmp_path, 0),
        "fsync": lambda: write_whole(tmp_path / "b", lambda path: path.write_text("x")),
    }
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        calls[name]()
    if name == "fsync":
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            sync_folder(tmp_path)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            Journal(tmp_path / "j")
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("links", [True, False])
def test_the_first_to_write_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        refuse(monkeypatch, os, "link", errno.EOPNOTSUPP)
    write_if_first(tmp_path / "a", "first")
    write_if_first(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF])
def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    refuse(monkeypatch, os, "fsync", code)
    sync_folder(tmp_path)
    with monkeypatch.context() as patched:
        refuse(patched, os, "open", errno.EACCES)
        sync_folder(tmp_path)


def test_a_journal_without_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, os, "fsync", errno.EINVAL)
    journal = Journal(tmp_path / "j")
    journal.append([1, 2])
    journal.close()
    assert list(read_journal(tmp_path / "j")) == [1, 2]


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, fcntl, "flock", errno.ENOLCK)


def named(folder: Path, **changes: Any) -> Path:
    me = {"host": socket.gethostname(), "process": os.getpid(), "started": psutil.Process().create_time()}
    path = owner_path(folder / "rank-0.lock")
    path.write_text(json.dumps({**me, "path": path.name, **changes}))
    return path


@pytest.mark.usefixtures("no_locks")
def test_a_process_that_lives_keeps_its_lock(tmp_path: Path) -> None:
    lock = RankLock(tmp_path, 0)
    owner = read_owner(tmp_path / "rank-0.lock")
    assert owner is not None
    assert str(owner) == f"process {os.getpid()} on {socket.gethostname()}"
    assert is_alive(tmp_path, 0)
    assert not is_alive(tmp_path, 1)
    with pytest.raises(ResumeMismatchError, match=rf"another process .process {os.getpid()} .*delete .*rank-0.owner"):
        RankLock(tmp_path, 0)
    lock.release()
    lock.release()
    assert not is_alive(tmp_path, 0)
    RankLock(tmp_path, 0).release()
    assert list(tmp_path.glob("*.owner")) == []


@pytest.mark.usefixtures("no_locks")
def test_a_process_that_has_ended_does_not(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    named(tmp_path, process=ended.pid)
    assert not is_alive(tmp_path, 0)
    # Another process has its number now: in a container it is the same after each start.
    named(tmp_path, started=psutil.Process().create_time() - 60)
    RankLock(tmp_path, 0).release()


@pytest.mark.usefixtures("no_locks")
def test_a_process_on_another_machine_lives_while_it_touches_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = named(tmp_path, host="elsewhere", process=1)
    assert is_alive(tmp_path, 0)
    with pytest.raises(ResumeMismatchError, match="process 1 on elsewhere"):
        RankLock(tmp_path, 0)
    os.utime(path, (1, 1))
    assert not is_alive(tmp_path, 0)
    lock = RankLock(tmp_path, 0)
    owner = owner_path(tmp_path / "rank-0.lock")
    os.utime(owner, (1, 1))
    lock.touch()
    assert owner.stat().st_mtime > 1
    monkeypatch.setattr(owner_file, "TOUCHED_SECONDS", 0.0)
    assert is_alive(tmp_path, 0)  # here the process itself tells
    lock.release()
    assert not Owner("elsewhere", 1, 0.0, owner).lives()


@pytest.mark.usefixtures("no_locks")
def test_a_file_that_says_nothing_keeps_the_lock(tmp_path: Path) -> None:
    owner_path(tmp_path / "rank-0.lock").write_text("")
    assert take_owner_file(tmp_path / "rank-0.lock") is None
    with pytest.raises(ResumeMismatchError, match=r"another process works .* if it has ended, delete .*rank-0.owner"):
        RankLock(tmp_path, 0)


def test_a_process_that_may_not_be_asked_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(process: int) -> NoReturn:
        raise psutil.AccessDenied(process)

    monkeypatch.setattr(psutil, "Process", denied)
    assert Owner(socket.gethostname(), 1, 0.0, tmp_path).lives()
