"""`return_dict_in_generate`: scores and logits in the shapes of `generate`, of those who ask for them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import EOS, VOCAB, ragged_prompts, tiny_model
from transformers.generation.utils import GenerateDecoderOnlyOutput

from hf_async_batching import BatchingConfig, GenerationManager

PROMPTS = ragged_prompts(5, 20, seed=3)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Qwen2")


@pytest.fixture(scope="module", params=[1, 3])
def manager(model: Any, request: pytest.FixtureRequest) -> Any:
    with GenerationManager(model, BatchingConfig(page_size=16, depth=request.param, debug=True)) as manager:
        yield manager


def padded() -> dict[str, torch.Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generate(model: Any, plug: Any = None, **arguments: Any) -> Any:
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **arguments}
    return model.generate(**padded(), return_dict_in_generate=True, custom_generate=plug, **arguments)


@pytest.mark.parametrize("names", [("scores",), ("logits",), ("scores", "logits"), ()])
def test_outputs_equal_those_of_generate(model: Any, manager: Any, names: tuple[str, ...]) -> None:
    """Rows that have ended have zeros: `generate` goes on computing them, for padding."""
    arguments: dict[str, Any] = {f"output_{name}": True for name in names}
    arguments["suppress_tokens"] = list(range(60, 70))
    width = padded()["input_ids"].shape[1]
    usual = generate(model, **arguments, eos_token_id=None).sequences[:, width:]
    eos = torch.stack([usual[0, 2], usual[1, 4], usual[2, 7]])
    plain = generate(model, **arguments, eos_token_id=eos.tolist())
    got = generate(model, manager.bind(), **arguments, eos_token_id=eos.tolist())
    assert isinstance(got, GenerateDecoderOnlyOutput)
    assert torch.equal(got.sequences, plain.sequences)
    for name in ("scores", "logits"):
        ours, theirs = getattr(got, name), getattr(plain, name)
        assert (ours is not None) == (name in names)
        if ours is None:
            continue
        assert isinstance(ours, tuple)
        assert len(ours) == len(theirs) == got.sequences.shape[1] - width
        live = torch.ones(len(PROMPTS), dtype=torch.bool)
        ends = set()
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert (
                (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) == ((5, VOCAB), torch.float32, a.device)
            )
            torch.testing.assert_close(a[live], b[live], rtol=1e-4, atol=1e-4)
            assert not a[~live].any()
            live &= ~torch.isin(got.sequences[:, width + step], eos)
            ends.add(int(live.sum()))
        assert len(ends) > 1, "rows hardly end at different steps"


def test_transition_scores_are_computed_from_ours(model: Any, manager: Any) -> None:
    def transitions(out: Any) -> torch.Tensor:
        scores: torch.Tensor = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        return scores

    arguments = {"output_scores": True, "eos_token_id": None, "repetition_penalty": 1.3}
    plain, got = generate(model, **arguments), generate(model, manager.bind(), **arguments)
    torch.testing.assert_close(transitions(got), transitions(plain), rtol=1e-4, atol=1e-4)


def test_sampled_scores_are_what_tokens_were_drawn_by(model: Any, manager: Any) -> None:
    arguments: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "typical_p": 0.95}
    got = generate(model, manager.bind(seed=3), **arguments, output_scores=True, output_logits=True)
    from transformers.generation import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.9), TypicalLogitsWarper(0.95)]
    width = padded()["input_ids"].shape[1]
    for step, (scores, logits) in enumerate(zip(got.scores, got.logits, strict=True)):
        live = logits.any(-1)
        expected = logits
        for warper in warpers:
            expected = warper(None, expected)
        torch.testing.assert_close(scores[live], expected[live])
        tokens = got.sequences[:, width + step, None]
        assert scores.gather(1, tokens)[live].isfinite().all()


def test_only_those_who_ask_get_them(manager: Any) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_logits": True, "return_dict_in_generate": True},
        {"output_scores": True},
        {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "do_sample": True},
        {},
    ]
    handles = [
        manager.submit(PROMPTS[i % 5], max_new_tokens=4 + i, eos_token_id=None, **{"do_sample": False, **kind})
        for i, kind in enumerate(kinds)
    ]
    for i, (kind, handle) in enumerate(zip(kinds, handles, strict=True)):
        result = handle.result(60)
        returned = kind.get("return_dict_in_generate", False)
        for name in ("scores", "logits"):
            made = getattr(result, name)
            if not (returned and kind.get(f"output_{name}")):
                assert made is None
                continue
            assert len(made) == len(result.token_ids) == 4 + i
            assert all(line.shape == (VOCAB,) and line.device.type == "cpu" for line in made)
            if not kind.get("do_sample"):
                assert [int(line.argmax()) for line in made] == result.token_ids


def test_a_request_that_ends_brings_no_more(model: Any, manager: Any) -> None:
    """Surplus steps bring lines, too, which nobody gets."""
    arguments: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    for _ in range(3):
        handles = [
            manager.submit(prompt, max_new_tokens=12, eos_token_id=[EOS, *range(3, 30)], **arguments)
            for prompt in PROMPTS
        ]
        results = [handle.result(60) for handle in handles]
        assert any(result.finish_reason == "eos" for result in results)
        for result in results:
            assert [int(line.argmax()) for line in result.scores] == result.token_ids


def test_log_probabilities_beside_scores(manager: Any) -> None:
    result = manager.submit(
        PROMPTS[0], max_new_tokens=6, do_sample=False, logprobs=True, output_logits=True, return_dict_in_generate=True
    ).result(60)
    expected = [
        float(line.log_softmax(-1)[token]) for line, token in zip(result.logits, result.token_ids, strict=True)
    ]
    torch.testing.assert_close(torch.tensor(result.logprobs), torch.tensor(expected))


def test_scores_and_logits_are_ordinary_tensors(model: Any, manager: Any) -> None:
    """They can be written to, and take part in gradients."""
    handle = manager.submit(
        PROMPTS[1], max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True,
        output_logits=True,
    )  # fmt: skip
    result = handle.result(60)
    out = generate(model, manager.bind(), output_scores=True, output_logits=True)
    for line in (*result.scores, *result.logits, *out.scores, *out.logits, *handle.made("scores")):
        assert not line.is_inference()
        line.mul_(2)
        (line * torch.ones(VOCAB, requires_grad=True)).sum().backward()
