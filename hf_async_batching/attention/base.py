"""The interface of the attention kernels, and which of them serve a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from hf_async_batching.attention.context import AttentionContext
from hf_async_batching.config import BackendName
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.kv_cache.paged_cache import PagedCache


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer asks for beside plain causal attention.

    Attributes:
        scaling: Factor on the products of queries and keys.
        sliding_window: A query at position i sees keys at positions above i - sliding_window; None for all.
        softcap: Scores become `softcap * tanh(score / softcap)` before masking; None for none.
        chunk: A query at position i sees keys from `i - i % chunk` on (chunked attention); None for all.
        sinks: [num_heads], a score per head that takes part in the softmax and has no value (attention sinks); None
            for none.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    chunk: int | None = None
    sinks: torch.Tensor | None = None


class AttentionBackend(Protocol):
    """Writes new keys and values into the pages and attends over them.

    Attributes:
        tile_size: The longest run of query tokens of one row that the backend takes as one tile.
        reads_back: Whether it reads row tables on the host, and so cannot run inside a CUDA graph.
    """

    tile_size: int
    reads_back: bool

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        context: AttentionContext,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention of one layer over the packed tokens of a step.

        Args:
            query: [tokens, num_heads, key_dim].
            key: [tokens, num_kv_heads, key_dim].
            value: [tokens, num_kv_heads, value_dim].
            layer: Index of the layer in the cache.
            context: Rows, positions and pages of the tokens.
            options: Scaling, window, soft cap, chunk, sinks.

        Returns:
            [tokens, num_heads, value_dim] in the dtype of `query`.
        """

    def ready(self, layers: Iterable[LayerShape], *, page_size: int, batches: Iterable[int]) -> None:
        """Compile the kernels that steps will launch, side by side, so that no step waits for one after the other.

        Args:
            layers: The model's layers.
            page_size: Tokens per page.
            batches: Rows of the decode steps to come.
        """

    def tune(self, cache: PagedCache, *, batches: Iterable[int], context: int, prompt: int) -> None:
        """Measure settings on the device, for the layers that `attend` was called for so far, and use the best.

        What was measured before on such a card is not measured again. Graphs that are captured already keep the
        settings that they have. The device must have nothing else to do; the pages are read and never written.

        Args:
            cache: Keys and values.
            batches: Rows of the decode steps to measure for; settings are shared up to the next power of two.
            context: Tokens that a row holds, typically.
            prompt: Tokens of a prompt, typically.
        """


def make_backend(name: BackendName, device: torch.device) -> AttentionBackend:
    """The kernels for a device.

    Args:
        name: "torch" for plain PyTorch, "triton" for the Triton kernels, "auto" for Triton on CUDA and PyTorch else.
        device: Where the model runs.

    Raises:
        ImportError: Triton was asked for and is not installed.
    """
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        from hf_async_batching.attention.triton_backend import TritonBackend
        from hf_async_batching.runtime.autotune import Tuning

        return TritonBackend(device, Tuning(device))
    from hf_async_batching.attention.torch_backend import ReferenceBackend

    return ReferenceBackend()
