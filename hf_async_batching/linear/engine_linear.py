"""Linear layers of a view: our own kernel computes few rows, and parallel projections share one product.

A view's `nn.Linear` modules become `EngineLinear`s in place. They keep their parameters and all other attributes that
model code may read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import nn

from hf_async_batching.linear.library import gains_by_bias, library_linear
from hf_async_batching.linear.rounding import rounding_tolerance, worst_relative_error

MAX_STRIPS = 8192
"""Length of the kernel's counters: the number of output strips that a product may have."""

_library: Any = torch.library.Library("hf_async_batching", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias, Tensor counters) -> Tensor")
_library.define("linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor counters, Tensor residual) -> Tensor")


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counters: torch.Tensor) -> torch.Tensor:
    few = _few_rows(x, weight, bias, counters) if x.is_cuda else None
    return library_linear(x, weight, bias) if few is None else few


def _linear_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counters: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """The product plus a residual of the same shape."""
    if x.is_cuda:
        few = _few_rows(x, weight, bias, counters, residual)
        if few is not None:
            return few
        if bias is None and x.dtype.itemsize == 2 and not gains_by_bias(x, weight):
            # The vendor's library adds in float32 and then rounds; in float32 the order of sums stays the same.
            flat = torch.addmm(residual.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1]), weight.t())
            return flat.view(residual.shape)
    return library_linear(x, weight, bias) + residual


def _few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The product by our kernel; None if the vendor's library is the better choice."""
    from hf_async_batching.linear import skinny, skinny_settings

    if not skinny.serves(x, weight):
        return None
    setting = skinny_settings.settings_for(x.device).choose(x.numel() // x.shape[-1], weight)
    if setting == skinny.LIBRARY:
        return None
    added = None if residual is None else residual.contiguous()
    return skinny.skinny_linear(x, weight, bias, counters, setting, added)


def _linear_shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,  # noqa: ARG001
    counters: torch.Tensor,  # noqa: ARG001
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_add_shape(
    x: torch.Tensor,  # noqa: ARG001
    weight: torch.Tensor,  # noqa: ARG001
    bias: torch.Tensor | None,  # noqa: ARG001
    counters: torch.Tensor,  # noqa: ARG001
    residual: torch.Tensor,
) -> torch.Tensor:
    return residual.new_empty(residual.shape)


# One operator for every number of rows, so compiled code stays right and fast for all of them.
_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("hf_async_batching::linear", _linear_shape, lib=_library)
_library.impl("linear_add", _linear_add, "CompositeExplicitAutograd")
torch.library.register_fake("hf_async_batching::linear_add", _linear_add_shape, lib=_library)


@dataclass(slots=True, eq=False)
class Bundle:
    """Projections of one input whose weights are adjacent in memory: one product serves all.

    Attributes:
        weight: [sum of outputs, inputs].
        bias: [sum of outputs], or None.
        source: The input of the product `output`; None between two uses.
        output: [..., sum of outputs].
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    source: torch.Tensor | None = None
    output: torch.Tensor | None = None


class EngineLinear(nn.Linear):
    """A linear layer of a view.

    Attributes:
        counters: Scratch memory of the kernel.
        bundle: The projections that share a product with this layer; None if it has its own product.
        begin: Index of its first output among the bundle's outputs.
        end: Index after its last output.
        closes: Whether it is the last layer of the bundle to be called.
        skinny: Whether our kernel computes few rows in uncompiled code too. False if serving starts uncompiled,
            because the first request would wait for the kernel's compilation.
    """

    counters: torch.Tensor
    bundle: Bundle | None
    begin: int
    end: int
    closes: bool
    skinny: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Like `nn.Linear`: [..., in_features] to [..., out_features]; the result may be a view of a product."""
        bundle = self.bundle
        if bundle is None:
            return self._product(input, self.weight, self.bias)
        if bundle.source is not input:
            bundle.output = self._product(input, bundle.weight, bundle.bias)
            bundle.source = input
        output = bundle.output
        assert output is not None
        if self.closes:
            bundle.source = bundle.output = None
        return output[..., self.begin : self.end]

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(x, weight, bias)  # it casts both under autocast
        if torch.compiler.is_dynamo_compiling():
            result: torch.Tensor = torch.ops.hf_async_batching.linear(x, weight, bias, self.counters)
            return result
        if self.skinny:
            return _linear(x, weight, bias, self.counters)
        return library_linear(x, weight, bias)


@torch.inference_mode()
def products_agree(view: nn.Module) -> bool:
    """Whether each linear layer of a view, alone or in its bundle, equals `x @ weight.T + bias` of its weights."""
    bundles: dict[int, list[EngineLinear]] = {}
    for module in view.modules():
        if isinstance(module, EngineLinear):
            bundles.setdefault(id(module if module.bundle is None else module.bundle), []).append(module)
    generator = torch.Generator("cpu").manual_seed(0)
    for modules in bundles.values():
        weight = modules[0].weight
        x = torch.randn(1, 3, weight.shape[1], generator=generator, device="cpu").to(weight.device, weight.dtype)
        for module in sorted(modules, key=lambda one: one.closes):  # the last layer of a bundle drops the product
            want = nn.functional.linear(x, module.weight, module.bias)
            if not worst_relative_error(module(x)[0].float(), want[0].float()) <= rounding_tolerance(x.dtype):
                return False
    return True


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes exactly `x @ weight.T + bias`, with weights that are plain parameters.

    A quantized layer is of another class, or has a weight of another class. An adapter wraps plain layers, and each of
    these layers has its own product.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not (module._forward_pre_hooks or module._forward_hooks)
        and type(module._parameters.get("weight")) is nn.Parameter
        and type(module._parameters.get("bias", module.bias)) in (nn.Parameter, type(None))
    )


def convert(module: nn.Linear, counters: torch.Tensor, *, skinny: bool) -> None:
    """Make a view's linear layer an `EngineLinear` with its own product."""
    module.__class__ = EngineLinear
    linear = cast(EngineLinear, module)
    linear.counters = counters
    linear.bundle = None
    linear.skinny = skinny
    linear.begin, linear.end, linear.closes = 0, linear.out_features, True


def bundle_together(modules: list[nn.Linear], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Let `EngineLinear`s, given in the order of their calls, share one product."""
    bundle = Bundle(weight, bias)
    begin = 0
    for module in modules:
        assert isinstance(module, EngineLinear)
        module.bundle = bundle
        module.begin, module.end = begin, begin + module.out_features
        module.closes = module is modules[-1]
        begin = module.end


def products(view: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Weight, bias and counters of each product in a view."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = {}
    for module in view.modules():
        if isinstance(module, EngineLinear):
            source = module if module.bundle is None else module.bundle
            found.setdefault(id(source), (source.weight, source.bias, module.counters))
    return list(found.values())


@torch.inference_mode()
def ready_products(view: nn.Module, rows: tuple[int, ...]) -> None:
    """Run each shape of product in a view once per number of rows, to compile its kernels."""
    shapes = {(tuple(weight.shape), bias is None): (weight, bias, c) for weight, bias, c in products(view)}
    for weight, bias, counters in shapes.values():
        for count in rows:
            _linear(weight.new_zeros(count, weight.shape[1]), weight, bias, counters)


def tune_products(view: nn.Module, rows: tuple[int, ...]) -> None:
    """Measure settings for a view's products; nothing else may run on the device."""
    found = [(w, counters) for w, _, counters in products(view) if w.is_cuda and w.dtype.itemsize == 2]
    if found:
        from hf_async_batching.linear.skinny_settings import settings_for

        settings_for(found[0][0].device).tune([weight for weight, _ in found], rows, found[0][1])
