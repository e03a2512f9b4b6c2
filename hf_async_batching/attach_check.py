"""Two short prompts, packed, chunked and joined late, against the model's plain forward.

Wrong answers from batching engines come from silent mismatches between what a model does and what the engine takes it
to do; this finds them before the first request is served.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from hf_async_batching.argmax import argmax
from hf_async_batching.attention.backend import AttentionBackend
from hf_async_batching.attention.cache import PagedCache
from hf_async_batching.attention.context import AttentionContext
from hf_async_batching.compiled_regions import EXAMPLE_TOKENS
from hf_async_batching.device_state import DeviceState, StepInputs
from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.model_forward import ModelForward
from hf_async_batching.model_view import make_view
from hf_async_batching.plan import Chunk, NewPage, NewRow, Plan
from hf_async_batching.quantization import is_quantized
from hf_async_batching.request import Request
from hf_async_batching.side_by_side import side_by_side
from hf_async_batching.staging import Sections, encode

# Relative error of the logits that rounding alone explains: sums in another order, not another result.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_TF32_TOLERANCE = 5e-3
_QUANTIZED_TOLERANCE = 5e-2

# Each prompt fits one page of any size.
_FIRST_LENGTH, _SPLIT, _SECOND_LENGTH = 11, 4, 7


@torch.inference_mode()
def attach_check(
    model: PreTrainedModel, forward: ModelForward, backend: AttentionBackend, page_size: int = 16
) -> None:
    """Compare paged logits with plain ones, on tables and pages of its own.

    Args:
        model: The user's model, of which a second view is made for the plain forward.
        forward: The paged forward; left bound to the check's pages.
        backend: The attention kernels.
        page_size: Of the engine to come, whose kernels are compiled for it.

    Raises:
        UnsupportedModelError: The logits differ by more than rounding.
    """
    cache = PagedCache(forward.layers, num_pages=2, page_size=page_size, device=forward.device)
    state = DeviceState(max_rows=2, max_pages_per_row=1, device=forward.device)
    forward.bind(cache, backend)
    vocab = forward.vocab_size
    first = [(7 * i + 3) % vocab for i in range(_FIRST_LENGTH)]
    second = [(11 * i + 5) % vocab for i in range(_SECOND_LENGTH)]
    plain: list[torch.Tensor] = []

    def run_plain() -> None:
        view = make_view(model, None)
        for tokens in (first, second):
            out = view(input_ids=torch.tensor([tokens], device=forward.device), use_cache=False)
            plain.append(out.logits[0].float())

    # Each of these takes seconds in a fresh process: compilers on the one side, libraries that load on the other.
    side_by_side(
        [
            lambda: backend.ready(forward.layers, page_size=page_size, batches=(1, 2)),
            lambda: DeviceState(max_rows=2, max_pages_per_row=1, device=forward.device).ready(),
            lambda: argmax(torch.zeros(2, vocab, dtype=forward.layers[0].dtype, device=forward.device)),
            run_plain,
        ],
        forward.device,
    )
    requests = [Request(str(row), tuple(tokens), 1) for row, tokens in enumerate((first, second))]
    # The second prompt joins late: beside the rest of the first, and in the order of positions that mixes both.
    plans = [
        Plan(0, (), (Chunk(1, tuple(first[:_SPLIT]), True),), (NewRow(1, requests[0]),), (NewPage(1, 0, 1),)),
        Plan(
            1,
            (),
            (Chunk(1, tuple(first[_SPLIT:-1]), True), Chunk(2, tuple(second[:-1]), True)),
            (NewRow(2, requests[1]),),
            (NewPage(2, 0, 2),),
        ),
        Plan(2, (1, 2)),
    ]
    paged: list[torch.Tensor] = []
    forced = [first[_SPLIT], first[-1], second[-1]]  # the tokens that follow each sampled position, as if sampled
    for plan in plans:
        staged, sections = _stage(plan, forward.device, backend.tile_size)
        state.apply_updates(staged, sections)
        inputs = state.mixed_inputs(staged, sections) if plan.chunks else state.decode_inputs(2)
        try:
            logits = forward(inputs)
        except ValueError as refused:
            raise UnsupportedModelError(f"{forward.name} is not served: {refused}") from refused
        paged += logits.float().unbind(0)
        tokens = [forced.pop(0) for _ in range(plan.num_sampled)] if forced else [0] * plan.num_sampled
        state.commit(inputs, torch.tensor(tokens, dtype=torch.int32, device=forward.device), None)
    expected = [plain[0][_SPLIT - 1], plain[0][-2], plain[1][-2], plain[0][-1], plain[1][-1]]
    what = ("a chunk of a prompt", "the rest of a prompt", "a prompt that joined late", "a decode", "a late decode")
    dtype, tolerance = forward.layers[0].dtype, logits_tolerance(forward)
    for label, got, want in zip(what, paged, expected, strict=True):
        error = logits_error(got, want)
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{forward.name} is not served: its logits for {label} differ from the plain forward's by "
                f"{error:.2g} (relative norm, {dtype}). Use plain `model.generate` for this model, or load it with "
                "attn_implementation='eager' if its own attention leaves something out (some releases of "
                "transformers drop soft caps under 'sdpa'); and please report it with its config."
            )


@torch.inference_mode()
def compile_checked(
    forward: ModelForward,
    backend: AttentionBackend,
    compiler: str = "inductor",
    *,
    page_size: int = 16,
    early: bool = False,
) -> None:
    """Compile a forward on an example, and compare its logits with those it had uncompiled.

    Args:
        forward: A forward that nobody else uses; left bound to the check's pages.
        backend: The attention kernels.
        compiler: Backend of `torch.compile`.
        page_size: Of the engine, whose kernels are compiled for it.
        early: Let kernels be launched early; see `early_launches`.

    Raises:
        UnsafeEarlyLaunchError: With `early`, a kernel would not wait for the one before it.
        RuntimeError: The logits differ by more than rounding.
        Exception: Whatever the compiler raises.
    """
    pages = -(-(EXAMPLE_TOKENS + 1) // page_size)
    state = DeviceState(max_rows=2, max_pages_per_row=pages, device=forward.device)
    forward.bind(PagedCache(forward.layers, num_pages=pages, page_size=page_size, device=forward.device), backend)
    prompt = tuple((7 * i + 3) % forward.vocab_size for i in range(EXAMPLE_TOKENS))
    plan = Plan(
        0,
        (),
        (Chunk(1, prompt, True),),
        (NewRow(1, Request("example", prompt, 1)),),
        tuple(NewPage(1, i, i + 1) for i in range(pages)),
    )
    staged, sections = _stage(plan, forward.device, backend.tile_size)
    state.apply_updates(staged, sections)
    prefill = replace(state.mixed_inputs(staged, sections), sample_index=None)
    # Two tokens of one row at the same position: what they see does not depend on which was written last.
    rows = torch.ones(2, dtype=torch.int32, device=forward.device)
    context = AttentionContext(
        page_table=state.page_table,
        rows=rows,
        positions=rows * EXAMPLE_TOKENS,
        decode=True,
        context_lengths=rows * (EXAMPLE_TOKENS + 1),
    )
    decode = StepInputs(rows.long(), context.positions.long(), None, context)
    expected = [forward(step).float() for step in (prefill, decode)]
    forward.compile(lambda: forward(prefill), compiler, early=early)
    for step, want in zip((prefill, decode), expected, strict=True):
        error = logits_error(forward(step).float(), want)
        if not error <= logits_tolerance(forward):
            raise RuntimeError(f"compiled logits of {forward.name} differ by {error:.2g} (relative norm)")


def logits_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((got - want).norm() / want.norm().clamp(min=1e-6))


def logits_tolerance(forward: ModelForward) -> float:
    """The error that rounding alone explains."""
    dtype = forward.layers[0].dtype
    if is_quantized(forward.view):
        return max(_QUANTIZED_TOLERANCE, _TOLERANCE.get(dtype, 1e-1))
    if dtype == torch.float32 and forward.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return _TF32_TOLERANCE
    return _TOLERANCE.get(dtype, 1e-1)


def _stage(plan: Plan, device: torch.device, tile_size: int) -> tuple[torch.Tensor, Sections]:
    limits = Sections.largest(max_rows=2, max_batch_tokens=plan.num_tokens, num_pages=len(plan.new_pages))
    host = torch.zeros(limits.total, dtype=torch.int32, device="cpu")
    sections = encode(plan, host.numpy(), bucket=2, send_decode_rows=True, tile_size=tile_size)
    return host.to(device), sections
