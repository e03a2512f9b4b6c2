"""A wall as a stream of small JSON frames, made so that a page may miss some of them."""

from __future__ import annotations

import json
import secrets
from collections import deque
from typing import Any

from .wall import DECODING, DONE, FAILED, OVER, PREFILL, SOON, STOPPED, WAITING, Wall

# A page sees only the last of the values that reach it together. Each frame repeats the changes of the ones before.
_REPEATED = 4
# Where much is written, fewer, so that a phone keeps up.
_LARGEST = 32_000


class Frames:
    """Numbers the changes of a wall.

    A frame is an object: `run` (names the wall; a page with it may ask for all), `n` (its number), `d` (the
    last few of [number, changes], the newest last), and `sum`, the figures of the whole wall. A page applies what it
    has not seen; where a number is missing it asks for `whole`.
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
        """Everything, and the number of the frame up to which it is known to be in it."""
        number = self._number  # read first: changes that come meanwhile are told again
        return {"run": self.run, "n": number, "tiles": self.wall.whole(), "sum": self.summary()}

    def summary(self) -> dict[str, Any]:
        """Figures of the whole wall."""
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
    """What a page shows while its wall waits for others."""
    return dump({"run": "", "n": 0, "d": [], "place": place})


def problem_frame(text: str) -> str:
    """What a page shows where a wall could not start."""
    return dump({"run": "", "n": 0, "d": [], "problem": text})


def dump(value: Any) -> str:
    """Compact JSON without a tag in it."""
    # Gradio warns of values that look like scripts: no value of ours has a tag in it.
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
