"""Layers with states are compiled, and compared with the uncompiled ones without moving their states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.checks import parity_check
from hf_async_batching.checks.parity_check import compile_checked
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.model.forward.packed_forward import PackedForward

FAMILIES = [
    "Qwen3_5ForCausalLM",
    "Lfm2ForCausalLM",
    "Mamba2ForCausalLM",
    "FalconH1ForCausalLM",
    "KimiLinearForCausalLM",
]


def tables_of(forward: PackedForward) -> dict[Any, torch.Tensor]:
    assert forward._cache is not None
    tables = forward._cache.states(3, forward.states)
    return {key: tables.table(key, *state) for key, state in forward.states.items()}


@pytest.mark.parametrize("class_name", FAMILIES)
def test_compiled_layers_agree_and_keep_states(class_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[float] = []
    share = parity_check.share_of_equal_tokens

    def watched(regions: Any, run: Any) -> float:
        tables = tables_of(forward)
        before = {key: table.clone() for key, table in tables.items()}
        assert all(table[1:].any() for table in tables.values())
        compared.append(share(regions, run))
        assert all(table.equal(before[key]) for key, table in tables.items()), "each layer has run twice"
        return compared[-1]

    # The logits count as different, so that the layers are compared one by one.
    monkeypatch.setattr(parity_check, "share_of_equal_tokens", watched)
    monkeypatch.setattr(parity_check, "makes_choices", lambda _: True)
    monkeypatch.setattr(parity_check, "logits_tolerance", lambda _: -1.0)
    forward = PackedForward(tiny_model(class_name))
    compile_checked(forward, TorchBackend(), "eager")
    assert forward.regions
    assert compared == [1.0, 1.0, 1.0], "prompts, two rows, a row alone"
