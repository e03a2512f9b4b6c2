"""Which models take embeddings in place of token ids."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model

from hf_async_batching import UnsupportedModelError
from hf_async_batching.checks.embeddings_check import check_takes_embeddings
from hf_async_batching.model.forward.packed_forward import PackedForward


def scaled(factor: float) -> Any:
    """A model whose embeddings count for more, or for less, than those of its tokens."""
    model = tiny_model("Llama")
    plain = type(model).forward

    class Scaled(type(model)):  # type: ignore[misc]
        @wraps(plain)
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
            if inputs_embeds is not None:
                inputs_embeds = inputs_embeds * factor
            return plain(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    model.__class__ = Scaled
    return model


def test_a_model_that_takes_them() -> None:
    check_takes_embeddings(scaled(1.0), PackedForward(scaled(1.0)))


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_a_model_that_computes_otherwise(factor: float) -> None:
    model = scaled(factor)
    model.model.norm = torch.nn.Identity()  # which takes a factor back
    with pytest.raises(UnsupportedModelError, match=r"for Scaled: its logits differ by \S+ \(relative norm"):
        check_takes_embeddings(model, PackedForward(model))


def test_a_model_that_fails_says_how() -> None:
    model = tiny_model("Llama")
    forward = PackedForward(model)

    class Fails(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, use_cache: bool = False) -> Any:
            raise KeyError("image")

    model.__class__ = Fails
    with pytest.raises(UnsupportedModelError, match=r"KeyError\('image'\)\. Use plain"):
        check_takes_embeddings(model, forward)


def test_routes_and_forwards_without_them() -> None:
    model = tiny_model("Llama")
    forward: Any = PackedForward(model)
    forward.takes_embeddings = False
    with pytest.raises(UnsupportedModelError, match="its own cache class, by token ids"):
        check_takes_embeddings(model, forward)
    forward.takes_embeddings = True

    class TokensAlone(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, use_cache: bool = False) -> Any:
            raise AssertionError

    model.__class__ = TokensAlone
    with pytest.raises(UnsupportedModelError, match="its forward does not accept them"):
        check_takes_embeddings(model, forward)
