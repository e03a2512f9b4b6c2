"""Flash-linear-attention's kernels for our own views, with settings that need no measuring.

The package measures dozens of variants of each kernel the first time that it meets a shape: 73 seconds until the first
token of a Qwen3.5 on an H200, with the caller waiting. Its settings belong to the whole process. So views compute with
a second copy of the package's modules, in which every kernel has one setting; the user's own copy stays as it is.
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
# Their `__init__` imports every kernel there is, of which a model needs a few.
_HEAVY = ("fla", "fla.ops", "fla.modules")

_own: dict[str, types.ModuleType] = {}
_lock = threading.Lock()


def use_private_kernels(view: nn.Module) -> None:
    """Let a view's modules call our copy of flash-linear-attention where they call the package.

    Nothing changes where the package is not in use.

    Args:
        view: A view of our own.
    """
    if _PACKAGE not in sys.modules:
        return
    try:
        rebind_wrappers(view, _with_own_kernel)
    except Exception as error:  # another release of the package, or of Triton
        logger.info("kernels of %s measure their settings: %r", _PACKAGE, error)


def _with_own_kernel(wrapper: types.FunctionType) -> Callable[..., Any] | None:
    """A wrapper of transformers that calls our copy of what it chose; None where it chose something else."""
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
    """Our copy of a module of the package."""
    with _lock:
        if name not in _own:
            _import(name)
        return _own[name]


def _import(name: str) -> None:
    """Import a module of the package, and what it needs, once more; with one setting for each kernel."""
    stubs = {heavy: _stub(sys.modules[heavy]) for heavy in _HEAVY if heavy in sys.modules and heavy not in _own}
    try:
        with _hidden(stubs):
            importlib.import_module(name)
    except ImportError:  # something is taken from what was left out
        for stub in stubs:
            _own.pop(stub, None)
        with _hidden({}):
            importlib.import_module(name)
    for module in _own.values():
        for value in list(vars(module).values()):
            _settle(value)


def _stub(package: types.ModuleType) -> types.ModuleType:
    """A package that has its folder, and what it says of itself."""
    made = types.ModuleType(package.__name__)
    vars(made).update({name: value for name, value in vars(package).items() if isinstance(value, (str, int, float))})
    made.__path__ = list(package.__path__)
    made.__spec__ = package.__spec__
    return made


@contextmanager
def _hidden(stubs: dict[str, types.ModuleType]) -> Iterator[None]:
    """Let imports of the package find our copy's modules, and keep what they import as such."""
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
    """Leave a kernel one of its settings, if it is one."""
    from triton.runtime.autotuner import Autotuner

    while value is not None and not inspect.ismodule(value):
        if isinstance(value, Autotuner):
            if len(value.configs) > 1:
                value.configs = [min(value.configs, key=_distance)]
            return
        value = inspect.getattr_static(value, "fn", None)


def _distance(config: Any) -> tuple[int, int]:
    """How far a setting is from a middling one, which needs little shared memory."""
    blocks = sum(abs(size.bit_length() - 7) for size in config.kwargs.values() if type(size) is int)
    return abs(config.num_warps.bit_length() - 3) + abs(config.num_stages - 2), blocks
