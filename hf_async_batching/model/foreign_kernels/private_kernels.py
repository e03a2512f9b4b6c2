"""Give views a private copy of flash-linear-attention's kernels, with settings that need no measuring.

The package measures dozens of variants of each kernel when it first meets a shape: the first token of a Qwen3.5 on an
H200 took 73 seconds, while the caller waited. Its settings belong to the whole process. So views use a second copy of
the package's modules, in which every kernel has one setting. The user's copy stays unchanged.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_async_batching.model.foreign_kernels.kernel_wrappers import rebind_wrappers

logger = logging.getLogger(__name__)

_PACKAGE = "fla"
# The `__init__` of these packages imports every kernel; a model needs only a few.
_HEAVY = ("fla", "fla.ops", "fla.modules")

_own: dict[str, types.ModuleType] = {}
_lock = threading.Lock()


def use_private_kernels(view: nn.Module) -> None:
    """Let a view's modules call the private copy of flash-linear-attention where they call the package.

    This changes nothing if the package is not in use.

    Args:
        view: A view that belongs to the engine.
    """
    if _PACKAGE not in sys.modules:
        return
    try:
        rebind_wrappers(view, _with_own_kernel)
    except Exception as error:  # another release of the package, or of Triton
        logger.info("kernels of %s measure their settings: %r", _PACKAGE, error)


def _with_own_kernel(wrapper: types.FunctionType) -> Callable[..., Any] | None:
    """Return a copy of a wrapper that calls the private copy of its kernel; None if it calls another package."""
    names = wrapper.__code__.co_freevars
    cells = dict(zip(names, wrapper.__closure__ or (), strict=True))
    chosen: Any = cells["implementation"].cell_contents if "implementation" in cells else None
    module = str(getattr(chosen, "__module__", ""))
    if module.partition(".")[0] != _PACKAGE:
        return None
    own = getattr(_own_module(module), chosen.__name__)
    cells["implementation"] = types.CellType(own)
    made = types.FunctionType(
        wrapper.__code__,
        wrapper.__globals__,
        wrapper.__name__,
        wrapper.__defaults__,
        tuple(cells[name] for name in names),
    )
    made.__kwdefaults__ = wrapper.__kwdefaults__
    return made


def _own_module(name: str) -> types.ModuleType:
    """Return the private copy of a module of the package."""
    with _lock:
        if name not in _own:
            _import(name)
        return _own[name]


def _import(name: str) -> None:
    """Import a module of the package and its dependencies once more, and leave each kernel one setting."""
    stubs = {heavy: _stub(sys.modules[heavy]) for heavy in _HEAVY if heavy in sys.modules and heavy not in _own}
    try:
        with _hidden(stubs):
            importlib.import_module(name)
    except ImportError:  # a module imports a name that a stub lacks
        for stub in stubs:
            _own.pop(stub, None)
        with _hidden({}):
            importlib.import_module(name)
    for module in _own.values():
        for value in list(vars(module).values()):
            _settle(value)


def _stub(package: types.ModuleType) -> types.ModuleType:
    """Return a package that has the original's folder and simple attributes, but no kernels."""
    made = types.ModuleType(package.__name__)
    vars(made).update({name: value for name, value in vars(package).items() if isinstance(value, (str, int, float))})
    made.__path__ = list(package.__path__)
    made.__spec__ = package.__spec__
    return made


@contextmanager
def _hidden(stubs: dict[str, types.ModuleType]) -> Iterator[None]:
    """Let imports of the package find the private copies, and keep newly imported modules among them."""
    theirs = dict(_modules())
    for name in theirs:
        del sys.modules[name]
    sys.modules.update({**stubs, **_own})
    try:
        yield
        _own.update(_modules())
    finally:
        for name, _ in _modules():
            del sys.modules[name]
        sys.modules.update(theirs)


def _modules() -> list[tuple[str, types.ModuleType]]:
    return [(n, m) for n, m in list(sys.modules.items()) if n == _PACKAGE or n.startswith(_PACKAGE + ".")]


def _settle(value: Any) -> None:
    """If a value is a kernel with several settings, leave it one."""
    from triton.runtime.autotuner import Autotuner

    while value is not None and not inspect.ismodule(value):
        if isinstance(value, Autotuner):
            if len(value.configs) > 1:
                value.configs = [min(value.configs, key=_distance)]
            return
        value = inspect.getattr_static(value, "fn", None)


def _distance(config: Any) -> tuple[int, int]:
    """Distance of a setting from a medium one, which needs little shared memory."""
    blocks = sum(abs(size.bit_length() - 7) for size in config.kwargs.values() if type(size) is int)
    return abs(config.num_warps.bit_length() - 3) + abs(config.num_stages - 2), blocks
