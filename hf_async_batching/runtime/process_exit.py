"""What compiles in the background ends with the process, without taking it along.

Python ends daemon threads where they stand, and a compiler's C++ code answers that with an abort; other threads it
waits for, and a compiler takes half a minute.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref

# Seconds between two looks whether the process ends, and until a thread that was told so is told again.
_LOOK_AGAIN, _SAY_AGAIN = 0.1, 1.0
_WARN_AFTER = 10

logger = logging.getLogger(__name__)


class ProcessEndsError(BaseException):
    """Raised in a thread whose work is no longer needed."""


# The threads that are ended so.
_watched: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def process_ends() -> bool:
    """Whether Python only waits for threads that are ended here before it tears down what they use.

    A program can go on in other threads when its main thread has ended.
    """
    others = [thread for thread in threading.enumerate() if not thread.daemon and thread not in _watched]
    return not any(thread.is_alive() for thread in others)


def end_with_the_process(thread: threading.Thread, done: threading.Event) -> None:
    """Raise `ProcessEndsError` in a thread once the process ends; returns at once.

    Args:
        thread: No daemon, running. It ends when it comes to its next line of Python, so that a compiler that hangs
            holds the process up; a warning says so.
        done: Set when nothing needs to be raised in it any more.
    """
    _watched.add(thread)
    name = f"{thread.name}_end"
    # A daemon may: there is nothing but Python in it.
    threading.Thread(target=_watch, args=(thread, done), name=name, daemon=True).start()


def _watch(thread: threading.Thread, done: threading.Event) -> None:
    told = 0
    while not done.wait(_LOOK_AGAIN):
        if process_ends():
            # Comes up before the thread's next line of Python. Again if need be: compilers may catch all there is.
            ident = ctypes.c_ulong(thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(ProcessEndsError))
            told += 1
            if told == _WARN_AFTER:
                logger.warning("the process waits for thread %s, which compiles; Ctrl-C ends it", thread.name)
            done.wait(_SAY_AGAIN)
