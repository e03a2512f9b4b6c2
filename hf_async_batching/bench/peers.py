"""What transformers itself makes of the same work, in the same process: `generate_batch` and padded `generate`."""

from __future__ import annotations

import gc
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from hf_async_batching.bench.measure import Spread
from hf_async_batching.bench.workloads import Workload
from hf_async_batching.memory import return_memory
from hf_async_batching.request import Request

logger = logging.getLogger(__name__)

PEERS = ("generate_batch", "generate")

# Which attention is tried first. transformers turns "sdpa" and "eager" into their paged forms where it needs them.
_ON_CUDA = ("flash_attention_3", "flash_attention_2", "sdpa", "eager")
_ON_CPU = ("sdpa", "eager")

# Tokens per block of its cache, by default.
_CPU_BLOCK = 256


@dataclass(slots=True)
class PeerRun:
    """A peer's run of a workload, or why there is none.

    Attributes:
        name: "generate_batch" or "generate".
        attention: What the model's attention was set to while it ran; None where nothing ran.
        settings: How it was set up.
        notes: What a reader must know of the figure: attempts that failed, tokens that were made for nothing.
        error: Why there is no figure.
        seconds: From the first request to the last token, of the median pass.
        output_tokens: Tokens that were asked for and generated.
        output_tokens_per_second: These over `seconds`.
        total_tokens_per_second: Prompt tokens included.
        first_token_seconds: From a request's arrival to its first token, where the peer tells.
        peak_bytes: Largest memory allocated, everything included; None on the CPU.
        equal_to_first_run: Share of completions that our first run made too, token for token, once they were compared.
        tokens: New tokens by request id; not part of the JSON.
    """

    name: str
    attention: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float | None = None
    output_tokens: int | None = None
    output_tokens_per_second: float | None = None
    total_tokens_per_second: float | None = None
    first_token_seconds: Spread | None = None
    peak_bytes: int | None = None
    equal_to_first_run: float | None = None
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if name != "tokens"}


@dataclass(slots=True)
class _Pass:
    seconds: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    first_token_seconds: list[float] = field(default_factory=list)


def run_peer(
    name: str,
    model: PreTrainedModel,
    make_workload: Callable[[int], Workload],
    *,
    repeats: int = 1,
    limit: float = 300.0,
    prefix_cache: bool = True,
) -> PeerRun:
    """Run a workload with a peer. Whatever goes wrong is part of the answer; the model is afterwards as it was before.

    Args:
        name: One of `PEERS`.
        model: The model; its attention and its generation config are set back in the end.
        make_workload: Makes the workload from a seed of its token ids.
        repeats: Counted passes; the median counts.
        limit: Seconds after which a pass is given up.
        prefix_cache: Whether `generate_batch` may share prefixes.
    """
    run = PeerRun(name)
    gc.collect()
    return_memory(model.device)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with _as_it_was(model):
        try:
            serve = _generate_batch if name == "generate_batch" else _padded_generate
            passes = serve(run, model, make_workload, repeats, limit, prefix_cache)
            workload = make_workload(0)
            for one in passes:
                _check_lengths(one, workload)
            middle = sorted(passes, key=lambda one: one.seconds)[(len(passes) - 1) // 2]
            run.seconds, run.tokens = middle.seconds, passes[0].tokens
            run.output_tokens = sum(map(len, middle.tokens.values()))
            run.output_tokens_per_second = run.output_tokens / middle.seconds
            run.total_tokens_per_second = (run.output_tokens + workload.prompt_tokens) / middle.seconds
            run.first_token_seconds = Spread.of(middle.first_token_seconds)
            if model.device.type == "cuda":
                run.peak_bytes = torch.cuda.max_memory_allocated(model.device)
        except Exception as error:  # a peer that fails is a line of the table
            logger.debug("%s failed", name, exc_info=True)
            run.error = _short(error)
    gc.collect()
    return_memory(model.device)
    return run


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Nothing ends a completion inside; attention and generation config are set back outside."""
    attention, generation = model.config._attn_implementation, model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = generation
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def _check_lengths(one: _Pass, workload: Workload) -> None:
    found = sum(map(len, one.tokens.values()))
    if len(one.tokens) != workload.num_requests or found != workload.new_tokens:
        raise RuntimeError(
            f"{found} tokens of {len(one.tokens)} requests came back, "
            f"not {workload.new_tokens} of {workload.num_requests}"
        )


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


# -- transformers' own continuous batching ------------------------------------------------------------------------


def _generate_batch(
    run: PeerRun,
    model: Any,
    make_workload: Callable[[int], Workload],
    repeats: int,
    limit: float,
    prefix_cache: bool,
) -> list[_Pass]:
    """The best way that works: attention by attention, first asynchronous and with CUDA graphs, then without."""
    if not hasattr(model, "continuous_batching_context_manager"):
        raise NotImplementedError("this release of transformers has no continuous batching")
    cuda = model.device.type == "cuda"
    original = model.config._attn_implementation
    wishes: list[dict[str, Any]] = [{"use_async_batching": True, "use_cuda_graph": True}, {"use_cuda_graph": True}, {}]
    for attention in _ON_CUDA if cuda else _ON_CPU:
        for wish in wishes if cuda else [{}]:
            settings = {**wish, "auto_switch_to_flash": False, "allow_block_sharing": prefix_cache}
            if not cuda:
                # Its share of the memory would be most of the machine's, and all of it is written first.
                workload = make_workload(0)
                settings["num_blocks"] = len(workload.first) * (2 + workload.longest // _CPU_BLOCK)
            try:
                model.set_attn_implementation(attention)
                return _batches(run, model, settings, make_workload, repeats, limit)
            except TimeoutError:
                raise
            except Exception as error:
                logger.debug("%s with %s failed", attention, wish, exc_info=True)
                run.notes.append(f"{' '.join([attention, *wish])}: {_short(error)}")
                model.set_attn_implementation(original)
                # What failed may have left its cache behind.
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
) -> list[_Pass]:
    # Not through `generate_batch` itself, which has one length for all, but through the manager that it makes.
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
            # Leaving the context would let it finish what is live first.
            if _takes(manager.stop, "hard_stop"):
                manager.stop(block=True, timeout=60, hard_stop=True)
            raise


def _hints(workload: Workload) -> Any:
    """What `generate_batch` tells its manager of the work, so that it can size its tables."""
    hints = import_module("transformers.generation.continuous_batching.utils").WorkloadHints
    lengths = workload.lengths()
    return hints(
        max_prompt_length=max(prompt for prompt, _ in lengths),
        max_generated_length=max(new for _, new in lengths),
        num_requests=len(workload.first),
    )


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _converse(manager: Any, workload: Workload, limit: float) -> _Pass:
    done, live = _Pass(), {}
    stamps = {"record_timestamps": True} if _takes(manager.add_request, "record_timestamps") else {}
    # The manager makes up ids: ours come again in every pass.
    own_ids: dict[str, str] = {}

    def add(request: Request) -> None:
        own = manager.add_request(
            list(request.prompt), max_new_tokens=request.max_new_tokens, eos_token_id=-1, **stamps
        )
        if own is None:
            raise RuntimeError("the manager takes no requests")
        own_ids[own] = request.request_id
        live[request.request_id] = request

    started = time.perf_counter()
    for request in workload.first:
        add(request)
    while live:
        output = manager.get_result(timeout=1)
        if time.perf_counter() - started > limit:
            raise TimeoutError(f"given up after {limit:.0f} s with {len(done.tokens)} requests done")
        if output is None:
            if not manager.is_running():
                cause = getattr(getattr(manager, "background_thread_status", None), "fatal_error", None)
                raise RuntimeError(f"the manager's thread ended before its requests did: {cause!r}")
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


# -- plain generate -----------------------------------------------------------------------------------------------


def _padded_generate(
    run: PeerRun,
    model: Any,
    make_workload: Callable[[int], Workload],
    repeats: int,
    limit: float,
    prefix_cache: bool,  # noqa: ARG001 - it has none
) -> list[_Pass]:
    """One left-padded batch per turn, or as many rows at once as fit."""
    workload = make_workload(0)
    run.attention = model.config._attn_implementation
    if any(len({new for _, new in wave}) > 1 for wave in _waves(workload)):
        run.notes.append("every row runs as long as the longest of its batch; only tokens that were asked for count")
    rows = len(workload.first)
    _padded(model, list(make_workload(-2).brief().first[: min(rows, 4)]), time.perf_counter() + limit)
    while True:
        try:
            passes = [_in_batches(model, make_workload(seed), rows, limit) for seed in range(repeats)]
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            run.notes.append(f"out of memory with {rows} rows")
            rows = -(-rows // 2)
            gc.collect()
            return_memory(model.device)
            continue
        run.settings = {"rows": rows}
        return passes


def _waves(workload: Workload) -> list[list[tuple[int, int]]]:
    """Lengths (prompt, new) turn by turn."""
    per_user, users = workload.lengths(), len(workload.first)
    turns = len(per_user) // users
    return [[per_user[user * turns + turn] for user in range(users)] for turn in range(turns)]


def _in_batches(model: Any, workload: Workload, rows: int, limit: float) -> _Pass:
    done = _Pass()
    started = time.perf_counter()
    wave = list(workload.first)
    while wave:
        for start in range(0, len(wave), rows):
            done.tokens.update(_padded(model, wave[start : start + rows], started + limit))
        following = [workload.after(request, done.tokens[request.request_id]) for request in wave]
        wave = [request for request in following if request is not None]
    done.seconds = time.perf_counter() - started
    return done


def _padded(model: Any, requests: list[Request], deadline: float) -> dict[str, list[int]]:
    width = max(len(request.prompt) for request in requests)
    longest = max(request.max_new_tokens for request in requests)
    padded = [[0] * (width - len(request.prompt)) + list(request.prompt) for request in requests]
    real = [[0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in requests]
    left = deadline - time.perf_counter()
    out = model.generate(
        torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(real, device=model.device),
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=0,
        max_time=max(left, 0.001),
    )
    rows = out[:, width:].tolist()
    if len(rows[0]) < longest:
        raise TimeoutError(f"given up at the time limit after {len(rows[0])} of {longest} tokens")
    return {request.request_id: row[: request.max_new_tokens] for request, row in zip(requests, rows, strict=True)}
