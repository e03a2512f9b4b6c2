"""End background compilations with the process, without crashing it.

Python ends daemon threads at any point, and a compiler's C++ code then aborts. Python waits for other threads, and a
compiler takes half a minute.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref

# Seconds between two checks whether the process ends, and before a thread is told again to end.
_LOOK_AGAIN, _SAY_AGAIN = 0.1, 1.0
_WARN_AFTER = 10

logger = logging.getLogger(__name__)


class ProcessEndsError(BaseException):
    """Raised in a thread whose work is no longer needed."""


# The threads that end in this way.
_watched: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def process_ends() -> bool:
    """Whether Python waits only for threads that this module ends, before it tears down modules that they use.

    A program can go on in other threads when its main thread has ended.
    """
    others = [thread for thread in threading.enumerate() if not thread.daemon and thread not in _watched]
    return not any(thread.is_alive() for thread in others)


def end_with_the_process(thread: threading.Thread, done: threading.Event) -> None:
    """Raise `ProcessEndsError` in a thread once the process ends; returns at once.

    Args:
        thread: A running thread that is not a daemon. It ends at its next line of Python. If a compiler hangs, the
            process waits, and a warning says so.
        done: Set when the thread no longer needs to be ended.
    """
    _watched.add(thread)
    name = f"{thread.name}_end"
    # This one may be a daemon, because it runs only Python code.
    threading.Thread(target=_watch, args=(thread, done), name=name, daemon=True).start()


def _watch(thread: threading.Thread, done: threading.Event) -> None:
    told = 0
    while not done.wait(_LOOK_AGAIN):
        if process_ends():
            # Raised at the thread's next line of Python. Repeated if necessary, because compilers may catch all
            # errors.
            ident = ctypes.c_ulong(thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(ProcessEndsError))
            told += 1
            if told == _WARN_AFTER:
                logger.warning("the process waits for thread %s, which compiles; Ctrl-C ends it", thread.name)
            done.wait(_SAY_AGAIN)
