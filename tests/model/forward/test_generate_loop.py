"""One sequence as `generate` computes it, step by step; several take turns on one view."""

from __future__ import annotations

import pytest
import torch

from hf_async_batching.coverage.check import make_prompts, reference
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.model.forward.generate_loop import CACHE_NAMES, GenerateLoop, prepare_view
from hf_async_batching.model.view.model_view import make_view

NEW = 6


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "MambaForCausalLM", "XLNetLMHeadModel"])
def test_tokens_of_generate(class_name: str) -> None:
    model = tiny_model(class_name)
    expected = reference(model, make_prompts(190, (7, 3)), NEW)
    view = make_view(model, None)
    prepare_view(view)
    for prompt, tokens in zip(expected.prompts, expected.tokens, strict=True):
        loop = GenerateLoop(view)
        with torch.inference_mode():
            got = [int(loop.start(torch.tensor([prompt])).argmax())]
            while len(got) < NEW:
                got.append(int(loop.step(torch.tensor([got[-1:]])).argmax()))
        assert got == tokens


def test_states_in_modules_take_turns() -> None:
    """RecurrentGemma's modules hold their state themselves: two sequences on one view must not see each other's."""
    model = tiny_model("RecurrentGemmaForCausalLM")
    expected = reference(model, make_prompts(190, (7, 12, 1)), NEW, fresh=True)
    view = make_view(model, None)
    prepare_view(view)
    loops = [GenerateLoop(view) for _ in expected.prompts]
    with torch.inference_mode():
        got = [
            [int(loop.start(torch.tensor([prompt])).argmax())]
            for loop, prompt in zip(loops, expected.prompts, strict=True)
        ]
        for _ in range(NEW - 1):
            for loop, tokens in zip(loops, got, strict=True):
                tokens.append(int(loop.step(torch.tensor([tokens[-1:]])).argmax()))
    assert got == expected.tokens
    assert expected.distinct_tokens > 4


def test_the_users_generation_config_is_not_asked() -> None:
    model = tiny_model("LlamaForCausalLM")
    model.generation_config.update(do_sample=True, cache_implementation="static", num_beams=1)
    before = model.generation_config.to_dict()
    view = make_view(model, None)
    prepare_view(view)
    with torch.inference_mode():
        loop = GenerateLoop(view)
        loop.start(torch.tensor([[5, 6]]))
    caches = [type(loop.arguments[name]).__name__ for name in CACHE_NAMES if name in loop.arguments]
    assert caches == ["DynamicCache"]
    assert model.generation_config.to_dict() == before


def test_what_a_step_leaves_in_a_module_is_gone_for_the_next_loop() -> None:
    """Taken out, not set to None: families ask with a default for what is not there."""
    view = make_view(tiny_model("LlamaForCausalLM"), None)
    prepare_view(view)
    module = view.model.norm
    seen: list[torch.Tensor] = []

    def remember(*_: object) -> None:
        seen.append(getattr(module, "longest", torch.tensor(0)))
        module.longest = seen[-1] + 1

    module.register_forward_hook(remember)
    loops = [GenerateLoop(view) for _ in range(2)]
    with torch.inference_mode():
        for loop in loops:
            loop.start(torch.tensor([[5, 6]]))
        for loop in loops:
            loop.step(torch.tensor([[7]]))
    assert [int(value) for value in seen] == [0, 0, 1, 1]
    assert not hasattr(module, "longest")
