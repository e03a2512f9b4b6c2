"""No value of any field hurts a request beside it; see `support.field_fuzz`."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from support.field_fuzz import fuzz
from support.tiny_models import tiny_model

from hf_async_batching import BatchingConfig, GenerationManager


@pytest.mark.parametrize("thin", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["thin", "all"])
def test_odd_values_are_served_as_by_generate_or_refused_by_name(thin: bool, capsys: Any) -> None:
    model, level = tiny_model("Llama"), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with GenerationManager(model, BatchingConfig(page_size=16, depth=2)) as manager:
            counts = fuzz(model, manager, thin=thin)
    finally:
        transformers.logging.set_verbosity(level)
    with capsys.disabled():
        print(f"\n{counts}")
    assert not counts.faults, "\n".join(counts.faults)
    assert not counts.hurt
    assert counts.served > counts.tried // 4
    assert counts.refused.total() > counts.tried // 4
