"""Recognise multi-head latent attention by its values: which linear layer expands which part of keys and values.

No list of classes says so. A forward runs in which every linear layer of the attention modules returns random numbers.
The layer whose numbers are the keys' leading parts and the values, as they are, expands a latent. What is left of the
keys must be the same for all heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_async_batching.attention.hf_interface import PagedLayer
from hf_async_batching.attention.latents import MOST_RANK, MOST_ROTARY
from hf_async_batching.kv_cache.layer_groups import LayerShape
from hf_async_batching.linear.engine_linear import is_plain
from hf_async_batching.model.forward.attention_probe import observe_attention


class FoundLatents(NamedTuple):
    """An attention module that expands latents.

    Attributes:
        attention: The module.
        expansion: The linear layer that expands.
        plain: Numbers of a head's key that come from the latent; the rotary part follows them.
        shape: What pages keep of it.
    """

    attention: nn.Module
    expansion: nn.Linear
    plain: int
    shape: LayerShape


class _Call(NamedTuple):
    input: torch.Tensor
    output: torch.Tensor


def find_latents(
    view: nn.Module, layers: dict[int, PagedLayer], shapes: list[LayerShape], forward: Callable[[], Any]
) -> list[FoundLatents]:
    """Find the attention modules of a view that expand latents.

    Args:
        view: A view whose attention is that of the probe.
        layers: The attention modules, by identity.
        shapes: Shapes of keys and values, by layer index.
        forward: Runs the view over a few tokens.
    """
    modules = [module for module in view.modules() if id(module) in layers]
    owners: dict[int, int] = {}
    for module in modules:
        for child in module.modules():
            if _may_expand(child):
                owners[id(child)] = owners.get(id(child), 0) + 1
    # A layer that two modules share would hand its input over to one of them.
    candidates = {
        id(module): [child for child in module.modules() if owners.get(id(child)) == 1] for module in modules
    }
    if not any(candidates.values()):
        return []
    calls: dict[int, list[_Call]] = {}
    found: list[FoundLatents] = []

    def observe(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        shape = shapes[layers[id(module)].index]
        for child in candidates.get(id(module), ()):
            assert isinstance(child, nn.Linear)
            seen = calls.get(id(child), [])
            if len(seen) == 1 and (one := _expands(module, child, seen[0], query, key, value, shape)) is not None:
                found.append(one)
                return

    linears = [child for group in candidates.values() for child in group]
    with _RandomOutputs(linears, calls):
        observe_attention(forward, observe)
    # A layer that runs again after attention would find its latent gone.
    return [one for one in found if len(calls[id(one.expansion)]) == 1]


def _may_expand(module: nn.Module) -> bool:
    return (
        is_plain(module)
        and module.bias is None
        and module.in_features <= MOST_RANK
        and module.weight.is_contiguous()
        and module.weight.is_floating_point()
    )


class _RandomOutputs:
    """Lets linear layers return random numbers, and remembers inputs and outputs by the layer's identity."""

    def __init__(self, linears: Iterable[nn.Module], calls: dict[int, list[_Call]]) -> None:
        self._linears, self._calls = list(linears), calls
        self._generator = torch.Generator("cpu").manual_seed(0)

    def __enter__(self) -> None:
        self._hooks = [linear.register_forward_hook(self._replace) for linear in self._linears]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _replace(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        random = torch.randn(output.shape, generator=self._generator, device="cpu").to(output.device, output.dtype)
        self._calls.setdefault(id(module), []).append(_Call(inputs[0], random))
        return random


def _expands(
    module: nn.Module,
    linear: nn.Linear,
    call: _Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shape: LayerShape,
) -> FoundLatents | None:
    """What a linear layer expands, if its outputs are the keys' first parts and the values; else None."""
    _, heads, tokens, key_dim = key.shape
    value_dim, rank = value.shape[3], linear.in_features
    plain = linear.out_features // heads - value_dim
    rotary = key_dim - plain
    if linear.out_features % heads or plain <= 0 or not 0 <= rotary <= MOST_ROTARY or query.shape[1] != heads:
        return None
    if call.input.numel() != tokens * rank or rank + rotary >= heads * (key_dim + value_dim):
        return None
    parts = call.output.reshape(tokens, heads, plain + value_dim).transpose(0, 1).to(key.dtype)
    if not (
        torch.equal(key[0, :, :, :plain], parts[..., :plain])
        and torch.equal(value[0], parts[..., plain:])
        and torch.equal(key[0, :, :, plain:], key[0, :1, :, plain:].expand(heads, -1, -1))
    ):
        return None
    kept = shape._replace(num_kv_heads=1, key_dim=rank + rotary, value_dim=rank, values_in_keys=True)
    return FoundLatents(module, linear, plain, kept)
