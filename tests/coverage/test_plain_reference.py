"""The model whose `generate` is the reference."""

from __future__ import annotations

import copy
import types

import pytest
import torch

from hf_async_batching.coverage import families
from hf_async_batching.coverage.families import check_family, tiny_model
from hf_async_batching.coverage.plain_reference import exact_reference, reference
from hf_async_batching.model.foreign_kernels import reference_kernels

NAME = "Qwen3NextForCausalLM"


def test_in_float32_it_computes_without_kernels_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_kernels, "find_spec", lambda _: True)
    model = tiny_model(NAME)
    plain = exact_reference(model)
    assert plain is not model
    # The reference is copied for each prompt. A rebound method must belong to the copy.
    again = copy.deepcopy(plain)
    rebound = [value.__self__ for module in again.modules() for value in _methods(module)]
    assert rebound and set(map(id, rebound)) <= set(map(id, again.modules()))
    assert not any(_methods(module) for module in model.modules())
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_the_model(dtype: torch.dtype) -> None:
    model = tiny_model("LlamaForCausalLM").to(dtype)
    assert exact_reference(model) is model


def test_the_check_of_a_family_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens come from the reference, the engine serves the model."""
    asked, compared = [], []
    made: list[torch.nn.Module] = []

    def plain(model: torch.nn.Module) -> torch.nn.Module:
        made.append(copy.deepcopy(model))
        return made[-1]

    monkeypatch.setattr(families, "exact_reference", plain)
    monkeypatch.setattr(families, "reference", lambda model, *a, **k: asked.append(model) or reference(model, *a, **k))
    right = families.Comparison
    monkeypatch.setattr(families, "Comparison", lambda model, *a, **k: compared.append(model) or right(model, *a, **k))
    assert check_family("LlamaForCausalLM").exact
    assert asked == compared == made


def _methods(module: torch.nn.Module) -> list[types.MethodType]:
    return [value for value in vars(module).values() if isinstance(value, types.MethodType)]
