"""transformers' own continuous batching, with the fastest settings that work on this machine."""

from __future__ import annotations

import gc
import inspect
import logging
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import transformers
from transformers import GenerationConfig

from hf_async_batching.bench.peer_run import Pass, PeerRun, short
from hf_async_batching.bench.workloads import Workload
from hf_async_batching.core.request import Request
from hf_async_batching.devices.memory import return_memory

logger = logging.getLogger(__name__)

# Attention implementations in the order of the attempts. transformers turns "sdpa" and "eager" into their paged forms.
_ON_CUDA = ("flash_attention_3", "flash_attention_2", "sdpa", "eager")
_ON_CPU = ("sdpa", "eager")

# Tokens per block of its cache; this is its default.
_CPU_BLOCK = 256

# Tokens per step on the CPU, the same as our engine's default there.
_CPU_BATCH_TOKENS = 256


def generate_batch(
    run: PeerRun,
    model: Any,
    make_workload: Callable[[int], Workload],
    repeats: int,
    limit: float,
    *,
    prefix_cache: bool,
) -> list[Pass]:
    """Serve the workload with the first setup that works.

    Each attention implementation is tried asynchronously with CUDA graphs, then with graphs alone, then without both.
    """
    if not hasattr(model, "continuous_batching_context_manager"):
        raise NotImplementedError("this release of transformers has no continuous batching")
    cuda = model.device.type == "cuda"
    original = model.config._attn_implementation
    wishes: list[dict[str, Any]] = [{"use_async_batching": True, "use_cuda_graph": True}, {"use_cuda_graph": True}, {}]
    for attention in _ON_CUDA if cuda else _ON_CPU:
        for wish in wishes if cuda else [{}]:
            settings = {**wish, "auto_switch_to_flash": False, "allow_block_sharing": prefix_cache}
            if not cuda:
                # Its default tables take most of the machine's memory, and filling them once takes minutes.
                workload = make_workload(0)
                settings["num_blocks"] = len(workload.first) * (2 + workload.longest // _CPU_BLOCK)
                settings["max_batch_tokens"] = max(_CPU_BATCH_TOKENS, len(workload.first))
            try:
                model.set_attn_implementation(attention)
                return _batches(run, model, settings, make_workload, repeats, limit)
            except TimeoutError:
                raise
            except Exception as error:
                logger.warning("generate_batch with %s %s failed: %s", attention, wish, short(error))
                run.notes.append(f"{' '.join([attention, *wish])}: {short(error)}")
                model.set_attn_implementation(original)
                # A failed attempt may have left its cache behind.
                gc.collect()
                return_memory(model.device)
                if isinstance(error, ImportError):
                    break
    raise RuntimeError("no attention implementation works: " + "; ".join(run.notes))


def _batches(
    run: PeerRun,
    model: Any,
    wanted: dict[str, Any],
    make_workload: Callable[[int], Workload],
    repeats: int,
    limit: float,
) -> list[Pass]:
    # `generate_batch` has one length for all requests, so this uses the manager that it makes.
    enter = model.continuous_batching_context_manager
    fields: Any = GenerationConfig
    generation = fields(do_sample=False, eos_token_id=-1, pad_token_id=0)
    arguments: dict[str, Any] = {"generation_config": generation, "block": True, "timeout": 30}
    settings: dict[str, Any] = {}
    config_class = getattr(transformers, "ContinuousBatchingConfig", None)
    if config_class is not None and _takes(enter, "continuous_batching_config"):
        settings = {name: value for name, value in wanted.items() if name in config_class.__dataclass_fields__}
        arguments["continuous_batching_config"] = config_class(**settings)
    if _takes(enter, "workload_hints"):
        arguments["workload_hints"] = _hints(make_workload(0))
    with enter(**arguments) as manager:
        run.attention, run.settings = model.config._attn_implementation, settings
        try:
            _converse(manager, make_workload(-2).brief(), limit)
            return [_converse(manager, make_workload(seed), limit) for seed in range(repeats)]
        except BaseException:
            # Leaving the context would wait until all live requests are finished.
            if _takes(manager.stop, "hard_stop"):
                manager.stop(block=True, timeout=60, hard_stop=True)
            raise


def _hints(workload: Workload) -> Any:
    """Make the hints that `generate_batch` gives its manager, so that the manager can size its tables."""
    hints = import_module("transformers.generation.continuous_batching.utils").WorkloadHints
    lengths = workload.lengths()
    return hints(
        max_prompt_length=max(prompt for prompt, _ in lengths),
        max_generated_length=max(new for _, new in lengths),
        num_requests=len(workload.first),
    )


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _converse(manager: Any, workload: Workload, limit: float) -> Pass:
    done, live = Pass(), {}
    stamps = {"record_timestamps": True} if _takes(manager.add_request, "record_timestamps") else {}
    # The manager makes the ids, because ours repeat in every pass.
    own_ids: dict[str, str] = {}

    def add(request: Request) -> None:
        own = manager.add_request(
            list(request.prompt), max_new_tokens=request.max_new_tokens, eos_token_id=-1, **stamps
        )
        if own is None:
            raise RuntimeError("transformers' manager refused the requests")
        own_ids[own] = request.request_id
        live[request.request_id] = request

    started = time.perf_counter()
    for request in workload.first:
        add(request)
    while live:
        output = manager.get_result(timeout=1)
        if time.perf_counter() - started > limit:
            raise TimeoutError(f"stopped after {limit:.0f} s with {len(done.tokens)} requests finished")
        if output is None:
            if not manager.is_running():
                cause = getattr(getattr(manager, "background_thread_status", None), "fatal_error", None)
                raise RuntimeError(f"the thread of transformers' manager ended before its requests: {cause!r}")
            continue
        if not output.is_finished():
            continue
        if output.error is not None:
            raise RuntimeError(str(output.error))
        request = live.pop(own_ids[output.request_id])
        done.tokens[request.request_id] = list(output.generated_tokens)
        if output.timestamps and output.created_time:
            done.first_token_seconds.append(output.timestamps[0] - output.created_time)
        following = workload.after(request, output.generated_tokens)
        if following is not None:
            add(following)
    done.seconds = time.perf_counter() - started
    return done
