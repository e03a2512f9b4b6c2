"""`generate`'s own loop over a batch, with the engine in place of the model's forward.

The rows of such a call advance together: each step takes the logits of all rows. A row that has ended goes on with the
pad token until the last row ends, as in `generate`, so that processors see what they see there. Other requests do not
wait for these rows.
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
    """The outcome of a batch.

    Attributes:
        completions: The new tokens of each row, of one length for all.
        scores: Per step float32 [rows, vocab]; empty where not asked for.
        logits: The model's own logits, per step float32 [rows, vocab]; empty where not asked for.
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
    """Step through a batch until every row has finished; in the calling thread.

    Args:
        handles: One per row.
        chooser: Chooses the tokens of all rows.
        criteria: As `generate` has prepared them.
        pad: The token with which a finished row goes on; None where rows go on with their own tokens.
        streamer: Gets the tokens [rows] of each step, after the criteria have seen them.
        keep_scores: Whether scores are returned, and shown to criteria.
        keep_logits: Whether logits are returned.

    Raises:
        BaseException: What a processor, a criterion, the streamer or the engine raises; the caller cancels.
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
        # Ordinary tensors, which processors may write to; on the caller's device.
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
