"""The workloads of measurements: random prompts, fixed numbers of new tokens, greedy, no end of sequence.

The lengths of a workload are always the same. A seed changes only the token ids, so that repeated runs find no prefix
of each other in a prefix cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_async_batching.core.request import Request

# Small ids are special tokens in most vocabularies.
_FIRST_TOKEN = 3

# New tokens per request in the runs that are not counted.
_BRIEF = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that arrive at the start, and requests that follow from answers.

    Attributes:
        name: One of `WORKLOADS`.
        first: Requests that arrive together at the start. Ids are "0", "1", ...
        messages: For each first request, its user's messages in later turns: token ids, and the length of the answer.
            Empty if no request is part of a conversation.
    """

    name: str
    first: tuple[Request, ...]
    messages: tuple[tuple[tuple[tuple[int, ...], int], ...], ...] = ()

    def after(self, request: Request, answer: Sequence[int]) -> Request | None:
        """Return the next request of the same user after `answer`, or None at the end of the conversation.

        Its prompt is the conversation so far and the new message. The second turn of "3" has the id "3.1".
        """
        conversation, _, turn = request.request_id.partition(".")
        turns = self.messages[int(conversation)] if self.messages else ()
        done = int(turn or 0)
        if done == len(turns):
            return None
        message, new = turns[done]
        name, prompt = f"{conversation}.{done + 1}", (*request.prompt, *answer, *message)
        return replace(request, request_id=name, prompt=prompt, max_new_tokens=new)

    @property
    def num_requests(self) -> int:
        """Number of requests in all turns."""
        return len(self.first) + sum(map(len, self.messages))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; in a conversation each prompt contains all earlier turns."""
        return sum(prompt for prompt, _ in self.lengths())

    @property
    def new_tokens(self) -> int:
        """Number of tokens to generate."""
        return sum(new for _, new in self.lengths())

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and completion together."""
        return max(prompt + new for prompt, new in self.lengths())

    def lengths(self) -> list[tuple[int, int]]:
        """Return prompt and new tokens of every request, in arbitrary order."""
        found = []
        for index, request in enumerate(self.first):
            prompt, new = len(request.prompt), request.max_new_tokens
            found.append((prompt, new))
            for message, answer in self.messages[index] if self.messages else ():
                prompt, new = prompt + new + len(message), answer
                found.append((prompt, new))
        return found

    def brief(self) -> Workload:
        """Return the first requests with answers of a few tokens, for the runs that are not counted."""
        short = [replace(request, max_new_tokens=min(request.max_new_tokens, _BRIEF)) for request in self.first]
        return Workload(self.name, tuple(short))


def make_workload(
    name: str,
    vocab: int,
    *,
    seed: int = 0,
    rows: int | None = None,
    prompt: int | None = None,
    new: int | None = None,
    turns: int | None = None,
) -> Workload:
    """Make a workload by name.

    Args:
        name: "seed", "small", "mix" or "chat".
        vocab: Size of the vocabulary; token ids are smaller.
        seed: Seed of the token ids.
        rows: Number of requests; for "chat", of conversations.
        prompt: Tokens per prompt; for "mix", the largest number; for "chat", tokens of the shared system prompt.
        new: New tokens per request; for "mix" and "chat", the largest number.
        turns: Messages per conversation of "chat".

    Raises:
        ValueError: The workload does not exist, or a size is below 1.
    """
    for label, size in (("rows", rows), ("prompt", prompt), ("new", new), ("turns", turns)):
        if size is not None and size < 1:
            raise ValueError(f"`{label}` must be at least 1, got {size}")
    ids = random.Random(f"{seed} {name}")
    if name == "chat":
        return _chat(ids, vocab, rows or 16, prompt or 500, new or 256, turns or 8)
    if turns is not None:
        raise ValueError(f"`turns` belongs to the workload 'chat'; {name!r} has no turns")
    if name == "seed":
        lengths = [(prompt or 32, new or 8192)] * (rows or 32)
    elif name == "small":
        lengths = [(prompt or 64, new or 512)] * (rows or 256)
    elif name == "mix":
        r = random.Random(0)
        lengths = [(_draw(r, 16, prompt or 1024), _draw(r, 16, new or 1024)) for _ in range(rows or 256)]
    else:
        raise ValueError(f"there is no workload {name!r}; choose one of {', '.join(WORKLOADS)}")
    requests = [Request(str(i), _tokens(ids, vocab, length), count) for i, (length, count) in enumerate(lengths)]
    return Workload(name, tuple(requests))


WORKLOADS = ("seed", "small", "mix", "chat")


def _chat(ids: random.Random, vocab: int, rows: int, system_length: int, longest: int, turns: int) -> Workload:
    r = random.Random(0)

    def answer() -> int:
        return _draw(r, 64, longest)

    def message() -> tuple[int, ...]:
        return _tokens(ids, vocab, r.randint(20, 200))

    system = _tokens(ids, vocab, system_length)
    first = [Request(str(i), (*system, *message()), answer()) for i in range(rows)]
    later = [tuple((message(), answer()) for _ in range(turns - 1)) for _ in range(rows)]
    return Workload("chat", tuple(first), tuple(later))


def _draw(r: random.Random, least: int, most: int) -> int:
    """Draw a length from `least` to `most`. If `most` is small, lengths begin at a quarter of it."""
    return r.randint(max(1, min(least, most // 4)), most)


def _tokens(ids: random.Random, vocab: int, count: int) -> tuple[int, ...]:
    return tuple(ids.randrange(_FIRST_TOKEN, vocab) for _ in range(count))
