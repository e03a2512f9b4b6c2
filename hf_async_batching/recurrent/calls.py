"""The functions that layers with states call in place of their family's own, over packed tokens.

`REPLACED` maps names of transformers' functions to ours. Each of ours has the arguments that families pass; those that
only repeat what the step says are dropped. On CUDA Triton kernels compute them; elsewhere, and for what has no kernel,
`reference` does.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch

from hf_async_batching.recurrent import reference
from hf_async_batching.recurrent.step import current_step, current_tag
from hf_async_batching.runtime.triton_start import runs_triton


def causal_conv1d(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    """In place of `causal_conv1d_fn`; see `reference.causal_conv`."""
    if torch.compiler.is_dynamo_compiling():
        out: torch.Tensor = torch.ops.hf_async_batching.row_conv(hidden_states, weight, bias, activation or "")
        return out
    return _conv(hidden_states, weight, bias, activation or "")


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    state_tag: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention`; see `reference.delta_rule`."""
    if torch.compiler.is_dynamo_compiling():
        out: torch.Tensor = torch.ops.hf_async_batching.row_delta_rule(
            query, key, value, g, beta, use_qk_l2norm_in_kernel, state_tag
        )
    else:
        tag = current_tag() if state_tag is None else state_tag
        out = _delta_rule(query, key, value, g, beta, use_qk_l2norm_in_kernel, tag)
    return out, _no_state(out)


def mamba2_chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    *,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    state_tag: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """In place of `mamba2_chunk_scan`; see `reference.mamba2_scan`."""
    given = (hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, float(dt_limit[0]), float(dt_limit[1]), chunk_size)
    if torch.compiler.is_dynamo_compiling():
        out: torch.Tensor = torch.ops.hf_async_batching.row_mamba2_scan(*given, state_tag)
    else:
        out = _mamba2_scan(*given, current_tag() if state_tag is None else state_tag)
    return (out, _no_state(out)) if return_final_states else out


def mamba_selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """In place of `mamba_selective_scan`; see `reference.mamba_scan`."""
    step, tag = current_step(), current_tag()
    layer, _functions = step.layer(tag)
    out = reference.mamba_scan(
        step, (layer, "scan"), hidden_states, dt, A, B, C, D=D, z=z, dt_bias=delta_bias, softplus=delta_softplus
    )
    return (out, _no_state(out)) if return_last_state else out


REPLACED: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d,
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "chunk_kimi_delta_attention": chunk_gated_delta_rule,
    "mamba2_chunk_scan": mamba2_chunk_scan,
    "mamba_selective_scan": mamba_selective_scan,
}
"""Ours by the name of transformers' function."""

_WITHOUT_KERNEL = frozenset({"mamba_selective_scan"})


def reads_back(names: Set[str], device: torch.device) -> bool:
    """Whether a step with prompts reads its pieces on the host, so that nothing can be captured or compiled.

    Args:
        names: Names of the functions that a model's layers call.
        device: Device of the model. On a CPU a read costs nothing.
    """
    without_triton = device.type != "cpu" and not runs_triton(device)
    return bool(names) and (without_triton or not _WITHOUT_KERNEL.isdisjoint(names))


def _no_state(out: torch.Tensor) -> torch.Tensor:
    """In place of a final state, which the caller hands to its cache."""
    return out.new_empty(0)


def _original(functions: dict[str, Callable[..., Any]], *names: str) -> Callable[..., Any]:
    return next(functions[name] for name in names if name in functions)


def _conv(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    step = current_step()
    # Its weight names a convolution: some layers convolve more than once, and some pass no keyword arguments on.
    key = ("conv", weight.data_ptr())
    if runs_triton(hidden.device):
        from hf_async_batching.recurrent.triton_conv import row_conv

        return row_conv(step, key, hidden, weight, bias, activation)
    # Families have the same function.
    original = next(
        functions["causal_conv1d_fn"] for _, functions in step.mixers.values() if "causal_conv1d_fn" in functions
    )
    return reference.causal_conv(step, key, original, hidden, weight, bias, activation=activation or None)


def _delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    normalize: bool,
    tag: torch.Tensor,
) -> torch.Tensor:
    step = current_step()
    layer, functions = step.layer(tag)
    if runs_triton(query.device):
        from hf_async_batching.recurrent.triton_delta_rule import row_delta_rule

        return row_delta_rule(step, (layer, "scan"), query, key, value, g, beta, normalize=normalize)
    original = _original(functions, "torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")
    return reference.delta_rule(step, (layer, "scan"), original, query, key, value, g, beta, normalize=normalize)


def _mamba2_scan(
    hidden: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    least: float,
    most: float,
    chunk_size: int,
    tag: torch.Tensor,
) -> torch.Tensor:
    step = current_step()
    layer, functions = step.layer(tag)
    key = (layer, "scan")
    if runs_triton(hidden.device):
        from hf_async_batching.recurrent.triton_mamba2 import row_mamba2_scan

        return row_mamba2_scan(
            step, key, hidden, dt, A, B, C, D=D, dt_bias=dt_bias, softplus=softplus, limit=(least, most)
        )
    original = _original(functions, "mamba2_chunk_scan")
    return reference.mamba2_scan(
        step, key, original, hidden, dt, A, B, C,
        D=D, dt_bias=dt_bias, softplus=softplus, dt_limit=(least, most), chunk_size=chunk_size,
    )  # fmt: skip


# The schemas do not say that the operators write to states. Nothing else in compiled code reads these.
_library: Any = torch.library.Library("hf_async_batching", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("row_conv(Tensor hidden, Tensor weight, Tensor? bias, str activation) -> Tensor")
_library.define(
    "row_delta_rule(Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, bool normalize, Tensor tag)"
    " -> Tensor"
)
_library.define(
    "row_mamba2_scan(Tensor hidden, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias,"
    " bool softplus, float least, float most, int chunk_size, Tensor tag) -> Tensor"
)
for _name, _function in (("row_conv", _conv), ("row_delta_rule", _delta_rule), ("row_mamba2_scan", _mamba2_scan)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _conv_shape(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(hidden)


def _delta_rule_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:  # noqa: ARG001
    return query.new_empty(value.shape)


def _mamba2_shape(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


torch.library.register_fake("hf_async_batching::row_conv", _conv_shape, lib=_library)
torch.library.register_fake("hf_async_batching::row_delta_rule", _delta_rule_shape, lib=_library)
torch.library.register_fake("hf_async_batching::row_mamba2_scan", _mamba2_shape, lib=_library)
