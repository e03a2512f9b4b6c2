from __future__ import annotations

import threading
import time

from hf_async_batching.dataset.run.window import RowWindow


def enters(window: RowWindow, indices: list[int]) -> threading.Thread:
    thread = threading.Thread(target=window.enter, args=(indices,), daemon=True)
    thread.start()
    thread.join(0.05)
    return thread


def test_room_for_so_many_unfinished_rows() -> None:
    window = RowWindow(4, 100)
    assert window.enter([0, 1, 2])
    waiting = enters(window, [3, 4])
    assert waiting.is_alive()
    window.leave(2)
    waiting.join(60)
    assert not waiting.is_alive()
    assert len(window) == 4


def test_the_oldest_row_holds_reading_back() -> None:
    window = RowWindow(4, 6)
    assert window.enter([0, 1, 2])
    window.leave(1)
    window.leave(2)
    assert window.enter([3, 4, 5])
    for index in (3, 4, 5):
        window.leave(index)
    waiting = enters(window, [6])
    assert waiting.is_alive()  # row 0 is not finished, and 6 is too far from it
    window.leave(0)
    waiting.join(60)
    assert not waiting.is_alive()
    assert len(window) == 1


def test_more_than_the_window_enters_when_it_is_empty() -> None:
    window = RowWindow(2, 2)
    assert window.enter([0, 1, 2, 3, 4])
    waiting = enters(window, [5])
    assert waiting.is_alive()
    for index in range(5):
        window.leave(index)
    waiting.join(60)
    assert not waiting.is_alive()
    assert window.enter([])


def test_closed() -> None:
    window = RowWindow(1, 1)
    assert window.enter([0])
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(window.enter([1])))
    thread.start()
    time.sleep(0.02)
    window.close()
    thread.join(60)
    assert results == [False]


def test_rows_enter_up_to_the_size_and_the_span_exactly() -> None:
    window = RowWindow(3, 4)
    assert window.enter([0]) and window.enter([1, 2])
    window.leave(1)
    assert (len(window), list(window._order), window._left) == (2, [0, 1, 2], {1})
    assert window._fits([3]) and not window._fits([3, 4])
    window.leave(2)
    assert window._fits([2, 3]) and not window._fits([4]) and not window._fits([3, 4])
    window.leave(0)
    assert (len(window), list(window._order), window._left) == (0, [], set())
