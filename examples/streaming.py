"""Submit a request to your own engine, print its text as it is generated, and see how it was served.

Run: python examples/streaming.py [--model NAME_OR_FOLDER] [--prompt TEXT] [--max-new-tokens 100]
"""

import argparse

import torch
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_async_batching import GenerationManager

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--prompt", default="Tell me a story about a lighthouse.")
parser.add_argument("--max-new-tokens", type=int, default=100)
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device).eval()
chat = [{"role": "user", "content": arguments.prompt}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

with GenerationManager(model) as manager:
    handle = manager.submit(
        prompt, max_new_tokens=arguments.max_new_tokens, do_sample=True, temperature=0.7, top_p=0.9, seed=1
    )
    text = DecodeStream(skip_special_tokens=True)  # holds a character back until all of its tokens have arrived
    for token in handle:
        print(text.step(tokenizer.backend_tokenizer, token) or "", end="", flush=True)
    result = handle.result()

print(f"\n[{len(result.token_ids)} tokens, ended by {result.finish_reason}]")
if result.metrics.time_to_first_token is not None:
    print(f"[first token after {1000 * result.metrics.time_to_first_token:.0f} ms]")
