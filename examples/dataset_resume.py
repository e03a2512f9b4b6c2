"""A model over a dataset. Kill it and run it again: it continues where it stopped, and ends with the same rows.

Run: python examples/dataset_resume.py [--model NAME_OR_FOLDER] [--rows 200] [--folder run]
Needs: pip install -e ".[datasets]"
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_async_batching import generate_dataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rows", type=int, default=200)
parser.add_argument("--folder", default="run")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device).eval()

rows = [{"question": f"What is {number} times {number + 3}?"} for number in range(arguments.rows)]
answers = generate_dataset(
    model,
    Dataset.from_list(rows),
    tokenizer,
    prompt="question",
    chat=True,
    system_prompt="Answer with a number only.",
    max_new_tokens=12,
    do_sample=True,  # each row has its own seed, so the answers are the same in every run
    resume_dir=arguments.folder,
)
for row in answers.take(3):
    print(row["question"], "->", row["completion"], f"({row['finish_reason']})")
print(f"{len(answers)} rows are in {arguments.folder}/data")
