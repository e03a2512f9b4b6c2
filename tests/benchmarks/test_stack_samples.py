"""Stacks of all threads, sampled."""

from __future__ import annotations

import threading
import time

from benchmarks.stack_samples import StackSamples


def rest_in_main(seconds: float) -> None:
    time.sleep(seconds)


def rest_in_thread(seconds: float) -> None:
    time.sleep(seconds)


def test_every_thread_is_seen_for_as_long_as_it_ran() -> None:
    threads = [threading.Thread(target=rest_in_thread, args=(0.3,), name="other") for _ in range(2)]
    with StackSamples(0.002) as samples:
        for thread in threads:
            thread.start()
        rest_in_main(0.6)
    for thread in threads:
        thread.join()
    lines = samples.report(0.1).splitlines()
    main = next(line for line in lines if "rest_in_main" in line)
    other = next(line for line in lines if "rest_in_thread" in line)
    assert 0.2 < float(other.split()[0]) < float(main.split()[0]) - 0.1
    assert sum("rest_in_thread" in line for line in lines) == 2, "each for itself, though of one name"
    assert lines.index(next(line for line in lines if " other (" in line)) < lines.index(other)
    assert not any("stack_samples.py:_run" in line for line in lines), "not itself"
    assert not samples.report(5.0), "nothing took that long"
