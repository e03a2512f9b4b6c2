"""Builds an engine for a model: view, cache, tables, streams; and checks it against the model's plain forward."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_async_batching.config import BatchingConfig
from hf_async_batching.core.graph_buckets import largest_padding
from hf_async_batching.core.row_layout import HISTORY_START, MAX_PADDING
from hf_async_batching.core.step_layout import NO_PADDING, Sections
from hf_async_batching.devices.memory import free_memory, return_memory
from hf_async_batching.devices.select import make_device
from hf_async_batching.distributed.agreed_captures import with_agreed_captures
from hf_async_batching.distributed.rank_group import RankGroup
from hf_async_batching.engine.engine import Engine
from hf_async_batching.engine.route import choose_route
from hf_async_batching.engine.sizing import ResolvedConfig, resolve_config
from hf_async_batching.kv_cache.layer_groups import group_layers
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.view.model_view import batch_dependent_rope, context_length, rope_limit
from hf_async_batching.model.view.module_calls import runs_user_code
from hf_async_batching.runner.leading_pipeline import LeadingPipeline
from hf_async_batching.runner.model_runner import ModelRunner
from hf_async_batching.runner.pipeline import Pipeline
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.runtime.autocast import Autocast
from hf_async_batching.scheduler.prompt_lookup import MAX_DRAFTED
from hf_async_batching.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class EngineParts:
    """An engine and what its manager wants to know of it.

    Attributes:
        view: The model as it was when the engine was made, in a view that nobody else uses, whose generation config
            is the check's; None where the model was not checked, or is not compiled.
        rope_limit: Tokens of a request beyond which the model's rotary frequencies are others, for all rows of a
            batch; None where there is no such length.
    """

    engine: Engine
    config: ResolvedConfig
    forward: PackedForward | CacheForward
    runner: ModelRunner
    cache: PagedCache
    autocast: Autocast
    view: PreTrainedModel | None
    rope_limit: int | None = None


@torch.inference_mode()
def build_engine(model: PreTrainedModel, config: BatchingConfig, group: RankGroup | None = None) -> EngineParts:
    """Make an engine that is ready to serve, whose forward runs under the calling thread's autocast.

    Args:
        model: The user's model; not changed.
        config: Settings.
        group: The ranks over which the model is spread, which all do this at the same time.

    Raises:
        UnsupportedModelError: The model cannot be served, or its outputs would not be right.
        ValueError: The KV cache does not fit in memory.
    """
    forward, backend, view = choose_route(model, config)
    if runs_user_code(forward.view):
        # It may read values that change between calls: nothing of what it computed is kept.
        config = replace(config, compile=False, cuda_graphs=False, prefix_cache=False)
        logger.info("compile, cuda_graphs, prefix_cache = False (hooks that are marked by `per_token`)")
    device = make_device(forward.device)
    context = context_length(model)
    bounded = batch_dependent_rope(model) or not getattr(model.config.get_text_config(), "rope_parameters", None)
    if bounded and context is not None and (config.max_sequence_length or 0) > context:
        raise ValueError(
            f"`max_sequence_length` ({config.max_sequence_length}) is beyond the {context} tokens that "
            f"{forward.name}'s positions reach; lower it"
        )
    if not forward.recomputes and config.num_pages is not None:
        # It has no pages to save: with as many as its rows can use, none is ever asked to give up some.
        logger.info("num_pages = automatic (%s is computed row by row)", forward.name)
        config = replace(config, num_pages=None)
    if isinstance(forward, PackedForward) and forward.packed_groups:
        # Torch keeps the memory that the weights had before, in pieces too small for the cache: gigabytes, until
        # nothing else is left.
        return_memory(forward.device)
    free = free_memory(forward.device)
    if group is not None:
        free = group.least(free)  # rows and pages have the same numbers on all ranks
    # Other routes hand a model one table for all of its layers.
    longest = config.max_sequence_length or context
    groups = group_layers(forward.layers, isinstance(forward, PackedForward), longest)
    resolved = resolve_config(
        config, forward.layers, context, forward.device, free, forward.weight_bytes, forward.state_bytes, groups
    )
    cache = PagedCache(
        forward.layers,
        num_pages=resolved.num_pages,
        page_size=resolved.page_size,
        device=forward.device,
        groups=groups,
    )
    forward.bind(cache, backend)
    # A row goes on from any of its tokens where these are what it has; a state that goes on with them is not.
    drafted = MAX_DRAFTED if isinstance(forward, PackedForward) else 0
    max_samples = resolved.max_rows + drafted
    largest = NO_PADDING
    # Of several ranks all must capture a step or none, but each would count the memory of its own graphs.
    if isinstance(forward, PackedForward) and group is None:
        largest = largest_padding(resolved.max_batch_tokens, resolved.max_rows, max_samples, forward.weight_bytes)
    state = RowTables(
        max_rows=resolved.max_rows,
        max_pages_per_row=resolved.pages_per_row,
        device=forward.device,
        max_length=resolved.max_sequence_length,
        vocab_size=max(forward.vocab_size, forward.logit_size),
        max_samples=max_samples,
        padding=largest,
        groups=groups.count,
    )
    # Rotary frequencies that follow the longest sequence are compared on the host, which no graph can do.
    graphs = (
        config.cuda_graphs is not False
        and forward.capturable
        and device.supports_graphs
        and not backend.reads_back
        and not batch_dependent_rope(model)
    )
    autocast = Autocast.of_this_thread(forward.device.type)
    runner = ModelRunner(
        forward,
        state,
        device if group is None else with_agreed_captures(device, group),
        max_rows=resolved.max_rows,
        largest=largest,
        spread=config.admission == "longest_first",
        graphs=graphs,
        autocast=autocast,
    )
    # As much as one row can need: its rules, padding, and all of its tokens if their pages were found.
    max_writes = HISTORY_START + MAX_PADDING + resolved.max_sequence_length
    limits = Sections.largest(
        max_rows=resolved.max_rows,
        max_batch_tokens=max(resolved.max_batch_tokens, largest.tokens),
        num_pages=resolved.num_pages,
        writes=max_writes,
        drafted=max(drafted, largest.sections.samples - resolved.max_rows),
    )
    make_pipeline = partial(LeadingPipeline, group) if group is not None and group.leads else Pipeline
    pipeline = make_pipeline(
        device,
        state,
        runner,
        depth=resolved.depth,
        limits=limits,
        tile_size=forward.tile_size or backend.tile_size,
        logit_size=forward.logit_size,
    )
    scheduler = Scheduler(
        num_pages=resolved.num_pages,
        page_size=resolved.page_size,
        max_rows=resolved.max_rows,
        max_batch_tokens=resolved.max_batch_tokens,
        prefix_cache=config.prefix_cache and forward.prefix_cacheable,
        max_writes=max_writes,
        window=groups.window,
        groups=groups.count,
        kept=groups.kept,
        draft_rows=config.prompt_lookup_rows if drafted else 0,
        admission=config.admission,
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
    if not (isinstance(forward, PackedForward) and resolved.settings.compile):
        view = None
    return EngineParts(engine, resolved, forward, runner, cache, autocast, view, rope_limit(model))
