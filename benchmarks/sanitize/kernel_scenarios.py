"""Launches the package's kernels one by one on small inputs. Memory that no launch should read is never written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hf_async_batching.attention import triton_kernels as kernels
from hf_async_batching.attention.triton_kernels import PREFILL_TILE
from hf_async_batching.core import step_layout
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.plan import Chunk, NewPage, NewRow, Plan
from hf_async_batching.core.request import Request, SamplingParams
from hf_async_batching.devices.shared_memory import shared_memory_limit
from hf_async_batching.linear.engine_linear import MAX_STRIPS
from hf_async_batching.linear.skinny import SkinnySetting, default_setting, skinny_linear
from hf_async_batching.runner import staging
from hf_async_batching.runner.row_tables import RowTables
from hf_async_batching.sampling import triton_sampler as fused
from hf_async_batching.sampling.argmax import argmax_in_parts
from hf_async_batching.sampling.metadata import SamplingMetadata
from hf_async_batching.sampling.sampler import Sampler
from hf_async_batching.scheduler.sequence import Sequence
from hf_async_batching.scheduler.step_features import features_of

_UNWRITTEN_PAGE = 1


@dataclass(frozen=True)
class Attention:
    """A layer to try: the sizes of its heads, and the options of its scores."""

    head_dim: int
    heads: int
    kv_heads: int
    page_size: int = 16
    full_precision: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    sinks: bool = False


ATTENTIONS = (
    Attention(64, 8, 2),
    Attention(64, 6, 2, options=(("chunk", 32),)),
    Attention(64, 8, 1, sinks=True),
    Attention(64, 4, 2, full_precision=True, options=(("sliding_window", 20),)),
    Attention(80, 4, 4),
    Attention(128, 8, 2, page_size=32),
    Attention(128, 8, 2, page_size=32, options=(("sliding_window", 24),)),
    Attention(256, 4, 2, page_size=32, options=(("sliding_window", 24), ("softcap", 20.0))),
)
"""Layers whose groups of query heads or head sizes are not powers of two; each option occurs once."""


def attention(device: torch.device) -> None:
    """Write and compute prompts, then decode rows: beside prompts, and with one program or several."""
    for case in ATTENTIONS:
        _attend(case, device)


@torch.inference_mode()
def _attend(case: Attention, device: torch.device) -> None:
    torch.manual_seed(case.head_dim + case.heads)
    dtype = torch.float32 if case.full_precision else _half(device)
    prompts = [1, 17, PREFILL_TILE + 22]
    pages_of = [-(-(length + 8) // case.page_size) for length in prompts]
    pages = 2 + sum(pages_of)
    keys, values = (
        torch.empty(pages, case.page_size, case.kv_heads, case.head_dim, dtype=dtype, device=device) for _ in range(2)
    )
    keys[0].zero_(), values[0].zero_()  # scratch, which padding reads
    ids = torch.split(2 + torch.randperm(sum(pages_of)), pages_of)
    table = torch.full((len(prompts) + 1, max(pages_of) + 2), _UNWRITTEN_PAGE, dtype=torch.int32)
    table[0] = 0
    for row, each in enumerate(ids, 1):
        table[row, : len(each)] = each
    table = table.to(device)
    options: dict[str, Any] = {"scaling": case.head_dim**-0.5, **dict(case.options)}
    if case.sinks:
        options["sinks"] = _random(case.heads, dtype=dtype, device=device)

    def heads(tokens: int, count: int) -> torch.Tensor:
        return _random(tokens, count, case.head_dim, dtype=dtype, device=device)

    # One padding tile at the end, as padded steps have them.
    tiles = [
        (row, at, min(PREFILL_TILE, n - at)) for row, n in enumerate(prompts, 1) for at in range(0, n, PREFILL_TILE)
    ]
    lengths = [length for _, _, length in tiles]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = _int32([row for row, n in enumerate(prompts, 1) for _ in range(n)], device)
    positions = _int32([position for n in prompts for position in range(n)], device)
    tile = [
        _int32([*part, 0], device)
        for part in ([row for row, _, _ in tiles], starts, lengths, [p for _, p, _ in tiles])
    ]
    total = sum(prompts)
    kernels.write_kv(heads(total, case.kv_heads), heads(total, case.kv_heads), keys, values, table, rows, positions)
    kernels.prefill_attention(heads(total, case.heads), keys, values, table, *tile, **options)

    entries = [*range(1, len(prompts) + 1), 0]
    base = kernels.default_decode_config(
        len(entries), case.kv_heads, case.heads // case.kv_heads, case.head_dim, case.head_dim, dtype, device
    )
    counters = torch.zeros(4096, dtype=torch.int32, device=device)
    ways = [base._replace(splits=1), base._replace(splits=4, fused=True), base._replace(splits=4, fused=False)]
    for step, config in enumerate(ways):
        new = heads(len(entries), case.kv_heads), heads(len(entries), case.kv_heads)
        if step == 1:  # a mixed step: the last row is a prompt's piece, and the others decode beside it
            last = _int32([len(prompts)], device)
            here = _int32([prompts[-1] + step], device)
            kernels.write_kv(new[0][:1], new[1][:1], keys, values, table, last, here)
            zero, one = _int32([0], device), _int32([1], device)
            kernels.prefill_attention(heads(1, case.heads), keys, values, table, last, zero, one, here, **options)
        lengths_now = [*(n + step + 1 for n in prompts), 1]
        if step == 1:
            lengths_now[-2], entries_now = 0, [*entries[:-2], 0, 0]
        else:
            entries_now = entries
        kernels.decode_attention(
            heads(len(entries), case.heads), keys, values, table, _int32(entries_now, device),
            _int32(lengths_now, device), config=config, counters=counters, new=new, beside_prefill=step == 1,
            **options,
        )  # fmt: skip
    _expect(not counters.any(), "the counters of decode attention are not back at zero")


def linear(device: torch.device) -> None:
    """Compute skinny products with each kind of setting."""
    dtype = _half(device)
    torch.manual_seed(3)
    counters = torch.zeros(MAX_STRIPS, dtype=torch.int32, device=device)
    for rows, n, k, setting in (
        (1, 64, 128, SkinnySetting(64, 64, 1, 4, 2)),
        (5, 208, 576, SkinnySetting(64, 128, 2, 4, 3)),
        (33, 48, 320, SkinnySetting(64, 64, 3, 4, 2)),
        (64, 80, 96, SkinnySetting(32, 64, 4, 4, 2)),
        (17, 512, 1024, default_setting(17, 512, 1024, shared_memory_limit(device))),
    ):
        x = _random(rows, k, dtype=dtype, device=device)
        weight = _random(n, k, dtype=dtype, device=device)
        bias, residual = _random(n, dtype=dtype, device=device), _random(rows, n, dtype=dtype, device=device)
        skinny_linear(x, weight, None, counters, setting)
        skinny_linear(x, weight, bias, counters, setting, residual)
    _expect(not counters.any(), "the counters of skinny products are not back at zero")


def sampling(device: torch.device) -> None:
    """Sample rows of all kinds in one step, in both dtypes and with both sizes of the groups of logits."""
    torch.manual_seed(5)
    for vocab, dtype, top_k in ((4112, torch.float32, 50), (9001, _half(device), 300), (97, torch.float32, 5)):
        logits = (3 * torch.randn(7, vocab)).to(device, dtype)
        for parts in (1, 3, 64):
            argmax_in_parts(logits, parts)
        for requests in (_asks(top_k), _asks(0)[:3], [_request(0, penalty=1.2)]):
            _sample(requests, logits[: len(requests)], device)


def _asks(top_k: int) -> list[Request]:
    drawn = SamplingParams(do_sample=True, temperature=0.8)
    return [
        _request(1, replace(drawn, seed=1)),
        _request(2, replace(drawn, top_p=0.8, seed=2)),
        _request(3, replace(drawn, top_p=0.05, min_p=0.05, seed=3), penalty=1.3),
        _request(4, replace(drawn, top_k=top_k, seed=4)),
        _request(5, replace(drawn, top_k=max(1, top_k // 2), top_p=0.9, seed=5)),
        _request(6, SamplingParams()),
        _request(7, SamplingParams(), penalty=0.8),
    ]


def _request(number: int, sampling: SamplingParams | None = None, penalty: float = 1.0) -> Request:
    return Request(
        f"r{number}", (1, 2, 3), 9, sampling=sampling or SamplingParams(), eos_token_ids=(2,),
        logits=LogitsParams(repetition_penalty=penalty),
    )  # fmt: skip


@torch.inference_mode()
def _sample(requests: list[Request], logits: torch.Tensor, device: torch.device) -> None:
    """Run a decode step with given logits: tables, memory, sampler, commit."""
    sequences = [Sequence(request, 0) for request in requests]
    for sequence in sequences:
        sequence.num_computed = 1
    features = features_of(sequences, [])
    state = RowTables(
        max_rows=len(requests), max_pages_per_row=4, device=device, fused=True, max_length=16,
        vocab_size=logits.shape[1],
    )  # fmt: skip
    state.memory.ensure(words=False, seen=features.seen)
    rows = tuple(range(1, len(requests) + 1))
    plan = Plan(0, rows, new_rows=tuple(NewRow(row, request) for row, request in zip(rows, requests, strict=True)))
    state.apply_updates(*_staged(plan, device, len(rows)))
    sampler = Sampler(fused=True)
    for _ in range(2):
        inputs = state.decode_inputs(len(rows))
        state.note(inputs, features)
        taken = state.sampled_rows(inputs)
        sampled = SamplingMetadata(state.params[taken], state.next_positions(inputs), taken, state.memory)
        _expect(not features.sampling or fused.serves(features), "the sampling kernels do not serve these rows")
        tokens, logprobs = sampler(logits, sampled, sampler.as_run(replace(features, logprobs=True)))
        state.commit(inputs, tokens, logprobs)


@torch.inference_mode()
def tables(device: torch.device) -> None:
    """Run a batch that starts with prompts, decodes in parts of several programs, and ends row by row."""
    count = 130
    requests = [Request(f"r{i}", (3, 4, 5), 4 + i % 5, eos_token_ids=(2, 7)) for i in range(count)]
    for groups in (1, 2):
        state = RowTables(
            max_rows=count, max_pages_per_row=6, device=device, fused=True, max_length=64, vocab_size=97,
            max_samples=count + 8, groups=groups,
        )  # fmt: skip
        chunks = tuple(Chunk(row, (3, 4, 5), 1) for row in range(1, 9))
        started = tuple(NewRow(row, request) for row, request in enumerate(requests, 1))
        pages = tuple(NewPage(row, index, row + index) for row in range(1, count + 1) for index in range(groups))
        staged, sections = _staged(Plan(0, (9, 10), chunks, started, pages), device)
        state.apply_updates(staged, sections)
        mixed = state.mixed_inputs(staged, sections, 2)
        state.commit(mixed, _int32([11] * sections.samples, device), None)
        for size in (1, 64, 65, count):
            plan = Plan(1, tuple(range(1, size + 1)), new_pages=(NewPage(1, 2, 9),))
            state.apply_updates(*_staged(plan, device, size))
            for step in range(3):
                inputs = state.decode_inputs(size)
                logprobs = torch.zeros(size, device=device) if step % 2 else None
                tokens = _int32([(7 * i + step) % 40 - 4 for i in range(size)], device)
                state.commit(inputs, tokens, logprobs)
        _expect(bool(state.finished.any()) and not state.lengths[0], "the tables did not advance as they must")


def _staged(plan: Plan, device: torch.device, bucket: int = 0) -> tuple[torch.Tensor, step_layout.Sections]:
    out = np.zeros(1 << 14, np.int32)
    sections = staging.encode(plan, out, bucket=bucket, send_decode_rows=True, tile_size=PREFILL_TILE)
    # The array is exactly as large as the data, so that a read beyond it is found.
    return torch.from_numpy(out[: sections.total].copy()).to(device), sections


def _half(device: torch.device) -> torch.dtype:
    """Return the 16-bit dtype of the device; Triton's interpreter multiplies bfloat16 as integers."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape).to(device, dtype)


def _int32(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)
