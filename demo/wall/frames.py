"""Turns a wall into a stream of small JSON frames; a page may miss some of them."""

from __future__ import annotations

import json
import secrets
from collections import deque
from typing import Any

from .wall import DECODING, DONE, FAILED, OVER, PREFILL, SOON, STOPPED, WAITING, Wall

# If several values reach a page together, it sees only the last. So each frame repeats the changes before it.
_REPEATED = 4
# Large frames repeat fewer changes, so that a phone keeps up.
_LARGEST = 32_000


class Frames:
    """Numbers the changes of a wall.

    A frame is an object with `run` (the wall's name, with which a page may ask for all of it), `n` (the frame's
    number), `d` (the last few [number, changes], the newest last) and `sum` (figures of the whole wall). A page
    applies the changes that it has not seen. If a number is missing, it asks for `whole`.
    """

    def __init__(self, wall: Wall, repeated: int = _REPEATED) -> None:
        self.wall = wall
        self.run = secrets.token_urlsafe(12)
        self._number = 0
        self._recent: deque[str] = deque(maxlen=repeated)

    def next(self) -> str:
        """Look at the wall, and return the next frame as JSON."""
        changes = self.wall.tick()
        self._number += 1
        self._recent.append(dump([self._number, changes]))
        while len(self._recent) > 2 and sum(map(len, self._recent)) > _LARGEST:
            self._recent.popleft()
        head = dump({"run": self.run, "n": self._number, "over": self.wall.over, "sum": self.summary()})
        return f'{head[:-1]},"d":[{",".join(self._recent)}]}}'

    def whole(self) -> dict[str, Any]:
        """Return the whole wall, and the number of the last frame that it certainly includes."""
        number = self._number  # read first: changes that come meanwhile are sent again
        return {"run": self.run, "n": number, "tiles": self.wall.whole(), "sum": self.summary()}

    def summary(self) -> dict[str, Any]:
        """Return figures of the whole wall."""
        wall = self.wall
        return {
            "chats": len(wall.tiles),
            "soon": wall.count(SOON, ""),
            "waiting": wall.count(WAITING),
            "running": wall.count(PREFILL, DECODING),
            "done": wall.count(DONE),
            "stopped": wall.count(STOPPED),
            "failed": wall.count(FAILED),
            "over": wall.count(*OVER),
            "tokens": wall.tokens,
            "seconds": round(wall.seconds, 2),
            "speed": round(wall.tokens / wall.seconds, 1) if wall.seconds else 0.0,
        }


def waiting_frame(place: int) -> str:
    """Return the frame of a wall that waits for others."""
    return dump({"run": "", "n": 0, "d": [], "place": place})


def problem_frame(text: str) -> str:
    """Return the frame of a wall that could not start."""
    return dump({"run": "", "n": 0, "d": [], "problem": text})


def dump(value: Any) -> str:
    """Return compact JSON that contains no tag."""
    # Gradio warns of values that look like scripts, so tags are escaped.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
