"""TRL's GRPO: the completions of each step come from the engine, with the weights of that step.

Run: python examples/trl_grpo.py [--model NAME_OR_FOLDER] [--steps 20] [--folder grpo]
Needs: pip install "trl>=1.0" datasets
"""

import argparse
import functools

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from hf_async_batching import BatchingConfig, generate, get_manager

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--folder", default="grpo")
arguments = parser.parse_args()

gpu = torch.cuda.is_available()
model = AutoModelForCausalLM.from_pretrained(arguments.model).to("cuda" if gpu else "cpu")
get_manager(model, BatchingConfig(memory_fraction=0.2))  # the cache shares the memory with training
model.generate = functools.partial(model.generate, custom_generate=generate)  # only on this object
config = GRPOConfig(
    output_dir=arguments.folder, max_steps=arguments.steps, per_device_train_batch_size=8, num_generations=4,
    max_completion_length=32, learning_rate=1e-5, use_cpu=not gpu, bf16=gpu, report_to="none", logging_steps=1,
)  # fmt: skip
trainer = GRPOTrainer(
    model=model,
    reward_funcs=lambda completions, **_: [-abs(20.0 - len(text)) for text in completions],  # 20 characters
    args=config,
    train_dataset=Dataset.from_dict({"prompt": ["The weather is", "My favourite colour is"] * 64}),
    processing_class=AutoTokenizer.from_pretrained(arguments.model),
)
trainer.train()
