"""Settings that must be made before anything else is imported."""

import atexit
import ctypes
import faulthandler
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

# Several processes run the tests (pytest-xdist): they share the processors, but not the folder into which transformers
# copies modules, file by file.
if "PYTEST_XDIST_WORKER" in os.environ:
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# Nothing in the tests needs the Hub; without this each look for it waits for a time-out where there is none.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _has_gpu() -> bool:
    """Whether torch can use a GPU; where there is no driver, torch need not be imported to know."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return False
    import torch

    return torch.cuda.is_available()


# Triton decides when it is imported whether its kernels run on the GPU or in its interpreter. The conftest of a folder
# may import it before any hook of this file runs.
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Files that take a minute or more: begun first, they are not what one process still does while the other has ended.
_LONG = (
    "test_smollm2.py",
    "test_app.py",
    "test_asynchrony.py",
    "test_readme.py",
    "test_ahead_of_time.py",
    "test_triton_kernels.py",
    "test_attacks.py",
    "test_visit.py",
    "test_two_ranks.py",
    "test_api.py",
    "test_regions.py",
    "test_manager.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first where several processes run the tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        names = {name: place for place, name in enumerate(_LONG)}
        items.sort(key=lambda item: names.get(Path(item.path).name, len(names)))


_FREE = 2 << 30


@pytest.fixture(autouse=True, scope="session")
def _little_free_memory() -> Iterator[None]:
    """Let the machine seem to have 2 GiB of free memory.

    On a CPU transformers' own batching takes nine tenths of what is free and fills it with zeros, at about a second
    per GiB. An engine of ours takes a quarter; no test should depend on the machine's size.
    """
    of_machine, process = psutil.virtual_memory, psutil.Process()

    def little() -> Any:
        memory = of_machine()
        total = min(memory.total, process.memory_info().rss + _FREE)
        return memory._replace(total=total, available=min(memory.available, _FREE))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", little)
        yield


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's tracing and guards with its operators run as they are: Inductor would take a minute on a CPU."""
    from hf_async_batching.engine import background_compile

    compile_checked = background_compile.compile_checked
    monkeypatch.setattr(
        background_compile,
        "compile_checked",
        lambda forward, backend, **options: compile_checked(forward, backend, "eager", **options),
    )


# A time limit of pytest-timeout is an exception in the main thread. Code that waits inside of a library never sees it,
# and code that waits again while it cleans up has used it up. So many seconds later the process ends, with its stacks.
_GRACE = 120


def pytest_configure(config: pytest.Config) -> None:
    """Keep the standard error that pytest is about to capture, and prepare a process that runs tests."""
    config.stash[_STDERR] = os.dup(2)
    if "PYTEST_XDIST_WORKER" not in os.environ and config.getoption("numprocesses", None):
        return  # it only hands tests out, and what it imports delays their start
    # The imports make a million objects that live on. Each collection would look through all of them again.
    gc.disable()
    import torch  # noqa: F401  # a warning of its import is not an error of the first test file


def pytest_collection_finish() -> None:
    """Spare collections what the imports made: a full one looks at the objects of the tests, and takes no second."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let the end of the process find what is no longer used: nanobind reports the rest as leaked."""
    gc.unfreeze()


_STDERR = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the process of a test that does not even end at its time limit."""
    marker = item.get_closest_marker("timeout")
    limit = marker.args[0] if marker is not None else float(item.config.getini("timeout"))
    faulthandler.dump_traceback_later(limit + _GRACE, exit=True, file=item.config.stash[_STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
