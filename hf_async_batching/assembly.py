"""Builds an engine for a model: view, cache, tables, streams; and checks it against the model's plain forward."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_async_batching.attach_check import attach_check
from hf_async_batching.attention.backend import make_backend
from hf_async_batching.attention.cache import PagedCache
from hf_async_batching.config import BatchingConfig, ResolvedConfig
from hf_async_batching.device_state import DeviceState
from hf_async_batching.devices import make_device
from hf_async_batching.engine import Engine
from hf_async_batching.memory import free_memory
from hf_async_batching.model_forward import ModelForward
from hf_async_batching.model_view import batch_dependent_rope, context_length
from hf_async_batching.pipeline import Pipeline
from hf_async_batching.runner import Runner
from hf_async_batching.scheduler import Scheduler
from hf_async_batching.staging import Sections

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assembly:
    """An engine and what its manager wants to know of it."""

    engine: Engine
    config: ResolvedConfig
    forward: ModelForward
    runner: Runner
    cache: PagedCache


@torch.inference_mode()
def assemble(model: PreTrainedModel, config: BatchingConfig) -> Assembly:
    """Make an engine that is ready to serve.

    Args:
        model: The user's model; not changed.
        config: Settings.

    Raises:
        UnsupportedModelError: The model cannot be served, or its outputs would not be right.
        ValueError: The KV cache does not fit in memory.
    """
    forward = ModelForward(model)
    device = make_device(forward.device)
    backend = make_backend(config.attention_backend, forward.device)
    if config.attach_check:
        attach_check(model, forward, backend)
    context = context_length(model)
    bounded = batch_dependent_rope(model) or not getattr(model.config.get_text_config(), "rope_parameters", None)
    if bounded and context is not None and (config.max_sequence_length or 0) > context:
        raise ValueError(
            f"`max_sequence_length` ({config.max_sequence_length}) is beyond the {context} tokens that "
            f"{forward.name}'s positions reach; lower it"
        )
    resolved = config.resolve(forward.layers, context, forward.device, free_memory(forward.device))
    cache = PagedCache(
        forward.layers, num_pages=resolved.num_pages, page_size=resolved.page_size, device=forward.device
    )
    forward.bind(cache, backend)
    state = DeviceState(max_rows=resolved.max_rows, max_pages_per_row=resolved.pages_per_row, device=forward.device)
    # Rotary frequencies that follow the longest sequence are compared on the host, which no graph can do.
    graphs = (
        config.cuda_graphs and device.supports_graphs and not backend.reads_back and not batch_dependent_rope(model)
    )
    runner = Runner(forward, state, device, max_rows=resolved.max_rows, graphs=graphs)
    limits = Sections.largest(
        max_rows=resolved.max_rows, max_batch_tokens=resolved.max_batch_tokens, num_pages=resolved.num_pages
    )
    pipeline = Pipeline(device, state, runner, depth=resolved.depth, limits=limits, tile_size=backend.tile_size)
    scheduler = Scheduler(
        num_pages=resolved.num_pages,
        page_size=resolved.page_size,
        max_rows=resolved.max_rows,
        max_batch_tokens=resolved.max_batch_tokens,
        prefix_cache=config.prefix_cache,
    )
    engine = Engine(
        scheduler,
        pipeline,
        device,
        depth=resolved.depth,
        timeline_steps=config.timeline_steps,
        debug=config.debug,
    )
    logger.info("serving %s on %s: %s", forward.name, forward.device, resolved)
    return Assembly(engine, resolved, forward, runner, cache)
