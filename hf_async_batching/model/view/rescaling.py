"""Weights that a family's own forward rescales in place: RWKV halves them every few layers, for 16-bit numbers.

It does so in the first forward in eval mode, and keeps a flag of it beside the weights. A view shares the weights and
has a flag of its own: its forward would rescale them, and the model's own forward would do it once more.
"""

from __future__ import annotations

import threading

from transformers import PreTrainedModel

from hf_async_batching.errors import UnsupportedModelError

_lock = threading.Lock()


def rescale_as_generate_does(model: PreTrainedModel) -> None:
    """Leave the weights as the model's own next forward in eval mode would leave them, so that no view writes to them.

    Args:
        model: The user's; only one whose forward rescales is changed.

    Raises:
        UnsupportedModelError: It is in training mode, in which its forward takes the rescaling back.
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
            rescale()  # does nothing where it was done before
