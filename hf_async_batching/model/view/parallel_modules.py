"""The modules of a model that carry its tensor parallelism."""

from __future__ import annotations

from typing import Any

from torch import nn

# Of the model: what its parallelism hangs on, which no copy can have of its own.
_ATTRIBUTES = ("_mesh_manager", "_device_mesh")


def parallel_modules(model: nn.Module) -> list[nn.Module]:
    """Layers whose `forward` transformers has replaced by one with collectives.

    The replacement is bound to the layer itself. A view has the layers themselves, not copies of them: they know
    nothing of attention or of training.
    """
    return [module for module in model.modules() if "forward" in vars(module) and vars(module).get("_is_hooked")]


def unique_objects(model: nn.Module) -> list[Any]:
    """Process groups' handles, of which there is one."""
    mesh = [vars(model)[name] for name in _ATTRIBUTES if vars(model).get(name) is not None]
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    return mesh if config is None else [*mesh, config]
