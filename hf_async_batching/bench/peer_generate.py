"""Plain `model.generate` over left-padded batches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from hf_async_batching.bench.peer_run import Pass, PeerRun
from hf_async_batching.bench.workloads import Workload
from hf_async_batching.core.request import Request
from hf_async_batching.devices.memory import return_memory


def padded_generate(
    run: PeerRun,
    model: Any,
    make_workload: Callable[[int], Workload],
    repeats: int,
    limit: float,
) -> list[Pass]:
    """Serve each turn as one left-padded batch, or in smaller batches that fit into memory."""
    workload = make_workload(0)
    run.attention = model.config._attn_implementation
    if any(len({new for _, new in wave}) > 1 for wave in _waves(workload)):
        run.notes.append("every row runs as long as the longest row of its batch; only requested tokens count")
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
    """List the lengths (prompt, new) of each turn."""
    per_user, users = workload.lengths(), len(workload.first)
    turns = len(per_user) // users
    return [[per_user[user * turns + turn] for user in range(users)] for turn in range(turns)]


def _in_batches(model: Any, workload: Workload, rows: int, limit: float) -> Pass:
    done = Pass()
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
        raise TimeoutError(f"stopped at the time limit after {len(rows[0])} of {longest} tokens")
    return {request.request_id: row[: request.max_new_tokens] for request, row in zip(requests, rows, strict=True)}
