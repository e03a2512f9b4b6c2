"""Settings: what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_async_batching.config as config_module
from hf_async_batching.config import BatchingConfig


@pytest.mark.parametrize(
    ("field", "bad", "good"),
    [
        ("depth", (0, -1), (1, 5)),
        ("page_size", (0, 8, 24, 512), (16, 32, 64, 128, 256)),
        ("max_rows", (0, -3), (1,)),
        ("max_batch_tokens", (0,), (1,)),
        ("max_sequence_length", (0,), (1,)),
        ("num_pages", (0,), (1,)),
        ("memory_fraction", (0.0, -0.5, 1.01, float("nan")), (1e-3, 1.0)),
        ("prompt_lookup_rows", (-1,), (0, 4)),
        ("max_waiting", (0,), (1,)),
        ("idle_timeout", (0, -1.0), (0.1, None)),
        ("attention_backend", ("flash", "", None), ("auto", "torch", "triton")),
        ("timeline_steps", (0,), (1,)),
    ],
)
def test_ranges(field: str, bad: tuple[Any, ...], good: tuple[Any, ...]) -> None:
    for value in bad:
        with pytest.raises(ValueError, match=f"`{field}` must be"):
            BatchingConfig(**{field: value})
    for value in good:
        assert getattr(BatchingConfig(**{field: value}), field) == value


def test_the_budget_holds_every_row() -> None:
    with pytest.raises(ValueError, match=r"`max_batch_tokens` \(3\) must be at least `max_rows` \(4\)"):
        BatchingConfig(max_rows=4, max_batch_tokens=3)
    assert BatchingConfig(max_rows=4, max_batch_tokens=4).max_rows == 4


def test_settings_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BatchingConfig().depth = 3  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    assert BatchingConfig.__doc__ is not None
    for field in dataclasses.fields(BatchingConfig):
        assert f"\n        {field.name}: " in BatchingConfig.__doc__


def test_for_a_model_that_is_spread_over_ranks() -> None:
    config = BatchingConfig(depth=3).for_ranks()
    assert (config.depth, config.compile, config.fuse_weights) == (3, False, False)
    for graphs in (None, False, True):
        assert BatchingConfig(cuda_graphs=graphs).for_ranks().cuda_graphs is graphs
    with pytest.raises(ValueError, match="`compile`"):
        BatchingConfig(compile=True).for_ranks()
    with pytest.raises(ValueError, match="`fuse_weights`"):
        BatchingConfig(fuse_weights=True).for_ranks()


def test_settings_need_no_torch() -> None:
    """The scheduler reads them, and it imports no torch; the package itself is left out here, which imports all."""
    code = (
        "import sys, types; package = types.ModuleType('hf_async_batching'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['hf_async_batching'] = package; import hf_async_batching.config; "
        "sys.exit('torch' in sys.modules)"
    )
    folder = str(Path(config_module.__file__).parent)
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == 0


def test_an_unknown_setting_is_answered_with_what_was_meant() -> None:
    with pytest.raises(TypeError, match=r"BatchingConfig\(\) has no `max_row`; did you mean `max_rows`\?"):
        BatchingConfig(**{"max_row": 3})
    with pytest.raises(TypeError, match="has no `colour`; it has depth, page_size, "):
        BatchingConfig(**{"colour": 3})
    assert list(inspect.signature(BatchingConfig).parameters)[:2] == ["depth", "page_size"]
    config = BatchingConfig(2, max_rows=3)
    assert pickle.loads(pickle.dumps(config)) == config == dataclasses.replace(BatchingConfig(2), max_rows=3)
