"""Quantized linear layers of a view: our kernels compute few rows, the layer's own product many.

A layer keeps its class's attributes; its weight stays where it lies, and no second copy is made.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, cast

import torch
from torch import nn

from hf_async_batching.linear.quantized.form import LIBRARY
from hf_async_batching.linear.quantized.forms import FORMS, recognise
from hf_async_batching.linear.quantized.settings import settings_for
from hf_async_batching.linear.quantized.weight import QuantizedWeight
from hf_async_batching.linear.rounding import rounding_tolerance, worst_relative_error

logger = logging.getLogger(__name__)

_library: Any = torch.library.Library("hf_async_batching", "FRAGMENT")  # type: ignore[no-untyped-call]
_ARGUMENTS = (
    "Tensor x, Tensor packed, Tensor[] scales, Tensor? bias, Tensor counters, int outputs, int group, str form"
)
_library.define(f"quantized_linear({_ARGUMENTS}) -> Tensor")
_library.define(f"quantized_linear_add({_ARGUMENTS}, Tensor residual) -> Tensor")


def _linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    outputs: int,
    group: int,
    form: str,
) -> torch.Tensor:
    return _product(x, QuantizedWeight(form, packed, tuple(scales), outputs, x.shape[-1], group), bias, counters)


def _linear_add(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    outputs: int,
    group: int,
    form: str,
    residual: torch.Tensor,
) -> torch.Tensor:
    """The product plus a residual of the same shape."""
    weight = QuantizedWeight(form, packed, tuple(scales), outputs, x.shape[-1], group)
    return _product(x, weight, bias, counters, residual)


def _product(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    form = FORMS[weight.form]
    rows = x.numel() // x.shape[-1]
    if x.is_cuda and 1 <= rows <= form.most_rows and form.serves(x, weight):
        setting = settings_for(x.device).choose(rows, weight)
        if setting[0] != LIBRARY:
            added = None if residual is None else residual.contiguous()
            return form.few(x, weight, bias, counters, setting, added)
    out = form.own(x, weight, bias)
    return out if residual is None else out + residual


def _linear_shape(
    x: torch.Tensor,
    packed: torch.Tensor,  # noqa: ARG001
    scales: list[torch.Tensor],  # noqa: ARG001
    bias: torch.Tensor | None,  # noqa: ARG001
    counters: torch.Tensor,  # noqa: ARG001
    outputs: int,
    group: int,  # noqa: ARG001
    form: str,  # noqa: ARG001
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def _linear_add_shape(*arguments: Any) -> torch.Tensor:
    residual: torch.Tensor = arguments[-1]
    return residual.new_empty(residual.shape)


_library.impl("quantized_linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("hf_async_batching::quantized_linear", _linear_shape, lib=_library)
_library.impl("quantized_linear_add", _linear_add, "CompositeExplicitAutograd")
torch.library.register_fake("hf_async_batching::quantized_linear_add", _linear_add_shape, lib=_library)


class EngineQuantized(nn.Module):
    """A quantized linear layer of a view; `convert` makes a class of this one and the layer's own.

    Attributes:
        quantized: Its weight.
        counters: Scratch memory of the kernels.
        skinny: Whether our kernels compute few rows in uncompiled code too; see `EngineLinear`.
    """

    quantized: QuantizedWeight
    counters: torch.Tensor
    skinny: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Like the layer's own forward: [..., inputs] to [..., outputs]."""
        compiling = torch.compiler.is_dynamo_compiling()
        if torch.is_autocast_enabled(x.device.type) or not (compiling or self.skinny):
            return cast(torch.Tensor, super().forward(x))
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The same by our operator."""
        form, packed, scales, outputs, _, group, dtype = self.quantized
        computed = x if dtype is None or x.dtype == dtype else x.to(dtype)
        bias = cast("torch.Tensor | None", self.bias)
        if bias is not None and bias.dtype != computed.dtype:
            bias = bias.to(computed.dtype)
        out: torch.Tensor = torch.ops.hf_async_batching.quantized_linear(
            computed, packed, list(scales), bias, self.counters, outputs, group, form
        )
        return out if out.dtype == x.dtype else out.to(x.dtype)


@functools.cache
def _engine_class(kind: Any) -> Any:
    return type(f"Engine{kind.__name__}", (EngineQuantized, kind), {})


def convert_quantized(view: nn.Module, counters: torch.Tensor, *, skinny: bool) -> int:
    """Let our products compute the quantized linear layers of a view that have a known form.

    Args:
        view: The view; its layers are changed in place.
        counters: Scratch memory of the kernels, int32, as many as a product has outputs.
        skinny: Whether uncompiled code uses our kernels too; they are then compared with the layers' forwards now.

    Returns:
        The number of layers that were converted.
    """
    converted = 0
    for module in view.modules():
        weight = recognise(module)
        if weight is not None:
            layer = cast(EngineQuantized, module)
            kind: Any = type(module)
            layer.__class__ = _engine_class(kind)
            layer.quantized, layer.counters, layer.skinny = weight, counters, skinny
            converted += 1
    if skinny and converted:
        keep_equal(view)
    return converted


def revert(module: EngineQuantized) -> None:
    """Give a converted layer its own forward back."""
    module.__class__ = type(module).__mro__[2]
    del module.quantized, module.counters, module.skinny


def quantized_layers(view: nn.Module) -> list[EngineQuantized]:
    """The converted layers of a view."""
    return [module for module in view.modules() if isinstance(module, EngineQuantized)]


@torch.inference_mode()
def keep_equal(view: nn.Module) -> list[str]:
    """Compare one layer of each kind with its own forward, and revert the kinds that differ.

    Returns:
        What was reverted, for messages.
    """
    kinds: dict[tuple[object, ...], list[EngineQuantized]] = {}
    for layer in quantized_layers(view):
        w = layer.quantized
        kinds.setdefault((w.form, w.group, len(w.scales), w.dtype, layer.bias is None), []).append(layer)
    dtypes = {p.dtype for p in view.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    failed = []
    for layers in kinds.values():
        reason = _difference(layers[0], layers[0].quantized.dtype or min(dtypes, key=str, default=torch.float32))
        if reason is not None:
            failed.append(f"{type(layers[0]).__mro__[2].__name__} ({layers[0].quantized.form}): {reason}")
            for layer in layers:
                revert(layer)
    for one in failed:
        logger.warning("quantized layers keep their own forward: %s", one)
    return failed


def _difference(layer: EngineQuantized, dtype: torch.dtype) -> str | None:
    """Why our product must not stand for a layer's own forward; None if they are equal up to rounding."""
    weight = layer.quantized
    generator = torch.Generator("cpu").manual_seed(0)
    own = super(EngineQuantized, layer).forward
    for rows in (2, 17, 64, 65):
        x = torch.randn(1, rows, weight.inputs, generator=generator, device="cpu").to(weight.packed.device, dtype)
        try:
            error = worst_relative_error(layer.product(x)[0].float(), own(x)[0].float())
        except torch.AcceleratorError:  # the device itself
            raise
        except Exception as raised:  # compilers fail in many ways
            logger.debug("a quantized product fails", exc_info=True)
            return f"{type(raised).__name__}: {raised}"
        if not error <= rounding_tolerance(dtype):
            return f"the relative error of {rows} rows is {error:.2g}"
    return None


@torch.inference_mode()
def ready_quantized(view: nn.Module, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Run each shape of quantized product in a view once per number of rows, to compile its kernels."""
    seen: dict[tuple[object, ...], EngineQuantized] = {}
    for layer in quantized_layers(view):
        w = layer.quantized
        seen.setdefault((w.form, w.outputs, w.inputs, w.group, w.dtype, layer.bias is None), layer)
    for layer in seen.values():
        for count in rows:
            w = layer.quantized
            layer.product(torch.zeros(1, count, w.inputs, dtype=w.dtype or dtype, device=w.packed.device))


def tune_quantized(view: nn.Module, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Measure settings for a view's quantized products; nothing else may run on the device."""
    weights = [layer.quantized for layer in quantized_layers(view) if layer.quantized.packed.is_cuda]
    if weights:
        settings_for(weights[0].packed.device).tune(weights, weights[0].dtype or dtype, rows)
