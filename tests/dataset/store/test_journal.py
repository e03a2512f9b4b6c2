from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from hf_async_batching.dataset.store import journal as module
from hf_async_batching.dataset.store.journal import Journal, read_journal

RECORDS = [{"index": i, "text": "ü" * i, "logprobs": [-0.1, 1e-7]} for i in range(5)]


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    assert list(read_journal(path)) == []
    journal = Journal(path)
    journal.append(RECORDS[:2])
    assert journal.unsynced > 0
    assert list(read_journal(path)) == RECORDS[:2]  # written, though not synced
    journal.sync()
    assert journal.unsynced == 0
    journal.append(RECORDS[2:])
    journal.close()
    journal.close()
    assert list(read_journal(path)) == RECORDS


def test_every_torn_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path)
    ends = [path.stat().st_size]
    for record in RECORDS:
        journal.append([record])
        ends.append(path.stat().st_size)
    journal.close()
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        left = RECORDS[: sum(end <= length for end in ends[1:])]
        assert list(read_journal(path)) == left
        again = Journal(path)
        assert path.stat().st_size == max(end for end in ends if end <= max(length, ends[0])), "what is torn is gone"
        again.append([{"again": length}])
        again.close()
        assert list(read_journal(path)) == [*left, {"again": length}]


def test_a_changed_byte_ends_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path)
    journal.append(RECORDS)
    journal.close()
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        found = list(read_journal(path))
        assert found == RECORDS[: len(found)]
        assert len(found) < len(RECORDS)


def test_a_failed_append_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path)
    journal.append(RECORDS[:1])
    journal.sync()
    whole = path.stat().st_size

    def half(file: Any, content: bytes) -> None:
        file.write(content[: len(content) // 2])
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write", half)
        with pytest.raises(OSError, match="No space"):
            journal.append(RECORDS[1:2])
    assert path.stat().st_size == whole, "what is left of it must not follow a shorter record"
    journal.append(RECORDS[2:])
    journal.close()
    assert list(read_journal(path)) == [RECORDS[0], *RECORDS[2:]]
