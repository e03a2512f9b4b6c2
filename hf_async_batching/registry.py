"""One shared manager per model, for calls that pass no manager."""

from __future__ import annotations

import weakref

from transformers import PreTrainedModel

from hf_async_batching.config import BatchingConfig
from hf_async_batching.manager import GenerationManager
from hf_async_batching.model.view.unwrap import unwrap
from hf_async_batching.runtime.forking import ForkSafeLock

_CLOSE_TIMEOUT = 5.0

_lock = ForkSafeLock()
_finalizers: weakref.WeakKeyDictionary[PreTrainedModel, weakref.finalize[..., PreTrainedModel]] = (
    weakref.WeakKeyDictionary()
)
_managers: weakref.WeakKeyDictionary[PreTrainedModel, GenerationManager] = weakref.WeakKeyDictionary()


def get_manager(model: PreTrainedModel, config: BatchingConfig | None = None) -> GenerationManager:
    """Return the manager that all `generate` calls on `model` share, from any thread; the first call makes it.

    It lives as long as the model, stops when idle, and is replaced by a new one after `close()`.

    Args:
        model: A causal language model, possibly inside `PeftModel` or `torch.compile`; the manager belongs to the
            inner model.
        config: Settings for the first call; None accepts an existing manager's settings.

    Raises:
        ValueError: The model has a manager with other settings.
        UnsupportedModelError: The model cannot be served.
    """
    model = unwrap(model)
    with _lock:
        manager = _managers.get(model)
        if manager is None or manager.closed:
            if model in _finalizers:
                _finalizers[model].detach()
            manager = GenerationManager.for_registry(model, config)
            _managers[model] = manager
            # With a time limit, because the garbage collector may run this in any thread. At exit managers close
            # themselves.
            _finalizers[model] = weakref.finalize(model, manager.close, _CLOSE_TIMEOUT)
            _finalizers[model].atexit = False
        elif config is not None and config != manager.config:
            raise ValueError(
                "this model's shared manager runs with another BatchingConfig; call "
                "hf_async_batching.get_manager(model).close() first, or make a GenerationManager of your own"
            )
        return manager
