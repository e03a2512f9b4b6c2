"""NaN and inf, of a caller's making or the model's: an error or `generate`'s token for that request, and no more."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from support.tiny_models import greedy_alone, ragged_prompts, tiny_model

from hf_async_batching import BatchingConfig, GenerationManager, InvalidProbabilitiesError
from hf_async_batching.sampling.sampler import Sampler

# The embedding of this token is NaN.
BROKEN = 90
PROMPTS = [[token if token != BROKEN else 3 for token in prompt] for prompt in ragged_prompts(4, 40, seed=8)]
LONG = PROMPTS[-1]
PLAIN: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}
GREEDY: dict[str, Any] = {"do_sample": False, **PLAIN}

pytestmark = [
    # Triton 3.9 announces a change of a compiler default that makes no difference here.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    # The interpreter's arithmetic is numpy's, which warns of NaN.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture(scope="module", params=[1, 2, 3])
def manager(model: Any, request: pytest.FixtureRequest) -> Any:
    config = BatchingConfig(page_size=16, depth=request.param, max_batch_tokens=64, debug=True)
    row = model.model.embed_tokens.weight.data[BROKEN]
    usual = row.clone()
    with GenerationManager(model, config) as manager:
        manager.warmup()  # which checks the model
        row.fill_(math.nan)
        yield manager
        row.copy_(usual)


def others(manager: Any, count: int = 25) -> list[tuple[Any, dict[str, Any], list[int]]]:
    made = []
    for prompt in PROMPTS:
        for arguments in (GREEDY, {"do_sample": True, "top_k": 5, "seed": 3, **PLAIN}):
            handle = manager.submit(prompt, max_new_tokens=count, **arguments)
            made.append((handle, arguments, prompt))
    return made


def check_others(manager: Any, model: Any, made: list[tuple[Any, dict[str, Any], list[int]]]) -> None:
    for handle, arguments, prompt in made:
        got = handle.result(120).token_ids
        assert got == manager.submit(prompt, max_new_tokens=len(got), **arguments).result(60).token_ids
        if not arguments["do_sample"]:
            assert got == greedy_alone(model, prompt, len(got), **PLAIN)


class Fills:
    """Leaves scores of one value from a length on."""

    def __init__(self, length: int, value: float) -> None:
        self.length, self.value = length, value

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, self.value) if ids.shape[1] >= self.length else scores


CAUSES: dict[str, dict[str, Any]] = {
    "nan": {"logits_processor": [Fills(8, math.nan)]},
    "inf": {"logits_processor": [Fills(8, math.inf)]},
    "minus inf": {"logits_processor": [Fills(8, -math.inf)]},
    "suppressed": {"suppress_tokens": list(range(97))},
}


@pytest.mark.parametrize("cause", CAUSES)
def test_an_impossible_draw_is_its_requests_own_error(model: Any, manager: Any, cause: str) -> None:
    """Steps in flight go on with a token that is none."""
    made = others(manager)
    handle = manager.submit(
        [5, 6, 7], max_new_tokens=30, do_sample=True, seed=1, logprobs=True, **PLAIN, **CAUSES[cause]
    )
    with pytest.raises(InvalidProbabilitiesError, match="probability tensor contains either") as caught:
        handle.result(60)
    assert isinstance(caught.value, RuntimeError)
    assert len(handle.token_ids) == (0 if cause == "suppressed" else 5), "what was made before is kept"
    check_others(manager, model, made)
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        model.generate(
            torch.tensor([[5, 6, 7]]), max_new_tokens=30, do_sample=True, custom_generate=manager.bind(),
            **PLAIN, **CAUSES[cause],
        )  # fmt: skip


@pytest.mark.parametrize("cause", ["nan", "minus inf"])
def test_greedily_there_is_a_token_as_in_generate(model: Any, manager: Any, cause: str) -> None:
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=8, **GREEDY, **CAUSES[cause])
    got = model.generate(ids, max_new_tokens=8, **GREEDY, **CAUSES[cause], custom_generate=manager.bind())
    assert torch.equal(got, expected)


WAYS = [
    pytest.param(False, id="torch"),
    pytest.param(
        True, id="kernels", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
    ),
]


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 20}, {"top_k": 0, "top_p": 0.9}, {"typical_p": 0.9}], ids=lambda value: str(value)
)
def test_nan_of_the_model(model: Any, manager: Any, filters: dict[str, Any], fused: bool) -> None:
    """An error where tokens are drawn; greedily what `generate` gives, whose pages are found by no other request."""
    assert manager.assembly is not None
    if fused and (manager.assembly.engine.depth != 2 or "typical_p" in filters):
        pytest.skip("the interpreter is slow")
    made = others(manager, 2 if fused else 25)
    runner = manager.assembly.runner
    before, runner._sampler = runner._sampler, Sampler(fused=fused)
    try:
        prompt = [*LONG[:20], BROKEN, *LONG[:20]]
        for _ in range(2):
            handle = manager.submit(prompt, max_new_tokens=9, do_sample=True, seed=1, **PLAIN, **filters)
            with pytest.raises(InvalidProbabilitiesError):
                handle.result(60)
            result = manager.submit(prompt, max_new_tokens=9, **GREEDY).result(60)
            assert result.token_ids == greedy_alone(model, prompt, 9, **PLAIN)
            assert result.metrics.cached_prompt_tokens == 0
        for handle, *_ in made:
            handle.result(120)
    finally:
        runner._sampler = before
    check_others(manager, model, made)


@pytest.mark.parametrize(
    "arguments", [{}, {"min_new_tokens": 20}, {"suppress_tokens": [1]}, {"num_beams": 1}], ids=str
)
@pytest.mark.parametrize("depth", [1, 2])
def test_pages_of_steps_that_were_not_finite_are_not_found(depth: int, arguments: dict[str, Any]) -> None:
    """A fault that passes, of the memory or of kernels: the same prompt is right afterwards."""
    model = tiny_model("Llama")
    expected = greedy_alone(model, LONG, 20, eos_token_id=None)
    config = BatchingConfig(page_size=16, depth=depth, max_batch_tokens=64, debug=True)
    with GenerationManager(model, config) as manager:
        shared = manager.submit(LONG, max_new_tokens=20, **GREEDY).result(60)
        assert shared.token_ids == expected
        weight = model.model.layers[0].self_attn.v_proj.weight.data
        usual = weight.clone()
        weight.fill_(math.nan)  # unseen, through `.data`
        new = [7, *LONG[:-1]]
        ended = [
            manager.submit(prompt, max_new_tokens=20, do_sample=False, **PLAIN, **arguments) for prompt in (new, LONG)
        ]
        assert all(set(handle.result(60).token_ids) == {0} for handle in ended)
        weight.copy_(usual)
        for prompt in (new, LONG):
            result = manager.submit(prompt, max_new_tokens=20, **GREEDY).result(60)
            assert result.token_ids == greedy_alone(model, prompt, 20, eos_token_id=None)
            assert result.metrics.cached_prompt_tokens == 0
            again = manager.submit(prompt, max_new_tokens=20, **GREEDY).result(60)
            assert again.metrics.cached_prompt_tokens > 0, "and is found again"


def test_pages_that_held_nan_are_as_good_as_others(manager: Any, model: Any) -> None:
    """Whatever stands behind a row's tokens in its pages counts nothing."""
    for _ in range(40):
        manager.submit([BROKEN] * 60, max_new_tokens=30, **GREEDY)
    check_others(manager, model, others(manager))
