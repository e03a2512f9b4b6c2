"""Learn how a model's modules call attention, from one forward over two tokens, before any memory is committed.

The probe runs on the view under an attention implementation of its own. Its mask function, registered through
`AttentionMaskInterface`, returns a mask that remembers which sliding window the model asked for. The engine's own
implementation registers no mask function, so transformers builds no mask in a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from hf_async_batching.attention.hf_interface import PagedLayer, refuse_unknown
from hf_async_batching.errors import UnsupportedModelError, does_not_fit
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.runtime.autocast import lowered

NAME = "hf_async_batching_probe"
PROBE_TOKENS = 2

_SEEN = "_hf_async_batching_seen"


class ProbeResult(NamedTuple):
    """What the probe learned.

    Attributes:
        layers: What each attention module asked for, by the module's identity.
        shapes: Shapes of the keys and values of each layer, by layer index.
        passes_context: Whether every layer passes the keyword argument `paged` on to attention.
    """

    layers: dict[int, PagedLayer]
    shapes: list[LayerShape]
    passes_context: bool


class _Recorder(threading.local):
    def __init__(self) -> None:
        self.layers: dict[int, PagedLayer] = {}
        self.shapes: list[LayerShape] = []
        self.contexts: list[bool] = []
        self.observe: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None


_recorder = _Recorder()
_CONTEXT = object()


def probe(model_name: str, forward: Callable[..., Any], *, may_lack_attention: bool = False) -> ProbeResult:
    """Run `forward(paged=...)`, a forward of the view over `PROBE_TOKENS` tokens, and report its attention calls.

    Args:
        model_name: Name of the model, for messages.
        forward: Runs the model and passes its keyword argument on.
        may_lack_attention: Whether a model without any attention is served.

    Raises:
        UnsupportedModelError: Attention does not go through transformers' interface, or asks for something that is
            not served.
    """
    _recorder.__init__()  # type: ignore[misc]
    try:
        try:
            forward(paged=_CONTEXT)
        except TypeError as error:
            if "paged" not in str(error):
                raise
            # The outermost forward does not take the keyword argument.
            _recorder.__init__()  # type: ignore[misc]
            forward()
        layers, shapes, contexts = _recorder.layers, _recorder.shapes, _recorder.contexts
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{model_name} is not served: {error}") from error
    except Exception as error:
        if not does_not_fit(error):
            raise
        raise UnsupportedModelError(
            f"{model_name} is not served: its forward fails over packed tokens ({type(error).__name__}: {error})"
        ) from error
    finally:
        _recorder.__init__()  # type: ignore[misc]
    if not layers and not may_lack_attention:
        raise UnsupportedModelError(
            f"{model_name} is not served: its attention does not go through transformers' `AttentionInterface`. "
            "Use plain `model.generate` for this model."
        )
    return ProbeResult(layers, shapes, all(contexts))


def without_attention(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run a forward of a view whose every attention layer returns zeros, and return its result."""
    _recorder.__init__()  # type: ignore[misc]
    try:
        return forward()
    finally:
        _recorder.__init__()  # type: ignore[misc]


def observe_attention(
    forward: Callable[[], Any],
    observe: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> None:
    """Run a forward of a view whose every attention layer returns zeros.

    Args:
        forward: Runs the view over `PROBE_TOKENS` tokens.
        observe: Called with each attention module and its queries, keys and values [1, heads, tokens, dim].
    """
    _recorder.__init__()  # type: ignore[misc]
    _recorder.observe = observe
    try:
        forward()
    finally:
        _recorder.__init__()  # type: ignore[misc]


def _probe_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    device: torch.device,
    mask_function: Callable[..., Any],
    use_vmap: bool = False,
    local_size: int | None = None,
    **_: Any,
) -> torch.Tensor:
    seen: tuple[int | None, int | None]
    if not use_vmap and _sees(mask_function, local_size, chunked=False):
        seen = (local_size, None)
    # transformers reports the chunks of chunked attention as windows.
    elif not use_vmap and local_size is not None and _sees(mask_function, local_size, chunked=True):
        seen = (None, local_size)
    else:
        raise UnsupportedModelError("its attention mask is neither causal nor a causal sliding window, nor chunked")
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device).tril()
    setattr(mask, _SEEN, seen)
    return mask


def _sees(mask_function: Callable[..., Any], window: int | None, *, chunked: bool) -> bool:
    """Whether a mask lets a query see exactly the last `window` keys (all keys if None), checked around the edges.

    With `chunked`, the query sees the keys of its own chunk of `window` tokens.
    """
    width = window if window is not None else 1000
    for query in (0, 1, width - 1, width, width + 1, 2 * width - 1, 2 * width):
        first = query - query % width if chunked else query - width + 1
        for key in {0, 1, first - 1, first, query - width, query - width + 1, query, query + 1}:
            if query < 0 or key < 0:
                continue
            expected = key <= query and (window is None or key >= first)
            try:
                seen = bool(mask_function(0, 0, *(torch.tensor(i, device="cpu") for i in (query, key))))
            except (IndexError, RuntimeError):
                return False  # the mask reads a table per token
            if seen != expected:
                return False
    return True


def _probe_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    paged: object = None,
    scaling: float | None = None,  # noqa: ARG001
    softcap: float | None = None,  # noqa: ARG001
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    name = type(module).__name__
    query, key, value = lowered(query, key, value)
    if id(module) in _recorder.layers:
        raise UnsupportedModelError(f"{name} calls attention more than once per forward")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{name} attends in both directions")
    refuse_unknown(module, kwargs)
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == value.shape[2] == PROBE_TOKENS:
        raise UnsupportedModelError(f"{name} attends to other tokens than those of its input")
    if s_aux is not None and s_aux.shape != (query.shape[1],):
        raise UnsupportedModelError(f"{name} has attention sinks of shape {tuple(s_aux.shape)}")
    if _recorder.observe is not None:
        _recorder.observe(module, query, key, value)
    chunk = None
    if attention_mask is not None:
        if not hasattr(attention_mask, _SEEN):
            raise UnsupportedModelError(f"{name} builds its own attention mask")
        # The mask decides: some families name a window in the call that their mask ignores, and some do the reverse.
        sliding_window, chunk = getattr(attention_mask, _SEEN)
    _recorder.layers[id(module)] = PagedLayer(len(_recorder.layers), sliding_window, chunk)
    seen = (sliding_window, chunk, s_aux is not None)
    _recorder.shapes.append(LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype, query.shape[1], *seen))
    _recorder.contexts.append(paged is _CONTEXT)
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(NAME, _probe_attention)
AttentionMaskInterface.register(NAME, _probe_mask)
