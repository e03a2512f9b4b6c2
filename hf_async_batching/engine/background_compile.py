"""Compiles for an engine that serves already, in a thread of its own."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import suppress

import torch
from transformers import PreTrainedModel

from hf_async_batching.engine.builder import Assembly, compile_for
from hf_async_batching.model.view.model_view import make_view
from hf_async_batching.runtime.process_exit import ProcessEndsError, end_with_the_process

# Seconds for which compiling waits for a first step, which may not come.
_FIRST_STEP = 1.0


class Preparation:
    """Compiles behind the first token, which it would hold up, or after a second without one.

    The engine changes over by itself when that is done.

    Args:
        model: The engine's model.
        assembly: The engine, which this does not keep alive.
        first_step: Set when a request has its first token, or when nobody waits for one.

    Attributes:
        done: Set when the compiled forward was handed over, could not be made, or the process ends.
    """

    def __init__(self, model: PreTrainedModel, assembly: Assembly, first_step: threading.Event) -> None:
        self.done = threading.Event()
        # A view of its own: what the caller switches later (adapters, modules) is for the next engine.
        view = assembly.view if assembly.view is not None else make_view(model, None)
        thread = threading.Thread(
            target=self._run,
            args=(view, weakref.ref(assembly), first_step),
            name="hf_async_batching_compile",
            daemon=False,
        )
        thread.start()
        end_with_the_process(thread, self.done)

    def _run(self, model: PreTrainedModel, assembly: weakref.ref[Assembly], first_step: threading.Event) -> None:
        with suppress(ProcessEndsError):
            try:
                first_step.wait(_FIRST_STEP)
                # The compiled code is for inference mode only, which threads do not inherit.
                with torch.inference_mode():
                    device = next(model.parameters()).device
                    if device.type == "cuda":
                        torch.cuda.set_device(device)
                    compile_for(model, assembly)
                # A compiler leaves so many objects that a full collection is due. It stops every thread for 0.4 s:
                # better now than in the middle of serving.
                gc.collect()
            finally:
                self.done.set()
