"""Exact, within rounding or wrong: what is said of tokens and log-probabilities."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from support.tiny_models import tiny_model
from transformers import PreTrainedModel

from hf_async_batching.coverage import comparison
from hf_async_batching.coverage.comparison import FLOAT32_TOLERANCE, Comparison
from hf_async_batching.coverage.families import check_family
from hf_async_batching.coverage.families import tiny_model as coverage_model
from hf_async_batching.coverage.loaded_dtype import as_loaded
from hf_async_batching.coverage.plain_reference import Forced, Reference, forced, make_prompts, reference


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def known(model: PreTrainedModel) -> Reference:
    return reference(model, make_prompts(97, (5, 9)), 4)


def test_forced_is_what_generate_computes(model: PreTrainedModel, known: Reference) -> None:
    own = forced(model, known.prompts[0], known.tokens[0])
    assert own.logprobs == known.logprobs[0] == own.best
    said = [known.tokens[0][0], 7, 8, 9]
    other = forced(model, known.prompts[0], said)
    assert other.logprobs[0] == own.logprobs[0]
    with torch.no_grad():
        ids = torch.tensor([[*known.prompts[0], *said]])
        scores = model(ids).logits[0, len(known.prompts[0]) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(torch.tensor(other.logprobs), scores.gather(1, torch.tensor(said)[:, None])[:, 0])
    torch.testing.assert_close(torch.tensor(other.best), scores.max(-1).values)


def test_float32(model: PreTrainedModel, known: Reference) -> None:
    compared = Comparison(model, known)
    assert compared.tolerance == FLOAT32_TOLERANCE
    found = compared(known.tokens, known.logprobs)
    assert (found.status, found.tokens, found.other_tokens, found.difference) == ("exact", 8, 0, 0.0)
    shifted = [[value + 1e-2 for value in values] for values in known.logprobs]
    found = compared(known.tokens, shifted)
    assert found.reason.startswith("8 of 8 tokens beyond the tolerance of 0.002; the worst, token ")
    assert found.reason.endswith("has a log-probability that differs by 0.01")
    assert (found.beyond, compared.may_be_choices(found)) == (8, False)
    assert compared(known.tokens, [[float("nan")] * 4] * 2).status == "wrong"
    assert "3 tokens and not 4" in compared([tokens[:3] for tokens in known.tokens], known.logprobs).reason
    other = [[(known.tokens[0][0] + 1) % 97, *known.tokens[0][1:]], known.tokens[1]]
    found = compared(other, known.logprobs)
    assert found.status == "wrong"
    assert "prompt 0 (5 tokens)" in found.reason
    assert found.beyond > 1


def test_all_tokens_beyond_the_tolerance_are_counted(model: PreTrainedModel, known: Reference) -> None:
    """Over all prompts, and the worst is named wherever it is."""
    shifted = [list(values) for values in known.logprobs]
    shifted[0][2] += 0.01
    shifted[1][0] -= 0.02
    shifted[1][3] += 1e-3
    found = Comparison(model, known)(known.tokens, shifted)
    assert (found.status, found.beyond, found.tokens) == ("wrong", 2, 8)
    assert found.reason == (
        "2 of 8 tokens beyond the tolerance of 0.002; the worst, token 0 of prompt 1 (9 tokens), has a "
        "log-probability that differs by 0.02"
    )
    assert found.difference == pytest.approx(0.02)
    short = [known.tokens[0], known.tokens[1][:3]]
    assert "prompt 1 of 9 tokens: 3 tokens and not 4" in Comparison(model, known)(short, shifted).reason


@pytest.mark.parametrize(("gap", "status"), [(1e-3, "within rounding"), (3e-3, "wrong")])
def test_a_token_that_is_as_likely(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, known: Reference, gap: float, status: str
) -> None:
    """What follows another token is compared with what plain `generate` says after the same token."""
    others = [[1, 2, 3, 4], known.tokens[1]]
    after = [-2.0, -3.0, -4.0, -5.0]
    monkeypatch.setattr(comparison, "forced", lambda *_, **__: Forced(after, [-2.0 + gap, *after[1:]]))
    found = Comparison(model, known)(others, [after, known.logprobs[1]])
    assert (found.status, found.other_tokens) == (status, 1)
    assert Comparison(model, known)(others, [[*after[:3], -5.1], known.logprobs[1]]).status == "wrong"


def test_16_bits_are_measured_by_the_model_itself() -> None:
    model = as_loaded(coverage_model("LlamaForCausalLM"), torch.bfloat16)
    known = reference(model, make_prompts(97, (5, 9)), 4)
    wide = copy.deepcopy(model).to(torch.float32)  # type: ignore[arg-type]
    rounding = max(
        abs(one - other)
        for prompt, tokens, logprobs in zip(known.prompts, known.tokens, known.logprobs, strict=True)
        for one, other in zip(logprobs, forced(wide, prompt, tokens).logprobs, strict=True)
    )
    compared = Comparison(model, known)
    assert compared.tolerance == max(0.06, 4 * rounding)
    for factor, status in ((0.9, "exact"), (1.1, "wrong")):
        shifted = [[value + factor * compared.tolerance for value in values] for values in known.logprobs]
        found = compared(known.tokens, shifted)
        assert found.status == status
    assert "8 of 8 tokens beyond the tolerance of" in found.reason


@pytest.mark.parametrize(
    ("beyond", "value", "may_be"), [(0, 9.0, False), (3, 9.0, True), (4, 9.0, False), (1, math.nan, False)]
)
def test_choices_of_one_bit_are_few_and_finite(beyond: int, value: float, may_be: bool) -> None:
    """At most one token in twenty; and no rounding makes a number none."""
    model = as_loaded(coverage_model("LlamaForCausalLM"), torch.bfloat16)
    known = reference(model, make_prompts(97, (5, 9, 7)), 20)
    compared = Comparison(model, known)
    shifted = [list(values) for values in known.logprobs]
    for place in range(beyond):
        shifted[place % 3][place] += value
    found = compared(known.tokens, shifted)
    assert (found.beyond, compared.may_be_choices(found)) == (beyond, may_be)
    assert found.status == ("wrong" if beyond else "exact")
    served, in_float32 = compared.in_float32()
    assert served.dtype == served.config.dtype == torch.float32
    assert in_float32.tolerance == FLOAT32_TOLERANCE
    assert in_float32.known.prompts == known.prompts
    assert [len(tokens) for tokens in in_float32.known.tokens] == [20] * 3


def test_a_model_that_rounding_makes_another_is_not_what_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3 with the weights of the first try differs by more than one from itself in float32."""
    verdict = check_family("DeepseekV3ForCausalLM", dtype="bfloat16")
    assert verdict.served
    assert verdict.tolerance is not None and verdict.tolerance <= 1


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "DeepseekV3", "Dots1", "Mamba", "Qwen3Next", "GPT2LMHeadModel"])
def test_weights_have_the_dtypes_in_which_they_are_loaded(name: str, tmp_path: object) -> None:
    class_name = name if "Model" in name else f"{name}ForCausalLM"
    model = as_loaded(coverage_model(class_name), torch.bfloat16)
    coverage_model(class_name).save_pretrained(tmp_path)
    loaded = getattr(transformers, class_name).from_pretrained(tmp_path, dtype=torch.bfloat16)

    def dtypes(of: PreTrainedModel) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in (*of.named_parameters(), *of.named_buffers())}

    assert dtypes(model) == dtypes(loaded)
    assert model.dtype == torch.bfloat16


def test_what_a_class_keeps_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of transformers keep it when they load a model only, not when they make one."""
    plan = {"q_proj": torch.float32, "layers.*.input_layernorm": torch.float32}
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_get_dtype_plan", lambda *_: plan)
    model = as_loaded(coverage_model("LlamaForCausalLM"), torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {name for name, _ in model.named_parameters() if "q_proj" in name or "input_layernorm" in name}
