"""Rescale weights that a family's own forward rescales in place: RWKV halves them every few layers for 16-bit numbers.

The forward rescales when it first runs in eval mode, and sets a flag beside the weights. A view shares the weights but
has its own flag, so the view's forward and the model's own forward would each rescale them.
"""

from __future__ import annotations

import threading

from transformers import PreTrainedModel

from hf_async_batching.errors import UnsupportedModelError

_lock = threading.Lock()


def rescale_as_generate_does(model: PreTrainedModel) -> None:
    """Rescale the weights now, as the model's own next forward in eval mode would, so that no view writes to them.

    Args:
        model: The user's model; it is changed only if its forward rescales.

    Raises:
        UnsupportedModelError: The model is in training mode, in which its forward undoes the rescaling.
    """
    for module in model.modules():
        rescale = getattr(module, "_rescale_layers", None)
        if rescale is None or not hasattr(module, "layers_are_rescaled"):
            continue
        if module.training:
            raise UnsupportedModelError(
                f"{type(model).__name__} is not served in training mode, in which its forward rescales its weights: "
                "call `model.eval()` first, or use plain `model.generate`"
            )
        with _lock:
            rescale()  # does nothing if the weights are already rescaled
