"""Asynchronous continuous batching for Hugging Face `generate`.

>>> outputs = model.generate(**inputs, custom_generate=hf_async_batching.generate)  # doctest: +SKIP
"""

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
    "per_token",
]
