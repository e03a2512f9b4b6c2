"""What an engine's parts are made from, in the order in which they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model

from hf_async_batching import BatchingConfig
from hf_async_batching.coverage.families import tiny_model as coverage_model
from hf_async_batching.engine import builder, route
from hf_async_batching.engine.builder import build_engine
from hf_async_batching.model.forward.packed_forward import PackedForward


@pytest.mark.parametrize("fused", [True, False])
def test_memory_of_packed_weights_returns_before_the_cache_is_measured(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, torch.device]] = []

    def noted(name: str) -> None:
        home = route if name == "check_parity" else builder
        made = getattr(home, name)

        def note(*arguments: Any, **named: Any) -> Any:
            result = made(*arguments, **named)
            order.append((name, arguments[0] if name.endswith("memory") else None))
            return result

        monkeypatch.setattr(home, name, note)

    for name in ("check_parity", "return_memory", "free_memory", "PagedCache"):
        noted(name)
    model = tiny_model("Llama")
    build_engine(model, BatchingConfig(max_sequence_length=64, fuse_weights=fused)).engine.close()
    returned = [("return_memory", model.device)] if fused else []
    assert order == [("check_parity", None), *returned, ("free_memory", model.device), ("PagedCache", None)]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"compile": True, "fuse_weights": True}, True),
        ({"compile": True, "fuse_weights": False}, True),
        ({"compile": False, "fuse_weights": True}, False),
        ({"compile": True, "fuse_weights": False, "attach_check": False}, False),
    ],
)
def test_the_view_that_was_checked_is_the_one_to_compile(
    settings: dict[str, Any], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    views: list[Any] = []
    check = route.check_parity

    def checked(*arguments: Any) -> Any:
        views.append(check(*arguments))
        return views[-1]

    monkeypatch.setattr(route, "check_parity", checked)
    made = build_engine(tiny_model("Llama"), BatchingConfig(max_sequence_length=64, **settings))
    made.engine.close()
    assert made.view is (views[0] if kept else None)


def test_a_view_of_a_model_that_is_never_compiled_is_not_kept() -> None:
    made = build_engine(coverage_model("BloomForCausalLM"), BatchingConfig(max_sequence_length=64, compile=True))
    made.engine.close()
    assert not isinstance(made.forward, PackedForward) and made.view is None


@pytest.mark.parametrize(
    ("family", "compile", "rows"), [("Llama", True, 2), ("Mixtral", True, 1), ("Llama", False, 1)]
)
def test_an_engine_of_one_row_has_a_padding_row_beside_it_where_it_decodes_in_compiled_code(
    family: str, compile: bool, rows: int
) -> None:
    made = build_engine(tiny_model(family), BatchingConfig(max_sequence_length=64, max_rows=1, compile=compile))
    made.engine.close()
    assert made.config.max_rows == 1
    assert made.runner._buckets == [rows]
    # As many entries as the smallest step decodes.
    assert made.runner._state.decode_rows.numel() == rows
