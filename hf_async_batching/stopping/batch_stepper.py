"""Step through a batch as `generate` does, over rows that the engine computes independently.

`generate` makes one token of every row, asks the criteria, shows the tokens to the streamer, and continues until all
rows have finished. The engine has no such batch. Here the caller's thread lines up the tokens as they arrive, and
treats them as `generate` would. The engine does not wait for this thread.

If criteria are slower than the engine, the engine can run ahead up to `max_new_tokens`. Steps beyond a stop are
wasted, but need no memory: a token is an integer. A row is cancelled as soon as the criteria have finished it.
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
        pad: Token that continues a finished row; None if it continues with its own tokens, as in `generate`.
        streamer: Gets the tokens [batch] of each step, after the checker.

    Returns:
        The new tokens of each row, with the same length for all rows; and the number of them that are not padding.

    Raises:
        Exception: Any error of the checker, the streamer or the engine. The caller must cancel the handles.
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
