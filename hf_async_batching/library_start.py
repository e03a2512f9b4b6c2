"""Loading what the first forward of any model loads, in a thread of its own, while the model is looked at.

A kernel is loaded when it first runs, and the libraries of matrix products and of attention come up with their first
call: some tenths of a second in a fresh process, for which nobody needs Python's lock.
"""

from __future__ import annotations

import logging
import threading

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

_started: set[torch.device] = set()
_lock = threading.Lock()


def start_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Begin, once for a device and where anything is to be loaded; returns at once.

    Args:
        device: Where a model lies.
        dtype: Of its weights.
    """
    if device.type != "cuda":
        return
    with _lock:
        if device in _started:
            return
        _started.add(device)
    # No daemon, whatever this thread is: Python takes down what a daemon uses while it runs.
    thread = threading.Thread(target=_run, args=(device, dtype), name="hf_async_batching_libraries", daemon=False)
    try:
        thread.start()
    except RuntimeError:  # too many threads: the model's own forward loads what it needs
        logger.debug("libraries do not come up early", exc_info=True)


def _run(device: torch.device, dtype: torch.dtype) -> None:
    try:
        with torch.inference_mode():
            first_calls(device, dtype)
    except Exception:  # the model's own forward will tell
        logger.debug("libraries did not come up early", exc_info=True)


def first_calls(device: torch.device, dtype: torch.dtype) -> None:
    """An embedding, a product and attention, of next to nothing.

    Args:
        device: Where.
        dtype: Of all but token ids.
    """
    weight = torch.zeros(256, 128, device=device, dtype=dtype)
    hidden = F.embedding(torch.zeros(1, 16, device=device, dtype=torch.int64), weight)
    heads = F.linear(hidden, weight).view(1, 16, 2, 128).transpose(1, 2)
    F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    F.scaled_dot_product_attention(heads[:, :, :1], heads, heads)
