"""Your own logits processor, as for plain `generate`: it keeps a letter out of the answer.

Run: python examples/custom_logits_processor.py [--model NAME_OR_FOLDER] [--letter e] [--max-new-tokens 40]
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from hf_async_batching import GenerationManager

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--letter", default="e")
parser.add_argument("--max-new-tokens", type=int, default=40)
arguments = parser.parse_args()


class WithoutLetter(LogitsProcessor):
    """Gets token ids [1, length] and scores [1, vocabulary]. No other request waits for the thread that calls it."""

    def __init__(self, letter, tokenizer, vocabulary, device):
        texts = [tokenizer.decode([token]).lower() for token in range(vocabulary)]
        self.forbidden = torch.tensor([letter in text for text in texts], device=device)

    def __call__(self, input_ids, scores):  # noqa: ARG002
        return scores.masked_fill(self.forbidden, float("-inf"))


tokenizer = AutoTokenizer.from_pretrained(arguments.model)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device).eval()
processor = WithoutLetter(arguments.letter, tokenizer, model.config.vocab_size, device)
prompt = tokenizer("The best way to spend a summer day is").input_ids
with GenerationManager(model) as manager:
    common = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    handles = [manager.submit(prompt, logits_processor=[processor], **common), manager.submit(prompt, **common)]
    for name, handle in zip((f"without {arguments.letter!r}", "as it is"), handles, strict=True):
        print(f"{name}: {tokenizer.decode(handle.result().token_ids, skip_special_tokens=True)}")
