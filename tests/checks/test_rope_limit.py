"""Rotary frequencies that follow the longest sequence of a batch: flat, and by layer type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import parse
from support.tiny_models import tiny_model
from transformers import PreTrainedModel

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedArgumentError
from hf_async_batching.coverage.check import check_model, make_prompts, reference
from hf_async_batching.model.view.model_view import batch_dependent_rope, context_length, make_view, rope_limit

LIMIT = 64
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
    "original_max_position_embeddings": LIMIT,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


def model_of(kind: str) -> PreTrainedModel:
    if kind == "longrope":
        return tiny_model("Phi3", rope_parameters=dict(LONG), original_max_position_embeddings=LIMIT)
    if kind == "dynamic":
        return tiny_model("Llama", rope_parameters=dict(DYNAMIC), max_position_embeddings=LIMIT)
    rope = {**LONG, "short_factor": [1.0] * 16, "long_factor": [3.0] * 16} if "longrope" in kind else dict(DYNAMIC)
    layers = {"full_attention": rope, "sliding_attention": dict(PLAIN)}
    if kind.startswith("sliding"):
        layers = {"full_attention": dict(PLAIN), "sliding_attention": rope}
    return tiny_model("Gemma3Text", rope_parameters=layers, max_position_embeddings=LIMIT)


KINDS = ["longrope", "dynamic"]
if parse(transformers.__version__) >= parse("5.24"):  # in older releases these fail by themselves
    KINDS += ["full longrope", "full dynamic", "sliding longrope"]


@pytest.mark.parametrize("kind", KINDS)
def test_short_requests_are_served_and_long_ones_refused_by_name(kind: str) -> None:
    model = model_of(kind)
    assert batch_dependent_rope(model)
    assert rope_limit(model) == context_length(model) == LIMIT
    prompts = make_prompts(90, (5, 37, 1, 23, 14, 40))
    known = reference(model, prompts, fresh=True)
    settings = BatchingConfig(page_size=16, max_batch_tokens=24, max_rows=4, depth=2, debug=True)
    verdict = check_model(model, known, config=settings)
    assert (verdict.status, verdict.reason, verdict.route) == ("exact", "", "packed")
    with GenerationManager(model, settings) as manager:
        victim = manager.submit(prompts[1], max_new_tokens=12, **GREEDY)
        with pytest.raises(
            UnsupportedArgumentError, match=f"`max_new_tokens=25` go beyond the {LIMIT} tokens .*lower"
        ):
            manager.submit(prompts[5], max_new_tokens=25, **GREEDY)
        with pytest.raises(UnsupportedArgumentError, match="shorten the prompt"):
            manager.submit(prompts[5] * 2, max_new_tokens=1, **GREEDY)
        assert manager.submit(prompts[5], max_new_tokens=24, **GREEDY).result(60).token_ids[:12] == known.tokens[5]
        assert victim.result(60).token_ids == known.tokens[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_drop_in_hands_long_ones_to_generate(kind: str) -> None:
    model = model_of(kind)
    short, long = make_prompts(90, (20, 70))[:2]
    expected = reference(model, [short, long], fresh=True).tokens
    arguments: dict[str, Any] = {"max_new_tokens": 12, "custom_generate": hf_async_batching.generate, **GREEDY}

    def serve(prompt: list[int], **more: Any) -> list[int]:
        out = model.generate(torch.tensor([prompt]), **arguments, **more)
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    assert serve(short) == expected[0]
    with pytest.raises(UnsupportedArgumentError, match="rotary frequencies"):
        serve(long)
    assert serve(long, on_unsupported="generate") == expected[1]
    assert serve(short) == expected[0], "what a long one left behind reaches no short one"


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_has_frequencies_of_its_own(kind: str) -> None:
    """A forward writes to them, in place: another thread's, of another length, must not see it."""
    model = model_of(kind)
    view = make_view(model, None)
    buffers = dict(model.named_buffers())
    found = [name for name in buffers if name.endswith("inv_freq")]
    assert found
    for name, buffer in view.named_buffers():
        assert (buffer.data_ptr() != buffers[name].data_ptr()) == name.endswith("inv_freq")
    with torch.no_grad():
        before = {name: buffers[name].clone() for name in found}
        view(torch.arange(3, 3 + LIMIT + 10)[None])
        for name in found:
            assert torch.equal(dict(model.named_buffers())[name], before[name])


def test_frequencies_that_do_not_change_are_shared() -> None:
    model = tiny_model("Llama")
    assert rope_limit(model) is None
    view = make_view(model, None)
    shared = {buffer.data_ptr() for buffer in model.buffers()}
    assert all(buffer.data_ptr() in shared for buffer in view.buffers())
