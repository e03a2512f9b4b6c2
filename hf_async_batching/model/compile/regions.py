"""Compile a view's repeated layers, once for all layers and for any number of tokens.

A transformer's layers run the same code, so one layer is compiled and its code serves all others; this keeps the start
short. The modules around the layers (final norm, rotary frequencies) are compiled too. Weights and pages are inputs of
the compiled code. torch.compile specializes on sizes 0 and 1, so a step of a single token runs uncompiled, or has code
of its own.
"""

from __future__ import annotations

import itertools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_async_batching.linear.rounding import rounding_tolerance
from hf_async_batching.model.compile.pdl_check import generated_code_waits
from hf_async_batching.model.compile.real_rotation import make_rotations_real
from hf_async_batching.model.compile.residual_fusion import fuse_expert_sums, fuse_residual_sums
from hf_async_batching.model.compile.router_fusion import fuse_routers
from hf_async_batching.model.view.position_cache import PositionCache

logger = logging.getLogger(__name__)

Compiler = Callable[[torch.fx.GraphModule, list[Any]], Any]
"""A backend of `torch.compile`."""

# Number of tokens in the example that is compiled with. It is odd and unlike any model's sizes, so a dimension of this
# size counts tokens.
EXAMPLE_TOKENS = 37

_numbers = itertools.count()


class UnsafePdlError(RuntimeError):
    """Compiled code must not use programmatic dependent launch."""


class Region:
    """The compiled forward of modules that share their code.

    Args:
        modules: Modules of one class; one of them is compiled for all.
        backend: Backend of `torch.compile`.

    Attributes:
        marking: Set while the example runs: dimensions of size `EXAMPLE_TOKENS` are then marked as dynamic.
        single: Whether a step of a single token runs compiled code of its own, which its first such step makes.
        compared: If it is a list, compiled and uncompiled code both run. Each call appends a bool [tokens]: the tokens
            on which they agree. The uncompiled result is passed on.
    """

    def __init__(self, modules: list[nn.Module], backend: Compiler) -> None:
        self.marking = self.single = False
        self.compared: list[torch.Tensor] | None = None
        self.modules = modules
        original = type(modules[0]).forward
        self._original: Callable[..., Any] = original

        self._compiled = self._compile(backend)
        self._compiled_single = self._compile(backend)
        self._before = [vars(module).get("forward") for module in modules]
        for module in modules:
            module.forward = types.MethodType(_RegionCall(self), module)

    def _compile(self, backend: Compiler) -> Callable[..., Any]:
        original = self._original

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return original(module, *args, **kwargs)

        # Dynamo caches compiled code by code object, for all engines and the user's own torch.compile together. It
        # gives up beyond a few variants. So each caller gets a code object of its own.
        name = f"region_{next(_numbers)}"
        own = types.FunctionType(
            call.__code__.replace(co_name=name), call.__globals__, name, call.__defaults__, call.__closure__
        )
        compiled: Callable[..., Any] = torch.compile(own, backend=backend, fullgraph=True)
        return compiled

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward of one of the modules."""
        compiled = self._compiled
        if _tokens((*args, *kwargs.values())) == 1:
            if not self.single:
                return self._original(module, *args, **kwargs)
            compiled = self._compiled_single
        if self.marking:
            _mark((*args, *kwargs.values()))
        if self.compared is None:
            return compiled(module, *args, **kwargs)
        given = args[0].clone() if args and isinstance(args[0], torch.Tensor) else None
        want = self._original(module, *(args if given is None else (given.clone(), *args[1:])), **kwargs)
        got = compiled(module, *args, **kwargs)
        self.compared.append(_tokens_alike(_first(got), _first(want), given))
        return want

    def remove(self) -> None:
        """Restore the forwards that the modules had before."""
        for module, before in zip(self.modules, self._before, strict=True):
            del module.forward
            if before is not None:
                module.forward = before


class _RegionCall:
    """`forward` of a module in a region; a named object is easier to recognise in a trace than a closure."""

    def __init__(self, region: Region) -> None:
        self._region = region

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._region.run(module, args, kwargs)


def _tokens(values: tuple[Any, ...]) -> int:
    """Size of dimension 1 of the first tensor: [1, tokens, ...]."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return value.shape[1]
    return 1


def _first(out: Any) -> torch.Tensor:
    """The tensor [1, tokens, ...] that a module returns, alone or as the first of several."""
    tensor: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
    return tensor


def _tokens_alike(got: torch.Tensor, want: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """Which tokens have equal results up to rounding, relative to what the module adds to its input.

    Args:
        got: Compiled result, [1, tokens, ...].
        want: Uncompiled result, [1, tokens, ...].
        given: The module's input; if its shape is the result's, the module adds to it.

    Returns:
        Bool [tokens].
    """

    def norm(values: torch.Tensor) -> torch.Tensor:
        norms: torch.Tensor = values.float().flatten(2).norm(dim=-1)
        return norms[0]

    added = want - given if given is not None and given.shape == want.shape else want
    # Adding a small number to a large one loses bits of the small one.
    tolerance, eps = rounding_tolerance(want.dtype), torch.finfo(want.dtype).eps
    return norm(got - want) <= tolerance * norm(added) + 2 * eps * norm(want)


def share_of_equal_tokens(regions: list[Region], run: Callable[[], Any]) -> float:
    """Compare compiled and uncompiled code module by module, each with the same input.

    A router that rounds to another expert changes everything after it, so comparing whole forwards says little. In one
    module, such a router changes a few tokens; a miscompiled module changes most tokens.

    Args:
        regions: All regions of a view.
        run: Runs the view.

    Returns:
        The share of tokens that are equal up to rounding, in the region where it is smallest. 0 if one token is wrong
        in most layers: a router's rounding affects other tokens in each layer.
    """
    for region in regions:
        region.compared = []
    try:
        run()
        alike = [torch.stack(region.compared).float() for region in regions if region.compared]
    finally:
        for region in regions:
            region.compared = None
    # A module that occurs once has no router.
    if any(not one.all() for one in alike if len(one) == 1) or any(one.mean(0).min() < 0.25 for one in alike):
        return 0.0
    return min((float(one.mean()) for one in alike), default=0.0)


def _mark(values: Any) -> None:
    if isinstance(values, torch.Tensor):
        for dimension, size in enumerate(values.shape):
            if size == EXAMPLE_TOKENS:
                torch._dynamo.mark_dynamic(values, dimension)
    elif isinstance(values, (tuple, list)):
        for value in values:
            _mark(value)
    elif isinstance(values, dict):
        _mark(tuple(values.values()))
    elif isinstance(values, PositionCache):
        _mark(values.before)


def compile_regions(
    view: PreTrainedModel,
    mixing_modules: set[int],
    run_example: Callable[[], Any],
    backend: str | Compiler = "inductor",
    *,
    pdl: bool = False,
    run_single: Callable[[], Any] | None = None,
) -> list[Region]:
    """Replace the forwards of a view's layers by compiled ones, and compile them now.

    Args:
        view: A view that no other thread runs.
        mixing_modules: Identities of its modules that mix tokens: attention, and layers with states.
        run_example: Runs the view over `EXAMPLE_TOKENS` tokens.
        backend: Backend of `torch.compile`.
        pdl: Use programmatic dependent launch; see `pdl_check`.
        run_single: Runs the view over one token, so that such steps are compiled as well. None if they need not be.

    Returns:
        The regions.

    Raises:
        UnsafePdlError: A kernel would not wait for its predecessor; the layers have their own forwards again.
        Exception: Any error of the compiler; the layers have their own forwards again.
    """
    compiler = _with_fusions(backend, pdl)
    regions = [Region(modules, compiler) for modules in region_modules(view, mixing_modules)]
    for region in regions:
        region.marking = True
    try:
        run_example()
        for region in regions:
            region.marking = False
        if run_single is not None:
            _compile_single(regions, run_single)
        if pdl and not generated_code_waits():
            raise UnsafePdlError("a generated kernel would not wait for its predecessor")
    except Exception as error:
        remove_regions(regions)
        if pdl and not generated_code_waits():  # torch.compile wraps the errors of its backend
            raise UnsafePdlError("a generated kernel would not wait for its predecessor") from error
        raise
    return regions


def _compile_single(regions: list[Region], run_single: Callable[[], Any]) -> None:
    for region in regions:
        region.single = True
    try:
        run_single()
    except torch.AcceleratorError:  # the device itself
        raise
    except Exception:
        logger.info("a step of one token runs uncompiled", exc_info=True)
        for region in regions:
            region.single = False


def remove_regions(regions: list[Region]) -> None:
    """Restore the forwards that the modules of these regions had before."""
    for region in regions:
        region.remove()


def _with_fusions(backend: str | Compiler, pdl: bool) -> Compiler:
    options = inductor_options(pdl)

    def compiler(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        fuse_routers(module.graph)
        fuse_residual_sums(module.graph)
        fuse_expert_sums(module.graph)
        make_rotations_real(module.graph)
        module.recompile()
        if backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            compiled = compile_fx(module, inputs, config_patches=options)
        else:
            chosen: Any = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
            compiled = chosen(module, inputs)
        # Check before the code runs: reading an index that is not written yet breaks the process's CUDA context.
        if pdl and not generated_code_waits():
            raise UnsafePdlError("a generated kernel would not wait for its predecessor")
        return compiled

    return compiler


def region_modules(view: PreTrainedModel, mixing_modules: set[int]) -> list[list[nn.Module]]:
    """Modules to compile, grouped by class: layers that mix tokens, and small modules next to the layer list."""
    groups: dict[type, list[nn.Module]] = {}
    for owner in view.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and _holds(child, mixing_modules):
                for layer in child:
                    groups.setdefault(type(layer), []).append(layer)
                for beside in owner.children():
                    if not isinstance(beside, (nn.ModuleList, nn.Embedding, nn.Linear, nn.Dropout, nn.Identity)):
                        groups.setdefault(type(beside), []).append(beside)
                return list(groups.values())
    return []


def _holds(modules: nn.ModuleList, mixing_modules: set[int]) -> bool:
    return any(id(module) in mixing_modules for layer in modules for module in layer.modules())


def inductor_options(pdl: bool = False) -> dict[str, Any]:
    """Inductor's settings for small kernels in a captured graph; `pdl` turns programmatic dependent launch on."""
    # Measuring variants would synchronize the device, which breaks a capture in the engine's thread.
    return {"triton.autotune_pointwise": False, "triton.enable_pdl": pdl}
