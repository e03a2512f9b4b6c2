"""Layers with states in PyTorch: single tokens of many rows at once, pieces of prompts by the family's own function.

Each function takes packed tokens, as the family's function takes one sequence, and reads and writes the states of the
step's rows. Results of padding tokens are finite, and mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.nn import functional

from hf_async_batching.recurrent.step import RecurrentStep, decoding, pieces

Scan = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class RowState:
    """One state of the rows of a step.

    Args:
        step: The step.
        key: Name of the state.
        shape: Shape of one row's state.
        dtype: Dtype of the state.
    """

    def __init__(self, step: RecurrentStep, key: Hashable, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._step = step
        self.table = step.tables.table(key, shape, dtype)
        count = decoding(step.context)
        self._rows = step.context.rows[:count].long()
        self._begins = step.context.positions[:count] == 0

    def of_decoding_rows(self) -> torch.Tensor:
        """The states [rows, ...] of the rows that decode; zeros for rows that begin."""
        states = self.table[self._rows]
        return states.masked_fill(self._begins.view(-1, *[1] * (states.dim() - 1)), 0)

    def keep_decoding_rows(self, states: torch.Tensor) -> None:
        """Write the states of the rows that decode."""
        if not self._step.frozen:
            self.table[self._rows] = states.to(self.table.dtype)

    def of(self, row: int, position: int) -> torch.Tensor:
        """The state [1, ...] of a row before the token at `position`."""
        state = self.table[row : row + 1]
        return state if position else torch.zeros_like(state)

    def keep(self, row: int, state: torch.Tensor) -> None:
        """Write the state of a row."""
        if not self._step.frozen:
            self.table[row] = state.to(self.table.dtype)


def causal_conv(
    step: RecurrentStep,
    key: Hashable,
    conv: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """A depthwise causal convolution; a row's state is its last inputs, one fewer than the kernel is wide.

    Args:
        step: The step.
        key: Name of the state.
        conv: The family's function over one sequence.
        hidden: [1, channels, tokens].
        weight: [channels, width].
        args: Bias and activation, as the family passes them.
        kwargs: The same.

    Returns:
        [1, channels, tokens].
    """
    width = weight.shape[-1]
    state = RowState(step, key, (hidden.shape[1], width - 1), hidden.dtype)
    out = torch.zeros_like(hidden)
    count = decoding(step.context)
    if count:
        window = torch.cat([state.of_decoding_rows(), hidden[0, :, :count].T[..., None]], dim=-1)
        out[0, :, :count] = conv(window, weight, *args, **kwargs)[..., -1].T
        state.keep_decoding_rows(window[..., 1:])
    for row, query, length, position in pieces(step.context):
        window = torch.cat([state.of(row, position), hidden[..., query : query + length]], dim=-1)
        out[..., query : query + length] = conv(window, weight, *args, **kwargs)[..., width - 1 :]
        state.keep(row, window[0, :, window.shape[-1] - (width - 1) :])
    return out


def delta_rule(
    step: RecurrentStep,
    key: Hashable,
    chunk: Scan,
    query: torch.Tensor,
    key_states: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    normalize: bool,
) -> torch.Tensor:
    """The gated delta rule, with one decay per head, or one per key channel (Kimi Delta Attention).

    A row's state is float32 [value heads, key dim, value dim].

    Args:
        step: The step.
        key: Name of the state.
        chunk: The family's function over one sequence.
        query: [1, tokens, key heads, key dim].
        key_states: [1, tokens, key heads, key dim].
        value: [1, tokens, value heads, value dim].
        g: Logarithms of the decay, [1, tokens, value heads] or [1, tokens, value heads, key dim].
        beta: [1, tokens, value heads].
        normalize: Whether queries and keys are divided by their norms.

    Returns:
        [1, tokens, value heads, value dim], in the dtype of the queries.
    """
    heads, dim = value.shape[2:]
    state = RowState(step, key, (heads, key_states.shape[3], dim), torch.float32)
    out = torch.zeros_like(value, dtype=query.dtype)
    count = decoding(step.context)
    if count:
        q, k, v, decay, rate = (tensor[0, :count].float() for tensor in (query, key_states, value, g, beta))
        if normalize:
            q, k = (one * torch.rsqrt((one * one).sum(-1, keepdim=True) + 1e-6) for one in (q, k))
        q, k = (one.repeat_interleave(heads // one.shape[1], 1) for one in (q * q.shape[-1] ** -0.5, k))
        decay = decay.exp()[..., None] if decay.dim() == 3 else decay.exp()[..., None, None]
        states = state.of_decoding_rows() * decay
        delta = (v - (states * k[..., None]).sum(-2)) * rate[..., None]
        states = states + k[..., None] * delta[..., None, :]
        out[0, :count] = (states * q[..., None]).sum(-2).to(out.dtype)
        state.keep_decoding_rows(states)
    for row, first, length, position in pieces(step.context):
        parts = [tensor[:, first : first + length] for tensor in (query, key_states, value)]
        result, final = chunk(
            *parts,
            g=g[:, first : first + length],
            beta=beta[:, first : first + length],
            initial_state=state.of(row, position),
            output_final_state=True,
            use_qk_l2norm_in_kernel=normalize,
        )
        out[:, first : first + length] = result
        state.keep(row, final[0])
    return out


def mamba2_scan(
    step: RecurrentStep,
    key: Hashable,
    scan: Scan,
    hidden: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    **options: Any,
) -> torch.Tensor:
    """The state-space scan of Mamba-2; a row's state is float32 [heads, head dim, state size].

    Args:
        step: The step.
        key: Name of the state.
        scan: The family's function over one sequence.
        hidden: [1, tokens, heads, head dim].
        dt: [1, tokens, heads].
        A: [heads].
        B: [1, tokens, groups, state size].
        C: [1, tokens, groups, state size].
        D: [heads], or None.
        dt_bias: [heads], or None.
        softplus: Whether softplus is applied to `dt`.
        options: Arguments of the family's function alone.

    Returns:
        [1, tokens, heads, head dim], in the dtype of `hidden`.
    """
    heads, dim = hidden.shape[2:]
    state = RowState(step, key, (heads, dim, B.shape[-1]), torch.float32)
    out = torch.zeros_like(hidden)
    count = decoding(step.context)
    if count:
        x, b, c = (tensor[0, :count].float() for tensor in (hidden, B, C))
        b, c = (one.repeat_interleave(heads // one.shape[1], 1) for one in (b, c))
        time = dt[0, :count] if dt_bias is None else dt[0, :count] + dt_bias.to(dt.dtype)
        time = (functional.softplus(time) if softplus else time).float()
        states = state.of_decoding_rows() * (time * A.float()).exp()[..., None, None]
        states = states + (time[..., None] * x)[..., None] * b[:, :, None]
        result = (states * c[:, :, None]).sum(-1)
        out[0, :count] = (result if D is None else result + D.float()[:, None] * x).to(out.dtype)
        state.keep_decoding_rows(states)
    for row, first, length, position in pieces(step.context):
        x, time, b, c = (tensor[:, first : first + length] for tensor in (hidden, dt, B, C))
        result, final = scan(
            *(x, time, A, b, c),
            D=D,
            dt_bias=dt_bias,
            dt_softplus=softplus,
            initial_states=state.of(row, position),
            return_final_states=True,
            **options,
        )
        out[:, first : first + length] = result.to(out.dtype)
        state.keep(row, final[0])
    return out


def mamba_scan(
    step: RecurrentStep,
    key: Hashable,
    hidden: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
) -> torch.Tensor:
    """The selective scan of Mamba, token by token; a row's state is float32 [channels, state size].

    Args:
        step: The step.
        key: Name of the state.
        hidden: [1, channels, tokens].
        dt: [1, channels, tokens].
        A: [channels, state size].
        B: [1, state size, tokens].
        C: [1, state size, tokens].
        D: [channels], or None.
        z: Gate, [1, channels, tokens], or None.
        dt_bias: [channels], or None.
        softplus: Whether softplus is applied to `dt`.

    Returns:
        [1, channels, tokens], in the dtype of `hidden`.
    """
    state = RowState(step, key, tuple(A.shape), torch.float32)
    time = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)[:, None]
    time = (functional.softplus(time) if softplus else time)[0].T.float()
    x, b, c = (tensor[0].T.float() for tensor in (hidden, B, C))
    out = torch.zeros_like(x)

    def advance(states: torch.Tensor, tokens: slice) -> torch.Tensor:
        states = states * (time[tokens, :, None] * A.float()).exp()
        states = states + (time[tokens] * x[tokens])[..., None] * b[tokens, None]
        out[tokens] = (states * c[tokens, None]).sum(-1)
        return states

    count = decoding(step.context)
    if count:
        state.keep_decoding_rows(advance(state.of_decoding_rows(), slice(0, count)))
    for row, first, length, position in pieces(step.context):
        states = state.of(row, position)
        for token in range(first, first + length):
            states = advance(states, slice(token, token + 1))
        state.keep(row, states[0])
    out = (out if D is None else out + x * D.float()).T[None].to(hidden.dtype)
    return out if z is None else out * functional.silu(z)
