"""One more argument, and calls from many threads share one batch.

Run: python examples/quickstart.py [--model NAME_OR_FOLDER] [--max-new-tokens 60]
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_async_batching

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--max-new-tokens", type=int, default=60)
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device).eval()


def answer(question: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    outputs = model.generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        custom_generate=hf_async_batching.generate,  # the only new argument
    )
    return tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


questions = ["Name three fruits.", "Why is the sky blue?", "What is 17 plus 25?"]
with ThreadPoolExecutor(len(questions)) as threads:
    for question, text in zip(questions, threads.map(answer, questions), strict=True):
        print(f"{question}\n  {text}")
