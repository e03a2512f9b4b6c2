"""Find the modules of a model that carry its tensor parallelism."""

from __future__ import annotations

from typing import Any

from torch import nn

# Attributes of the model that its parallelism depends on; a copy must share them.
_ATTRIBUTES = ("_mesh_manager", "_device_mesh")


def parallel_modules(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose `forward` transformers has replaced by one with collectives.

    The replacement is bound to the layer itself, so a view holds the layer and not a copy. Such layers depend neither
    on the attention implementation nor on the training mode.
    """
    return [module for module in model.modules() if "forward" in vars(module) and vars(module).get("_is_hooked")]


def unique_objects(model: nn.Module) -> list[Any]:
    """Return the handles of process groups, which cannot be copied."""
    mesh = [vars(model)[name] for name in _ATTRIBUTES if vars(model).get(name) is not None]
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    return mesh if config is None else [*mesh, config]
