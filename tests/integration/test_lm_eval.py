"""lm-evaluation-harness: HFLM with the plug, on a task made here, answers and scores as it does with `generate`."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from support.tiny_tokenizer import tiny_tokenizer

import hf_async_batching
from hf_async_batching import get_manager

pytest.importorskip("hf_async_batching.stopping.criteria", reason="the harness stops by criteria")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval")
    from lm_eval import evaluator
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = ["hello", "what is it", "a", "to be or not to be", "abcd", "the end", "zz", "many words in a row here"]


class AsyncHFLM(HFLM):
    """HFLM as it is; the plug is one more argument of the one place in which it calls `generate`."""

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **arguments: Any) -> Any:
        return super()._model_generate(
            context, max_length, stop, custom_generate=hf_async_batching.generate, **arguments
        )


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model("Llama")
    yield model
    get_manager(model).close()


def harness(kind: type[HFLM], model: Any, **arguments: Any) -> HFLM:
    return kind(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=3, max_length=256, **arguments)


def requests(until: list[str], **arguments: Any) -> list[Instance]:
    given = {"until": until, "max_gen_toks": 24, **arguments}
    return [Instance("generate_until", {}, (question.replace(" ", ""), dict(given)), 0) for question in QUESTIONS]


def stops(model: Any) -> list[str]:
    """Strings of two letters that the model's answers come to, some early, some late, across tokens."""
    answers = harness(HFLM, model).generate_until(requests([]))
    return [answers[1][3:5], answers[3][6:8]]


def test_the_same_answers(model: Any) -> None:
    until = stops(model)
    plain, ours = harness(HFLM, model), harness(AsyncHFLM, model)
    for stop in ([], until[:1], until):
        want = plain.generate_until(requests(stop))
        assert ours.generate_until(requests(stop)) == want
        assert len(set(want)) > 4
    assert any(len(short) < len(long) for short, long in zip(want, plain.generate_until(requests([])), strict=True))


def test_the_same_scores_of_a_task(model: Any) -> None:
    until = stops(model)
    answers = harness(HFLM, model).generate_until(requests(until))

    def documents(**_: Any) -> Any:
        import datasets

        rows = [
            # Half of the answers are the model's own: the score is neither 0 nor 1.
            {"question": question.replace(" ", ""), "answer": answer if i % 2 else "no" + answer}
            for i, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True))
        ]
        return {"test": datasets.Dataset.from_list(rows)}

    task = ConfigurableTask(
        config={
            "task": "made_here",
            "custom_dataset": documents,
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": until, "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    results = [
        evaluator.evaluate(lm=harness(kind, model), task_dict={"made_here": task}, bootstrap_iters=0)
        for kind in (HFLM, AsyncHFLM)
    ]
    want, got = (result["results"]["made_here"] for result in results)
    assert got == want
    assert want["exact_match,none"] == 0.5
    texts = [[sample["resps"] for sample in result["samples"]["made_here"]] for result in results]
    assert texts[0] == texts[1]


def test_under_the_autocast_of_the_harness(model: Any) -> None:
    until = stops(model)
    plain = harness(HFLM, model, mixed_precision_dtype="bfloat16")
    ours = harness(AsyncHFLM, model, mixed_precision_dtype="bfloat16")
    assert ours.generate_until(requests(until)) == plain.generate_until(requests(until))
    layers = get_manager(model).assembly.forward.layers  # type: ignore[union-attr]
    assert {layer.dtype for layer in layers} == {torch.bfloat16}


def test_a_model_that_carries_the_plug(model: Any) -> None:
    """Without a subclass: `generate` of the caller's own object gets the argument for good."""
    until = stops(model)
    want = harness(HFLM, model).generate_until(requests(until))
    get_manager(model).close()
    model.generate = functools.partial(model.generate, custom_generate=hf_async_batching.generate)
    try:
        got = harness(HFLM, model).generate_until(requests(until))
    finally:
        del model.generate
    assert got == want
    assert get_manager(model).stats().steps > 0
