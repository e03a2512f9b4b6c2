"""TRL's GRPO on its plain generation path."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.tiny_models import tiny_model
from support.tiny_tokenizer import tiny_tokenizer

import hf_async_batching
from hf_async_batching import get_manager

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl")
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["hello", "whatisit"]
STEPS = 4


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "lora"])
def test_every_step_generates_with_the_weights_of_that_step(tmp_path: Path, adapters: bool) -> None:
    """TRL trains on what the engine samples; beside each call, what can only come out one way is compared."""
    model = tiny_model("Llama")
    plain = model.generate
    answers: list[torch.Tensor] = []

    def generate(**arguments: Any) -> torch.Tensor:
        sure = copy.deepcopy(arguments["generation_config"])
        sure.top_k = 1
        want = plain(**{**arguments, "generation_config": sure})
        got = plain(**{**arguments, "generation_config": sure}, custom_generate=hf_async_batching.generate)
        assert torch.equal(got, want)
        answers.append(got)
        return plain(**arguments, custom_generate=hf_async_batching.generate, seed=len(answers))

    # The object is the caller's: whatever calls its `generate` from now on, TRL too, uses the engine.
    model.generate = generate
    completions: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        completions.extend(completion_ids)
        return [float(len(set(tokens))) for tokens in completion_ids]

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=10,
            max_steps=STEPS,
            learning_rate=0.2 if adapters else 0.02,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]) if adapters else None,
    )
    trainer.train()
    assert len(answers) == STEPS
    assert len({str(answer.tolist()) for answer in answers}) > 2, "training must change what is generated"
    assert len({tuple(tokens) for tokens in completions}) > STEPS * 2, "completions are drawn apart"
    assert {type(p.grad) for p in trainer.model.parameters()} <= {torch.Tensor, type(None)}
    get_manager(model).close()


def test_the_recipe_of_the_docs(tmp_path: Path) -> None:
    """One argument for good, on the caller's own object."""
    model = tiny_model("Llama")
    model.generate = functools.partial(model.generate, custom_generate=hf_async_batching.generate)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **_: [float(sum(tokens)) for tokens in completion_ids],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=6,
            max_steps=1,
            use_cpu=True,
            bf16=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    manager = get_manager(model)
    assert manager.stats().steps >= 6
    assert manager.assembly is not None
    assert manager.assembly.forward.layers[0].dtype == torch.bfloat16, "the trainer's own autocast"
    manager.close()
