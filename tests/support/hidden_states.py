"""Layers with states that are not recognised: their families are then served through their own cache class."""

from __future__ import annotations

import pytest

from hf_async_batching.model.forward import state_mixers
from hf_async_batching.recurrent.calls import REPLACED


def hide_functions(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let layers that call these functions of transformers be unknown; all functions if none is named."""
    known = {name: ours for name, ours in REPLACED.items() if names and name not in names}
    monkeypatch.setattr(state_mixers, "REPLACED", known)
