"""Entry point for `model.generate(..., custom_generate="owner/name", trust_remote_code=True)`."""

from typing import Any

import hf_async_batching


def generate(model: Any, **arguments: Any) -> Any:
    """Serve the call with the asynchronous engine; the arguments are those of `model.generate`."""
    return hf_async_batching.generate(model, **arguments)
