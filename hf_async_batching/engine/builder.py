"""Builds an engine for a model: its forward, its sizes, and then one part after the other."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_async_batching.config import BatchingConfig
from hf_async_batching.devices.base import Device
from hf_async_batching.devices.memory import free_memory, return_memory
from hf_async_batching.devices.select import make_device
from hf_async_batching.distributed.agreed_captures import with_agreed_captures
from hf_async_batching.distributed.rank_group import RankGroup
from hf_async_batching.engine.engine import Engine
from hf_async_batching.engine.route import Route, RouteHint, choose_route
from hf_async_batching.engine.sizing import EngineSizes, ResolvedConfig, size_engine
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.kv_cache.state_tables import StateTables
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.small.length_thresholds import makes_choices
from hf_async_batching.model.view.model_view import batch_dependent_rope, context_length, rope_limit
from hf_async_batching.model.view.module_calls import runs_user_code
from hf_async_batching.runner.leading_pipeline import LeadingPipeline
from hf_async_batching.runner.model_runner import ModelRunner
from hf_async_batching.runner.pipeline import Pipeline
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.runtime.autocast import Autocast
from hf_async_batching.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class EngineParts:
    """An engine and its parts.

    Attributes:
        engine: The engine.
        config: Its settings, with the automatic fields filled.
        forward: The forward that its steps run.
        runner: Runs the forward, or graphs of it.
        cache: The KV cache.
        autocast: The autocast state under which steps run.
        view: A view of the model as it was when the engine was made, for compiling. No other part uses it, and its
            generation config is that of the parity check. None if the model was not checked, or is not compiled.
        rope_limit: Tokens of a request beyond which the model's rotary frequencies change for all rows of a batch;
            None if there is no such length.
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
def build_engine(
    model: PreTrainedModel, config: BatchingConfig, group: RankGroup | None = None, hint: RouteHint | None = None
) -> EngineParts:
    """Make an engine that is ready to serve, whose forward runs under the calling thread's autocast.

    Args:
        model: The user's model; not changed.
        config: Settings.
        group: The ranks over which the model is spread, which all do this at the same time.
        hint: What `check_servable` has found; used up.

    Raises:
        UnsupportedModelError: The model cannot be served, or its outputs would not be right.
        ValueError: The KV cache does not fit in memory.
    """
    route = choose_route(model, config, hint)
    forward = route.forward
    config = _fitted_config(config, model, forward)
    device = make_device(forward.device)
    autocast = Autocast.of_this_thread(forward.device.type)
    sizes = size_engine(config, forward, context_length(model), _free_bytes(forward, group), padded=group is None)
    compiles = isinstance(forward, PackedForward) and forward.compilable and sizes.config.settings.compile
    # The padding row's token would ask for experts of its own.
    least_rows = 2 if compiles and not makes_choices(model.config) else 1
    cache = _bound_cache(route, sizes)
    tables = _row_tables(forward, sizes, least_rows)
    states = _states(route, cache, sizes, tables)
    runner = ModelRunner(
        forward,
        tables,
        device if group is None else with_agreed_captures(device, group),
        max_rows=sizes.config.max_rows,
        largest=sizes.padding,
        least_rows=least_rows,
        spread=config.admission == "longest_first",
        graphs=_captures(config, model, route, device),
        autocast=autocast,
        states=states,
    )
    pipeline = _pipeline(route, sizes, tables, runner, device, group)
    scheduler = _scheduler(config, forward, sizes, with_states=states is not None)
    engine = Engine(
        scheduler,
        pipeline,
        device,
        depth=sizes.config.depth,
        timeline_steps=config.timeline_steps,
        debug=config.debug,
    )
    logger.info("serving %s on %s: %s", forward.name, forward.device, sizes.config)
    view = route.view if compiles else None
    return EngineParts(engine, sizes.config, forward, runner, cache, autocast, view, rope_limit(model))


def _fitted_config(
    config: BatchingConfig, model: PreTrainedModel, forward: PackedForward | CacheForward
) -> BatchingConfig:
    """The settings without those that a model or its route does not bear.

    Raises:
        ValueError: `max_sequence_length` is beyond the model's positions.
    """
    if runs_user_code(forward.view):
        # A user's code may read values that change between calls: nothing that it computed is kept.
        config = replace(config, compile=False, cuda_graphs=False, prefix_cache=False)
        logger.info("compile, cuda_graphs, prefix_cache = False (hooks that are marked by `per_token`)")
    context = context_length(model)
    bounded = batch_dependent_rope(model) or not getattr(model.config.get_text_config(), "rope_parameters", None)
    if bounded and context is not None and (config.max_sequence_length or 0) > context:
        raise ValueError(
            f"`max_sequence_length` ({config.max_sequence_length}) is beyond the {context} tokens that "
            f"{forward.name}'s positions reach; lower it"
        )
    if not forward.recomputes and config.num_pages is not None:
        # The row-by-row route has no pages to save. With as many as its rows can use, no row is asked to give up some.
        logger.info("num_pages = automatic (%s is computed row by row)", forward.name)
        config = replace(config, num_pages=None)
    return config


def _free_bytes(forward: PackedForward | CacheForward, group: RankGroup | None) -> int:
    """Free memory on the device; of several ranks the least, since rows and pages have the same numbers on all."""
    if isinstance(forward, PackedForward) and forward.packed_groups:
        # Torch keeps the memory that the weights had before, in pieces too small for the cache: gigabytes, until
        # nothing else is left.
        return_memory(forward.device)
    free = free_memory(forward.device)
    return free if group is None else group.least(free)


def _bound_cache(route: Route, sizes: EngineSizes) -> PagedCache:
    cache = PagedCache(
        route.forward.layers,
        num_pages=sizes.config.num_pages,
        page_size=sizes.config.page_size,
        device=route.forward.device,
        groups=sizes.groups,
    )
    route.forward.bind(cache, route.backend)
    return cache


def _states(route: Route, cache: PagedCache, sizes: EngineSizes, tables: RowTables) -> StateTables | None:
    if not isinstance(route.forward, PackedForward) or not route.forward.states:
        return None
    return cache.states(tables.page_table.shape[-2], route.forward.states, sizes.config.num_snapshots)


def _row_tables(forward: PackedForward | CacheForward, sizes: EngineSizes, least_rows: int) -> RowTables:
    return RowTables(
        max_rows=max(sizes.config.max_rows, least_rows),
        max_pages_per_row=sizes.config.pages_per_row,
        device=forward.device,
        max_length=sizes.config.max_sequence_length,
        vocab_size=max(forward.vocab_size, forward.logit_size),
        max_samples=sizes.max_samples,
        padding=sizes.padding,
        groups=sizes.groups.count,
        position_dims=forward.position_dims,
    )


def _captures(config: BatchingConfig, model: PreTrainedModel, route: Route, device: Device) -> bool:
    """Whether steps are captured as graphs."""
    return (
        config.cuda_graphs is not False
        and route.forward.capturable
        and device.supports_graphs
        and not route.backend.reads_back
        # Rotary frequencies that follow the longest sequence are compared on the host, which no graph can do.
        and not batch_dependent_rope(model)
    )


def _pipeline(
    route: Route, sizes: EngineSizes, tables: RowTables, runner: ModelRunner, device: Device, group: RankGroup | None
) -> Pipeline:
    make_pipeline = partial(LeadingPipeline, group) if group is not None and group.leads else Pipeline
    return make_pipeline(
        device,
        tables,
        runner,
        depth=sizes.config.depth,
        limits=sizes.limits,
        tile_size=route.forward.tile_size or route.backend.tile_size,
        logit_size=route.forward.logit_size,
    )


def _scheduler(
    config: BatchingConfig, forward: PackedForward | CacheForward, sizes: EngineSizes, *, with_states: bool
) -> Scheduler:
    return Scheduler(
        num_pages=sizes.config.num_pages,
        page_size=sizes.config.page_size,
        max_rows=sizes.config.max_rows,
        max_batch_tokens=sizes.config.max_batch_tokens,
        prefix_cache=config.prefix_cache and forward.prefix_cacheable,
        snapshots=sizes.config.num_snapshots if with_states else None,
        max_writes=sizes.max_writes,
        window=sizes.groups.window,
        groups=sizes.groups.count,
        full_attention_groups=sizes.groups.full_attention_groups,
        draft_rows=config.prompt_lookup_rows if sizes.drafted else 0,
        admission=config.admission,
    )
