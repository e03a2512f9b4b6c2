"""Run `generate`'s own loop over a batch, with the engine in place of the model's forward.

The rows of such a call advance together: each step takes the logits of all rows. A finished row continues with the pad
token until the last row ends, as in `generate`, so processors see the same input as there. Other requests do not wait
for these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_async_batching.host_decoding.logits_handle import LogitsHandle
from hf_async_batching.host_decoding.token_chooser import TokenChooser
from hf_async_batching.runtime.reentrancy import choosing_for


@dataclass(slots=True)
class Decoded:
    """The result of a batch.

    Attributes:
        completions: New tokens of each row; all rows have the same length.
        scores: Scores of each step, float32 [rows, vocab]; empty if not requested.
        logits: The model's own logits of each step, float32 [rows, vocab]; empty if not requested.
    """

    completions: list[list[int]]
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


@torch.no_grad()
def decode_batch(
    handles: Sequence[LogitsHandle],
    chooser: TokenChooser,
    criteria: StoppingCriteriaList,
    *,
    pad: int | None,
    streamer: BaseStreamer | None = None,
    keep_scores: bool = False,
    keep_logits: bool = False,
) -> Decoded:
    """Decode a batch in the calling thread, until every row has finished.

    Args:
        handles: One per row.
        chooser: Chooses the tokens of all rows.
        criteria: Stopping criteria as `generate` has prepared them.
        pad: Token that continues a finished row; None if rows continue with their own tokens.
        streamer: Gets the tokens [rows] of each step, after the criteria.
        keep_scores: Whether to return scores and show them to the criteria.
        keep_logits: Whether to return logits.

    Raises:
        BaseException: Any error of a processor, a criterion, the streamer or the engine; the caller must cancel the
            requests.
    """
    with choosing_for(handles[0]._threads):
        return _decode(handles, chooser, criteria, pad, streamer, keep_scores, keep_logits)


def _decode(
    handles: Sequence[LogitsHandle],
    chooser: TokenChooser,
    criteria: StoppingCriteriaList,
    pad: int | None,
    streamer: BaseStreamer | None,
    keep_scores: bool,
    keep_logits: bool,
) -> Decoded:
    history = chooser.prompt
    unfinished = torch.ones(len(handles), dtype=torch.long, device=history.device)
    decoded = Decoded([[] for _ in handles])
    while True:
        # Ordinary tensors, not inference tensors, so that processors may write to them; on the caller's device.
        logits = torch.stack([handle.next_logits().to(history.device) for handle in handles])
        chosen = chooser(history, logits)
        tokens = chosen.tokens
        if pad is not None:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        if keep_scores:
            decoded.scores.append(chosen.scores)
        if keep_logits and chosen.logits is not None:
            decoded.logits.append(chosen.logits)
        history = torch.cat([history, tokens[:, None]], dim=-1)
        shown = tuple(decoded.scores) if keep_scores else None
        unfinished = unfinished & ~criteria(history, shown)
        if streamer is not None:
            streamer.put(tokens.cpu())  # type: ignore[no-untyped-call]
        values: list[int] = tokens.tolist()
        for completion, token in zip(decoded.completions, values, strict=True):
            completion.append(token)
        if not unfinished.any():
            return decoded
        handles[0].choose(zip(handles, values, strict=True))
