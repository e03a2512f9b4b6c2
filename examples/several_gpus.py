"""Data parallel over a dataset: each process has a copy of the model and completes its share of the shards.

Run: torchrun --nproc_per_node 4 examples/several_gpus.py     (or: accelerate launch --num_processes 4 ...)
     python examples/several_gpus.py                          (one process, also on a CPU)
Needs: pip install -e ".[datasets]"

If a process dies, the launch ends. The same command then continues the run, also with another number of processes.
"""

import argparse
import os

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_async_batching import generate_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rows", type=int, default=2000)
parser.add_argument("--folder", default="run-of-several", help="a folder that all processes can reach")
arguments = parser.parse_args()

rank = int(os.environ.get("RANK", "0"))
device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device).eval()

questions = [f"Write one sentence about the number {number}." for number in range(arguments.rows)]
dataset = Dataset.from_dict({"prompt": questions})
# RANK and WORLD_SIZE give the ranks. Every process passes the whole dataset, and gets the whole dataset back.
dataset = generate_dataset(model, dataset, tokenizer, chat=True, max_new_tokens=40, resume_dir=arguments.folder)
if rank == 0:
    print(dataset)
    print(dataset[0]["completion"])
