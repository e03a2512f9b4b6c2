"""A batch as `generate` steps through it, put together from rows that the engine computes each at its own pace.

`generate` makes one token of every row, asks the criteria, shows the tokens to the streamer, and goes on until all
rows have finished. The engine knows no such batch. Here the caller's thread lines up the tokens as they arrive, and
does what `generate` would have done with them; the engine does not wait for it.

How far does the engine run ahead? Up to `max_new_tokens`, where criteria are slower than it. That costs steps of rows
which nobody wants any more, and no memory: a token is an integer. Rows are cancelled as soon as they have finished
here, which is at most the criteria's own time behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.generation.streamers import BaseStreamer

from hf_async_batching.errors import EngineClosedError
from hf_async_batching.handle import GenerationHandle
from hf_async_batching.stopping.criteria import StopChecker


def step_batch(
    handles: list[GenerationHandle], checker: StopChecker, *, pad: int | None, streamer: BaseStreamer | None = None
) -> tuple[list[list[int]], list[int]]:
    """Step through a batch until every row has finished.

    Args:
        handles: One per row.
        checker: Called once per step, in this thread.
        pad: What a row that has finished goes on with; where None it goes on with its own tokens, as in `generate`.
        streamer: Gets the tokens [batch] of each step, after the checker has seen them.

    Returns:
        The new tokens of each row, of the same length for all; and how many of them are its own, not padding.

    Raises:
        Exception: What the checker, the streamer or the engine raises. The caller cancels the handles.
    """
    rows = [iter(handle) for handle in handles]
    live = [True] * len(rows)
    completions: list[list[int]] = [[] for _ in rows]
    lengths = [0] * len(rows)
    while any(live):
        tokens = [
            _next_token(row, handle) if on or pad is None else pad for row, handle, on in zip(rows, handles, live)
        ]
        for i, token in enumerate(tokens):
            completions[i].append(token)
            lengths[i] += live[i] or pad is None
        for i, finished in enumerate(checker.step(tokens)):
            if finished and live[i]:
                live[i] = False
                if pad is not None:
                    handles[i].cancel()
        if streamer is not None:
            streamer.put(torch.tensor(tokens, device="cpu"))  # type: ignore[no-untyped-call]
    return completions, lengths


def _next_token(row: Iterator[int], handle: GenerationHandle) -> int:
    token = next(row, None)
    if token is None:
        raise EngineClosedError(f"request {handle.request_id} was cancelled while `generate` was waiting for it")
    return token
