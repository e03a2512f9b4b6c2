"""A family whose forward rescales its weights in place is left as plain `generate` would leave it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import RwkvConfig, RwkvForCausalLM

from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedModelError
from hf_async_batching.model.view.model_view import make_view

IDS = torch.tensor([[5, 6, 7, 8, 9]])
CALL: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def rwkv() -> Any:
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, rescale_every=2, context_length=128,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    model = RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model


def equal(one: Any, other: Any) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_weights_and_outputs_are_as_without_us() -> None:
    model, plain = rwkv(), rwkv()
    expected = plain.generate(IDS, **CALL)
    assert not equal(model, plain), "its forward does not rescale"
    with GenerationManager(model, BatchingConfig(page_size=16)) as manager:
        for _ in range(2):
            assert torch.equal(model.generate(IDS, custom_generate=manager.bind(), **CALL), expected)
        assert equal(model, plain)
        assert torch.equal(model.generate(IDS, **CALL), expected)
        assert torch.equal(model.generate(IDS, custom_generate=manager.bind(), **CALL), expected)
        # A step of training takes the rescaling back; the next call in eval mode rescales anew.
        with torch.no_grad():
            model.train()(IDS)
        assert equal(model, rwkv())
        assert torch.equal(model.eval().generate(IDS, custom_generate=manager.bind(), **CALL), expected)
        assert equal(model, plain)


def test_in_training_mode_it_is_refused_and_not_touched() -> None:
    model = rwkv().train()
    refused = pytest.raises(UnsupportedModelError, match=r"`model.eval\(\)` first")
    with refused, GenerationManager(model) as manager:
        model.generate(IDS, custom_generate=manager.bind(), **CALL)
    assert equal(model, rwkv())


def test_no_view_writes_to_the_weights() -> None:
    model = rwkv()
    view: Any = make_view(model, None)
    versions = [parameter._version for parameter in model.parameters()]
    with torch.no_grad():
        view(IDS), model(IDS)
    assert [parameter._version for parameter in model.parameters()] == versions
