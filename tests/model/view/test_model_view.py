"""The user's model is never changed: compared before, during and after, and used by its owner at the same time."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import greedy_alone, ragged_prompts, tiny_model
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedModelError
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.view.model_view import batch_dependent_rope, context_length, make_view

PROMPTS = ragged_prompts(8, 30, seed=9)
CONFIG = BatchingConfig(page_size=16, max_batch_tokens=64)
GREEDY = {"do_sample": False, "eos_token_id": None}


def everything(model: Any) -> dict[str, Any]:
    """All that the user could notice: attributes of every module by identity, config, modes, hooks, weights."""
    found: dict[str, Any] = {
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "generation_config": model.generation_config.to_dict(),
        "config object": id(model.config),
    }
    for name, module in model.named_modules():
        found[f"{name} type"] = type(module)
        found[f"{name} attributes"] = {
            key: id(value) if not isinstance(value, (bool, int, float, str)) else value
            for key, value in vars(module).items()
        }
        found[f"{name} methods"] = {key for key in vars(module) if callable(vars(module)[key])}
        found[f"{name} hooks"] = [
            dict(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks") and hooks
        ]
        found[f"{name} class"] = {key: id(value) for key, value in vars(type(module)).items()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"tensor {name}"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.detach().clone())
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.startswith("tensor"):
            assert value[:3] == after[key][:3], key
            assert torch.equal(value[3], after[key][3]), key
        else:
            assert value == after[key], key


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "StableLm", "Mixtral"])
def test_nothing_changes_before_during_and_after(family: str) -> None:
    model = tiny_model(family)
    model.train()
    fired: list[int] = []
    model.lm_head.register_full_backward_hook(lambda *_: fired.append(1))
    before = everything(model)
    with GenerationManager(model, CONFIG) as manager:
        handles = [manager.submit(prompt, max_new_tokens=15, **GREEDY) for prompt in PROMPTS]
        next(iter(handles[0]))
        assert_same(before, everything(model))
        got = [handle.result(60).token_ids for handle in handles]
    assert_same(before, everything(model))
    assert fired == [], "the engine computes no gradients"
    model.eval()
    assert got == [greedy_alone(model, prompt, 15, eos_token_id=None) for prompt in PROMPTS]


def test_weights_are_shared_not_copied() -> None:
    model = tiny_model("Llama")
    view = make_view(model, None)
    assert [id(p) for p in view.parameters()] == [id(p) for p in model.parameters()]
    assert [id(b) for b in view.buffers()] == [id(b) for b in model.buffers()]
    assert view.config is not model.config
    assert not view.training
    assert all(not module.training for module in view.modules())


def test_owner_trains_and_generates_meanwhile() -> None:
    model = tiny_model("Llama")
    prompt = PROMPTS[3]
    ids = torch.tensor([prompt])
    expected = [greedy_alone(model, p, 60, eos_token_id=None) for p in PROMPTS]
    own = model.generate(ids, max_new_tokens=20, do_sample=False)
    model.train()
    model(ids, labels=ids).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    # A learning rate of zero: the step runs, the weights that the engine reads stay what the reference knows.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stop = threading.Event()
    served: list[bool] = []

    def serve() -> None:
        while not stop.is_set():
            handles = [manager.submit(p, max_new_tokens=60, **GREEDY) for p in PROMPTS]
            served.append([handle.result(60).token_ids for handle in handles] == expected)

    with GenerationManager(model, CONFIG) as manager:
        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(10):
            model.eval()
            assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), own)
            model.train()
            loss = model(ids, labels=ids).loss
            loss.backward()
            assert all(
                torch.equal(parameter.grad, gradient)
                for parameter, gradient in zip(model.parameters(), gradients, strict=True)
            )
            optimizer.step()
            model.zero_grad()
        stop.set()
        thread.join()
    assert served
    assert all(served)


def test_a_training_step_is_seen_by_the_next_request() -> None:
    model = tiny_model("Llama")
    with GenerationManager(model, CONFIG) as manager:
        manager.submit(PROMPTS[1], max_new_tokens=4, **GREEDY).result(60)
        ids = torch.tensor([PROMPTS[3]])
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        got = manager.submit(PROMPTS[3], max_new_tokens=10, **GREEDY).result(60).token_ids
    assert got == greedy_alone(model, PROMPTS[3], 10, eos_token_id=None)


@pytest.fixture
def wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_async_batching.attention import hf_interface as interface

    right = interface.paged_attention_forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, weights = right(*args, **kwargs)
        return out * 1.05, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, interface.NAME, wrong)


@pytest.mark.usefixtures("wrong_attention")
def test_wrong_logits_close_a_route(caplog: pytest.LogCaptureFixture) -> None:
    """A model whose attention does something that the engine does not know of is caught by the parity check."""
    model = tiny_model("Llama")
    with caplog.at_level(logging.WARNING, "hf_async_batching"), GenerationManager(model, CONFIG) as manager:
        got = manager.submit(PROMPTS[1], max_new_tokens=6, **GREEDY).result(60).token_ids
        assert manager.assembly is not None
        assert manager.assembly.forward.route == "padded"
    assert "its own cache class (padded), slower than packed: its logits for" in caplog.text
    assert got == greedy_alone(model, PROMPTS[1], 6, eos_token_id=None)


@pytest.mark.usefixtures("wrong_attention")
def test_wrong_logits_on_every_route_refuse_the_model_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    right = CacheForward.__call__
    monkeypatch.setattr(CacheForward, "__call__", lambda self, inputs: right(self, inputs) * 1.05)
    with GenerationManager(model, CONFIG) as manager:
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is not served: its logits"):
            manager.submit(PROMPTS[1], max_new_tokens=2)
        assert manager.assembly is None
    unchecked = BatchingConfig(page_size=16, attach_check=False)
    with GenerationManager(model, unchecked) as manager:
        manager.submit(PROMPTS[1], max_new_tokens=2).result(60)


def test_a_soft_cap_that_the_plain_forward_drops_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    """The check is fine enough for small differences: here two per mille of the logits' norm."""
    model = tiny_model("Gemma2")
    with GenerationManager(model, CONFIG) as manager:
        manager.warmup()
        assert manager.assembly is not None
        assert manager.assembly.forward.route == "packed"
    model.config._attn_implementation = "sdpa_without_soft_cap"

    def sdpa_without_soft_cap(*args: Any, softcap: float | None = None, **kwargs: Any) -> Any:
        return AttentionInterface._global_mapping["sdpa"](*args, **kwargs)

    AttentionInterface.register("sdpa_without_soft_cap", sdpa_without_soft_cap)
    AttentionMaskInterface.register("sdpa_without_soft_cap", AttentionMaskInterface._global_mapping["sdpa"])
    try:
        with caplog.at_level(logging.WARNING, "hf_async_batching"), GenerationManager(model, CONFIG) as manager:
            # What it says without its cap is what `generate` says: the model's own attention decides.
            got = manager.submit(PROMPTS[3], max_new_tokens=6, **GREEDY).result(60).token_ids
        assert got == greedy_alone(model, PROMPTS[3], 6, eos_token_id=None)
    finally:
        del AttentionInterface._global_mapping["sdpa_without_soft_cap"]
        del AttentionMaskInterface._global_mapping["sdpa_without_soft_cap"]
    assert "eager" in caplog.text


@pytest.mark.parametrize("break_it", ["hook", "meta"])
def test_models_that_cannot_be_viewed_are_refused(break_it: str) -> None:
    model = tiny_model("Llama")
    if break_it == "hook":
        model.model._hf_hook = object()
    else:
        model.to("meta")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        make_view(model, None)


def test_the_paged_attention_outside_of_the_engine_says_so() -> None:
    model = tiny_model("Llama")
    model.config._attn_implementation = "hf_async_batching_paged"
    with pytest.raises(RuntimeError, match="inside the engine"):
        model(torch.tensor([[5, 6]]))


def test_context_length_and_rope() -> None:
    assert context_length(tiny_model("Llama")) == 512
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    dynamic = tiny_model("Llama", rope_parameters=rope)
    assert batch_dependent_rope(dynamic)
    assert not batch_dependent_rope(tiny_model("Llama"))
    prompt = PROMPTS[2]
    with GenerationManager(dynamic, CONFIG) as manager:
        got = manager.submit(prompt, max_new_tokens=6, **GREEDY).result(60).token_ids
    assert got == greedy_alone(dynamic, prompt, 6, eos_token_id=None)
    assert isinstance(dynamic, transformers.LlamaForCausalLM)
