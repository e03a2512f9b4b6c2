"""What an engine's parts are made from, in the order in which they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model

from hf_async_batching import BatchingConfig, assembly
from hf_async_batching.assembly import assemble


@pytest.mark.parametrize("fused", [True, False])
def test_memory_of_packed_weights_returns_before_the_cache_is_measured(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, torch.device]] = []

    def noted(name: str) -> None:
        made = getattr(assembly, name)

        def note(*arguments: Any, **named: Any) -> Any:
            result = made(*arguments, **named)
            order.append((name, arguments[0] if name.endswith("memory") else None))
            return result

        monkeypatch.setattr(assembly, name, note)

    for name in ("attach_check", "return_memory", "free_memory", "PagedCache"):
        noted(name)
    model = tiny_model("Llama")
    assemble(model, BatchingConfig(max_sequence_length=64, fuse_weights=fused)).engine.close()
    returned = [("return_memory", model.device)] if fused else []
    assert order == [("attach_check", None), *returned, ("free_memory", model.device), ("PagedCache", None)]
