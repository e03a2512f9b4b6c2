"""Compiles an engine's forward in a thread of its own, while the engine already serves."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from contextlib import suppress

import torch
from transformers import PreTrainedModel

from hf_async_batching.attention.base import AttentionBackend
from hf_async_batching.attention.select import make_backend
from hf_async_batching.checks.parity_check import compile_checked
from hf_async_batching.devices.pdl import supports_pdl
from hf_async_batching.engine.builder import EngineParts
from hf_async_batching.engine.sizing import ResolvedConfig
from hf_async_batching.model.compile.regions import UnsafePdlError
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.view.model_view import make_view
from hf_async_batching.runtime.process_exit import ProcessEndsError, end_with_the_process, process_ends

logger = logging.getLogger(__name__)

# Seconds for which compiling waits for a first step, which may not come.
_FIRST_STEP = 1.0


class BackgroundCompile:
    """Compiles after the first token, or after one second without a token, and then hands the result to the engine.

    Args:
        model: The engine's model.
        parts: The engine. A `BackgroundCompile` does not keep it alive.
        first_step: Set when a request has its first token, or when no caller waits for one.

    Attributes:
        done: Set when the engine has the compiled forward, when there will be none, or when the process ends.
    """

    def __init__(self, model: PreTrainedModel, parts: EngineParts, first_step: threading.Event) -> None:
        self.done = threading.Event()
        # The thread needs a view of its own: what the caller changes later (adapters, modules) is for the next engine.
        view = parts.view if parts.view is not None else make_view(model, None)
        thread = threading.Thread(
            target=self._run,
            args=(view, weakref.ref(parts), first_step),
            name="hf_async_batching_compile",
            daemon=False,
        )
        thread.start()
        end_with_the_process(thread, self.done)

    def _run(self, view: PreTrainedModel, parts: weakref.ref[EngineParts], first_step: threading.Event) -> None:
        with suppress(ProcessEndsError):
            try:
                first_step.wait(_FIRST_STEP)
                # The compiled code is for inference mode only, which threads do not inherit.
                with torch.inference_mode():
                    device = next(view.parameters()).device
                    if device.type == "cuda":
                        torch.cuda.set_device(device)
                    compile_for(view, parts)
                # The compiler leaves so many objects that a full collection is due. A collection stops every thread
                # for 0.4 s, so it runs now and not in the middle of serving.
                gc.collect()
            finally:
                self.done.set()


def compile_for(view: PreTrainedModel, parts: weakref.ref[EngineParts]) -> bool:
    """Compile a second forward for a running engine, and hand it over.

    The compilation itself uses nothing of the engine, and does not keep it alive.

    Args:
        view: A view of the engine's model, which the compiled forward takes over.
        parts: The engine, if it still runs.

    Returns:
        Whether the engine got a compiled forward.
    """
    running = parts()
    if running is None or not isinstance(running.forward, PackedForward):
        return False
    served, config, autocast = running.forward, running.config, running.autocast
    batches = [*running.runner.buckets]
    began = time.perf_counter()
    try:
        forward = served.on_view(view)  # without the engine's pages
        fused = served.packed_groups is not None
        del running, served
        with autocast():
            if fused:
                forward.fuse()
            backend = _compile(forward, config)
        backend.ready(forward.layers, page_size=config.page_size, batches=batches)
    except Exception as error:  # compilers fail in many ways, and the engine serves without
        # When a process ends, Python shuts down the executors first, and compilers use executors.
        if process_ends() or "interpreter shutdown" in str(error):
            return False
        logger.warning("%s runs uncompiled: %s", type(view).__name__, error)
        logger.debug("compiling failed", exc_info=True)
        return False
    running = parts()
    if running is None:
        return False
    forward.bind(running.cache, backend)
    running.runner.offer(forward)
    logger.info("compiled %s in %.1f s", forward.name, time.perf_counter() - began)
    return True


def _compile(forward: PackedForward, config: ResolvedConfig) -> AttentionBackend:
    """Compile, with programmatic dependent launch where the device and the generated code allow it.

    Returns:
        Attention kernels of the forward's own: it runs beside the engine's steps, whose kernels have scratch memory.
    """
    for pdl in (True, False) if supports_pdl(forward.device) else (False,):
        backend = make_backend(config.settings.attention_backend, forward.device)
        try:
            compile_checked(forward, backend, page_size=config.page_size, pdl=pdl)
        except UnsafePdlError as error:
            logger.info("%s is compiled again without programmatic dependent launch: %s", forward.name, error)
            forward.uncompile()
            continue
        return backend
    raise AssertionError("compiling without programmatic dependent launch raises no UnsafePdlError")
