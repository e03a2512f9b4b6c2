"""Clears away what visitors leave behind: unread streams, sessions, files."""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import stat
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from gradio.utils import cancel_tasks

logger = logging.getLogger(__name__)

# Visitors' files, whole or in part, and copies of results. Beyond these bounds the oldest are deleted.
MOST_FILES = 1 << 30
FILE_SECONDS = 3600.0
_LOOK_FOR_FILES_SECONDS = 20.0
# A stream that is not read for so long is ended, and its places become free.
UNREAD_SECONDS = 30.0
_MOST_UNREAD = 2000
_SWEEP_SECONDS = 1.0
# A session is dropped after so long with nothing running and nothing to read.
_IDLE_SECONDS = 10.0
_MOST_SESSIONS = 100_000

# This page's own folder: sweeping it cannot delete files of other Gradio apps.
FILES = Path(tempfile.gettempdir()) / f"hf_async_batching-files-{getpass.getuser()}"
os.environ.setdefault("GRADIO_TEMP_DIR", str(FILES))


def own_files() -> bool:
    """Say whether visitors' files are in this page's own folder, and not in one that the user has named."""
    return os.environ.get("GRADIO_TEMP_DIR") == str(FILES)


class Sweeper:
    """Looks at Gradio's queue every second: ends unread streams, and drops old sessions and files."""

    def __init__(self, app: Any) -> None:
        self._queue = queue_of(app)
        self._queue.pending_messages_per_session.max_size = _MOST_SESSIONS
        # By session: the oldest unread message, and since when it is the oldest; None if there is none.
        self._oldest: dict[str, tuple[object, float]] = {}

    async def run(self) -> None:
        """Sweep until cancelled."""
        looked = 0.0
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                await self.sweep()
                if own_files() and time.monotonic() - looked > _LOOK_FOR_FILES_SECONDS:
                    looked = time.monotonic()
                    await asyncio.to_thread(delete_oldest, FILES, MOST_FILES, FILE_SECONDS)
            except Exception:
                logger.exception("What visitors left behind could not be cleared away.")

    async def sweep(self) -> None:
        """Sweep once."""
        now = time.monotonic()
        sessions = self._queue.pending_messages_per_session
        for session in self._oldest.keys() - sessions.keys():
            del self._oldest[session]
        live = {event.session_hash for event in list(self._queue.event_ids_to_events.values())}
        for session, messages in list(sessions.items()):
            unread: deque[Any] = messages._queue
            oldest = unread[0] if unread else None
            known, since = self._oldest.get(session, (self, now))
            if known is not oldest:
                self._oldest[session] = (oldest, now)
                since = now
            if oldest is not None and (now - since > UNREAD_SECONDS or len(unread) > _MOST_UNREAD):
                await self._end(session)
            elif oldest is None and session not in live and now - since > _IDLE_SECONDS:
                self._forget(session)
        ids = self._queue.pending_event_ids_session
        for session in [session for session in ids if session not in sessions and session not in live]:
            ids.pop(session, None)

    async def _end(self, session: str) -> None:
        """End all runs of a session; their places become free."""
        events = [event for event in self._queue.event_ids_to_events.values() if event.session_hash == session]
        logger.info("A stream was not read: its %d runs are ended.", len(events))
        await self._queue.clean_events(session_hash=session)
        await cancel_tasks({f"{session}_{event.fn._id}" for event in events})
        self._forget(session)

    def _forget(self, session: str) -> None:
        self._queue.pending_messages_per_session.pop(session, None)
        self._queue.pending_event_ids_session.pop(session, None)
        self._oldest.pop(session, None)


def delete_oldest(folder: Path, most: int, seconds: float) -> None:
    """Delete files below a folder that are older than `seconds`, and the oldest others beyond `most` bytes in all."""
    files: list[tuple[float, int, Path]] = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            about = path.lstat()
            if not stat.S_ISDIR(about.st_mode):
                files.append((about.st_ctime, about.st_size, path))
    total, old = sum(size for _, size, _ in files), time.time() - seconds
    for made, size, path in sorted(files):
        if total <= most and made >= old:
            return
        total -= size
        with suppress(OSError):
            path.unlink()
            path.parent.rmdir()


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """Sweep while the page is served."""
    task = asyncio.create_task(Sweeper(app).run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def queue_of(app: Any) -> Any:
    """Return Gradio's queue, which knows the running and waiting events and their unread messages."""
    return app.get_blocks()._queue
