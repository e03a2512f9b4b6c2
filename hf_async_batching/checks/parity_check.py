"""Compare short prompts, computed together, in chunks and joined late, with plain `generate` of each prompt alone.

A batching engine gives wrong answers if a model silently does something else than the engine assumes. This check finds
such mismatches before the first request is served.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_async_batching.attention.base import AttentionBackend, DecodeContext
from hf_async_batching.checks.logits_tolerance import logits_tolerance
from hf_async_batching.checks.reference_attention import FlashFirst
from hf_async_batching.checks.reference_logits import Expected, Prompts, prompts_for, reference_logits
from hf_async_batching.core.plan import Chunk, NewPage, NewRow, Plan
from hf_async_batching.core.request import Request
from hf_async_batching.core.step_layout import Sections
from hf_async_batching.devices.failure import device_failure, ends_the_search
from hf_async_batching.devices.parallel import run_parallel
from hf_async_batching.errors import LogitsDifferError, UnsupportedModelError, does_not_fit
from hf_async_batching.kv_cache.paged_cache import PagedCache
from hf_async_batching.linear.rounding import relative_error
from hf_async_batching.model.compile.regions import EXAMPLE_TOKENS, UnsafePdlError, share_of_equal_tokens
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.generate_loop import prepare_view
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.forward.step_inputs import StepInputs
from hf_async_batching.model.small.length_thresholds import makes_choices
from hf_async_batching.model.view.model_view import make_view
from hf_async_batching.model.view.module_calls import runs_user_code
from hf_async_batching.model.view.parallel_modules import parallel_modules
from hf_async_batching.model.view.quantization import is_quantized
from hf_async_batching.recurrent.step import frozen
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.runner.staging import encode
from hf_async_batching.runtime.triton_start import after_compiler_start
from hf_async_batching.sampling.argmax import argmax

logger = logging.getLogger(__name__)

# Lower bound of the measured noise, as a relative norm: two results can agree by chance.
_LEAST_NOISE = 5e-3
# Share of tokens on which compiled layers must agree with uncompiled ones: a router may choose other experts for some.
_LEAST_ALIKE = 0.6
# Tokens of the first of two rows in the example that is compiled with.
_EXAMPLE_ROW = 21


@torch.inference_mode()
def check_parity(
    model: PreTrainedModel,
    forward: PackedForward | CacheForward,
    backend: AttentionBackend,
    page_size: int = 16,
    prompts: Prompts | None = None,
) -> PreTrainedModel:
    """Compare a forward's logits with the logits of plain `generate`, on tables and pages of its own.

    Args:
        model: The user's model; the check makes a second view of it for `generate`.
        forward: The forward; it stays bound to the check's pages.
        backend: The attention kernels.
        page_size: Page size of the engine, for which the kernels are compiled.
        prompts: Prompts to use instead of the default ones; `generate` then computes each token of them step by step.

    Returns:
        The second view: the model as it was checked.

    Raises:
        LogitsDifferError: The logits differ by more than rounding can explain.
        UnsupportedModelError: A step fails.
        DeviceFailedError: The device fails.
    """
    vocab = forward.vocab_size
    few = prompts is None
    prompts = prompts_for(model, vocab) if prompts is None else prompts
    views: list[PreTrainedModel] = []
    expected: list[Expected] = []
    got: dict[str, torch.Tensor] = {}
    steps: list[str] = []

    in_turn = not isinstance(forward, PackedForward) or not _bears_threads(forward.view)
    plain_ended = threading.Event()

    def run_plain() -> None:
        try:
            steps.append("plain forwards")
            # flash-linear-attention multiplies float32 in TensorFloat-32, by more than the tolerance of float32.
            stateful = isinstance(forward, PackedForward) and bool(forward.states)
            view = make_view(model, None, reference_kernels=stateful)
            views.append(view)
            prepare_view(view)
            # Other routes use the same kernels as `generate`, so their comparison is stricter and keeps these kernels.
            with FlashFirst() if isinstance(forward, PackedForward) else nullcontext():
                expected.append(reference_logits(view, forward, prompts, few))
        finally:
            plain_ended.set()

    def run_engine() -> None:
        if isinstance(forward, PackedForward):
            kernels: list[Callable[[], object]] = [
                lambda: backend.ready(forward.layers, page_size=page_size, batches=(1, len(prompts))),
                lambda: RowTables(max_rows=2, max_pages_per_row=1, device=forward.device).ready(),
                lambda: argmax(torch.zeros(2, vocab, dtype=forward.dtype, device=forward.device)),
            ]
            run_parallel([after_compiler_start(kernel) for kernel in kernels], forward.device)
        if in_turn:
            plain_ended.wait()
        got.update(_engine_logits(forward, backend, page_size, prompts, steps))

    try:
        # Both take seconds in a fresh process: the plain side loads libraries, the engine side compiles kernels.
        run_parallel([run_plain, run_engine], forward.device)
    except LogitsDifferError:
        raise
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{forward.name} is not served: {_bare(forward, error)}") from error
    except Exception as error:
        if ends_the_search(error, forward.device):
            step = f"the parity check ({'; '.join(steps)})"
            raise device_failure(error, forward.name, forward.route, step, forward.device) from error
        if not does_not_fit(error):
            raise
        raise UnsupportedModelError(
            f"{forward.name} is not served: as {forward.route} its forward fails with {type(error).__name__}: {error}"
        ) from error
    (plain,) = expected
    tolerance = logits_tolerance(forward)
    if isinstance(forward, CacheForward) and forward.recomputes:
        # These routes use the same kernels as `generate`, so only the order of sums may differ. A larger difference is
        # a wrong position or mask, which the tolerance of 16-bit numbers must not hide.
        tolerance = min(tolerance, max(_LEAST_NOISE, 4 * plain.noise))
    for label, want in plain.logits.items():
        if label not in got:
            continue
        difference = relative_error(got[label], want)
        if not difference <= tolerance:
            raise LogitsDifferError(
                f"{forward.name} is not served: its logits for {label} differ from plain `generate`'s by "
                f"{difference:.2g} (relative norm, {forward.dtype}). Load it with attn_implementation='eager' if its "
                "own attention ignores an option (some releases of transformers drop soft caps under 'sdpa'), or "
                "use plain `model.generate`. Please report this model with its config.",
                f"its logits for {label} differ by {difference:.2g} in {forward.dtype}",
                finite=math.isfinite(difference),
            )
    return views[0]


def _bears_threads(view: PreTrainedModel) -> bool:
    """Whether two threads may run forwards of a model at the same time.

    On the device the forwards do not overlap: all threads enqueue on one stream, so layers use scratch memory in
    order.
    """
    if runs_user_code(view):
        return False  # its forward may have been replaced
    if parallel_modules(view):
        return False  # collectives must run in the same order on each rank
    # Kernels of quantized layers and of other packages may use Triton's autotuner, which fails if two threads meet a
    # new shape at once: https://github.com/triton-lang/triton/issues/11494
    ours = "transformers.models.", "transformers.activations", "torch.nn.modules.", "hf_async_batching."
    return not is_quantized(view) and all(_written_in(module).startswith(ours) for module in view.modules())


def _written_in(module: torch.nn.Module) -> str:
    """The Python module that defines a layer's forward."""
    return str(getattr(getattr(module.forward, "__func__", module.forward), "__module__", ""))


def _bare(forward: PackedForward | CacheForward, error: Exception) -> str:
    return str(error).removeprefix(f"{forward.name} is not served: ")


def _engine_logits(
    forward: PackedForward | CacheForward,
    backend: AttentionBackend,
    page_size: int,
    prompts: Prompts,
    steps: list[str],
) -> dict[str, torch.Tensor]:
    """Logits [vocab] by label; each step that runs is appended to `steps`."""
    first, second, third = prompts
    split = prompts.chunk
    pages = -(-(len(first) + 1) // page_size)
    cache = PagedCache(forward.layers, num_pages=pages * len(prompts), page_size=page_size, device=forward.device)
    state = RowTables(max_rows=len(prompts), max_pages_per_row=pages, device=forward.device)
    forward.bind(cache, backend)
    requests = [Request(str(row), tuple(tokens), 1) for row, tokens in enumerate(prompts)]

    def new_pages(row: int) -> tuple[NewPage, ...]:
        return tuple(NewPage(row, i, (row - 1) * pages + i + 1) for i in range(pages))

    # The second and third prompt join late: in a step with the rest of the first, in a mixed order of positions.
    plans = [
        Plan(
            0,
            (),
            (Chunk(1, tuple(first[:split]), not forward.whole_prompts),),
            (NewRow(1, requests[0]),),
            new_pages(1),
        ),
        Plan(
            1,
            (),
            (
                Chunk(1, tuple(first[split:-2]), True),
                Chunk(2, tuple(second[:-1]), True),
                Chunk(3, tuple(third[:-1]), True),
            ),
            (NewRow(2, requests[1]), NewRow(3, requests[2])),
            new_pages(2) + new_pages(3),
        ),
        Plan(2, (1,)),
        Plan(3, (1, 2, 3)),
    ]
    labels = [
        *([] if forward.whole_prompts else ["a chunk of a prompt"]),
        *("the rest of a prompt", "a prompt that joined late", "another that joined late"),
        *("a decode alone", "a decode", "a late decode", "another late decode"),
    ]
    # The token that follows each sampled position, used in place of the sampled token.
    forced = [first[split], first[-2], second[-1], third[-1], first[-1], 0, 0, 0]
    if forward.whole_prompts:
        del forced[0]
    logits: list[torch.Tensor] = []
    for plan in plans:
        steps.append(f"step {plan.step}: {len(plan.chunks)} chunks, {len(plan.decode_rows)} rows that decode")
        staged, sections = _stage(plan, forward.device, forward.tile_size or backend.tile_size, len(prompts))
        state.apply_updates(staged, sections)
        inputs = state.mixed_inputs(staged, sections) if plan.chunks else state.decode_inputs(len(plan.decode_rows))
        logits += forward(inputs).float().unbind(0)
        count = plan.num_sampled
        tokens = torch.tensor(forced[:count], dtype=torch.int32, device=forward.device)
        del forced[:count]
        state.commit(inputs, tokens, None)
        # A request of one new token ends with it; here its row continues.
        state.finished.zero_()
    return dict(zip(labels, logits, strict=True))


@torch.inference_mode()
def compile_checked(
    forward: PackedForward,
    backend: AttentionBackend,
    compiler: str = "inductor",
    *,
    page_size: int = 16,
    pdl: bool = False,
) -> None:
    """Compile a forward on an example, and compare the compiled logits with the uncompiled ones.

    Args:
        forward: A forward that belongs to the check; it stays bound to the check's pages.
        backend: The attention kernels.
        compiler: Backend of `torch.compile`.
        page_size: Page size of the engine, for which the kernels are compiled.
        pdl: Use programmatic dependent launch; see `pdl_check`.

    Raises:
        UnsafePdlError: With `pdl`, a kernel would not wait for its predecessor.
        RuntimeError: The logits differ by more than rounding can explain.
        Exception: Any error of the compiler.
    """
    pages = -(-(EXAMPLE_TOKENS + 1) // page_size)
    state = RowTables(max_rows=2, max_pages_per_row=pages, device=forward.device)
    forward.bind(PagedCache(forward.layers, num_pages=2 * pages, page_size=page_size, device=forward.device), backend)
    example = tuple((7 * i + 3) % forward.vocab_size for i in range(EXAMPLE_TOKENS))
    prompts = example[:_EXAMPLE_ROW], example[_EXAMPLE_ROW:]
    plan = Plan(
        0,
        (),
        tuple(Chunk(row, prompt, True) for row, prompt in enumerate(prompts, 1)),
        tuple(NewRow(row, Request("example", prompt, 1)) for row, prompt in enumerate(prompts, 1)),
        tuple(NewPage(row, i, (row - 1) * pages + i + 1) for row in (1, 2) for i in range(pages)),
    )
    staged, sections = _stage(plan, forward.device, backend.tile_size, 2)
    state.apply_updates(staged, sections)
    prefill = replace(state.mixed_inputs(staged, sections), sample_index=None)
    rows = torch.arange(1, 3, dtype=torch.int32, device=forward.device)
    positions = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=forward.device)
    context = DecodeContext(state.page_table, rows, positions, positions + 1)
    decode = StepInputs(rows.long(), positions.long(), None, context)
    steps = [prefill, decode]
    single: StepInputs | None = None
    if makes_choices(forward.view.config):
        # Such a model decodes a row alone; every other one decodes it beside the padding row.
        context = DecodeContext(state.page_table, rows[:1], positions[:1], positions[:1] + 1)
        steps.append(single := StepInputs(rows[:1].long(), positions[:1].long(), None, context))
    expected = [forward(step).float() for step in steps]
    forward.compile(
        lambda: forward(prefill), compiler, pdl=pdl, run_single=None if single is None else partial(forward, single)
    )
    for step, want in zip(steps, expected, strict=True):
        try:
            _compare_compiled(forward, step, want, pdl=pdl)
        except (UnsafePdlError, _CompiledLogitsError) as error:
            if step is not single:
                raise
            with frozen():  # the step runs twice
                if pdl and not torch.equal(forward(step), forward(step)):
                    raise UnsafePdlError("the logits of one token differ from run to run") from error
            # One token tells a router's choice from a mistake in few models. Its compiled code can be spared.
            logger.info("a step of one token runs uncompiled: %s", error)
            for region in forward.regions:
                region.single = False


class _CompiledLogitsError(RuntimeError):
    """Compiled code computes other logits."""


def _compare_compiled(forward: PackedForward, step: StepInputs, want: torch.Tensor, *, pdl: bool) -> None:
    """Compare the compiled logits of a step with the uncompiled ones `want`.

    Raises:
        UnsafePdlError: With `pdl`, the logits differ by more than rounding can explain.
        _CompiledLogitsError: The same without `pdl`, and no router's choice explains it.
    """
    error = relative_error(forward(step).float(), want)
    if error <= logits_tolerance(forward):
        return
    if pdl:
        # A race would not show again in the comparison by module, which runs other code in between.
        raise UnsafePdlError(f"the logits differ by {error:.2g}")
    alike = 0.0
    if makes_choices(forward.view.config):
        with frozen():  # each layer runs twice
            alike = share_of_equal_tokens(forward.regions, partial(forward, step))
    if alike < _LEAST_ALIKE:
        raise _CompiledLogitsError(
            f"compiled logits of {forward.name} differ by {error:.2g} (relative norm), by no router's choice"
        )
    logger.info(
        "compiled logits of %s differ by %.2g; module by module %.0f %% of the tokens agree",
        forward.name,
        error,
        100 * alike,
    )


def _stage(plan: Plan, device: torch.device, tile_size: int, max_rows: int) -> tuple[torch.Tensor, Sections]:
    limits = Sections.largest(max_rows=max_rows, max_batch_tokens=plan.num_tokens, num_pages=len(plan.new_pages))
    host = torch.zeros(limits.total, dtype=torch.int32, device="cpu")
    bucket = len(plan.decode_rows)
    sections = encode(plan, host.numpy(), bucket=bucket, send_decode_rows=True, tile_size=tile_size)
    return host.to(device), sections
