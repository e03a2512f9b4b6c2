"""Asynchronous continuous batching for Hugging Face `generate`.

Each name is imported when it is first used, so that the command line can answer without torch and transformers.

>>> outputs = model.generate(**inputs, custom_generate=hf_async_batching.generate)  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_async_batching.config import BatchingConfig
    from hf_async_batching.core.timeline import StepRecord, Timeline
    from hf_async_batching.dataset.generate import generate_dataset
    from hf_async_batching.dataset.run.progress import DatasetProgress
    from hf_async_batching.drop_in.generate import generate
    from hf_async_batching.engine.stats import Stats
    from hf_async_batching.errors import (
        DatasetRowError,
        EngineClosedError,
        EngineFailedError,
        ForkedProcessError,
        HfAsyncBatchingError,
        InvalidProbabilitiesError,
        QueueFullError,
        ReentrantCallError,
        RequestTooLongError,
        ResumeMismatchError,
        UnsupportedArgumentError,
        UnsupportedModelError,
    )
    from hf_async_batching.experts.mxfp4_model import keep_mxfp4
    from hf_async_batching.handle import GenerationHandle, GenerationResult, RequestMetrics
    from hf_async_batching.manager import GenerationManager
    from hf_async_batching.model.view.module_calls import per_token
    from hf_async_batching.registry import get_manager

__version__ = "0.1.0"

__all__ = [
    "BatchingConfig",
    "DatasetProgress",
    "DatasetRowError",
    "EngineClosedError",
    "EngineFailedError",
    "ForkedProcessError",
    "GenerationHandle",
    "GenerationManager",
    "GenerationResult",
    "HfAsyncBatchingError",
    "InvalidProbabilitiesError",
    "QueueFullError",
    "ReentrantCallError",
    "RequestMetrics",
    "RequestTooLongError",
    "ResumeMismatchError",
    "Stats",
    "StepRecord",
    "Timeline",
    "UnsupportedArgumentError",
    "UnsupportedModelError",
    "generate",
    "generate_dataset",
    "get_manager",
    "keep_mxfp4",
    "per_token",
]

_MODULES = {
    "config": ("BatchingConfig",),
    "core.timeline": ("StepRecord", "Timeline"),
    "dataset.generate": ("generate_dataset",),
    "dataset.run.progress": ("DatasetProgress",),
    "drop_in.generate": ("generate",),
    "engine.stats": ("Stats",),
    "errors": (
        "DatasetRowError",
        "EngineClosedError",
        "EngineFailedError",
        "ForkedProcessError",
        "HfAsyncBatchingError",
        "InvalidProbabilitiesError",
        "QueueFullError",
        "ReentrantCallError",
        "RequestTooLongError",
        "ResumeMismatchError",
        "UnsupportedArgumentError",
        "UnsupportedModelError",
    ),
    "experts.mxfp4_model": ("keep_mxfp4",),
    "handle": ("GenerationHandle", "GenerationResult", "RequestMetrics"),
    "manager": ("GenerationManager",),
    "model.view.module_calls": ("per_token",),
    "registry": ("get_manager",),
}

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker must not take any name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
