"""The threads of engines: a test counts its own, for models of other tests may have a shared manager that idles."""

from __future__ import annotations

import threading


def engine_threads() -> set[threading.Thread]:
    """All that live."""
    return {thread for thread in threading.enumerate() if thread.name == "hf_async_batching"}
