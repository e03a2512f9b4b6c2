"""Measures prompt lookup on a text that repeats itself and on one that does not, with drafts and without.

    python -m benchmarks.prompt_lookup [--model DIR] [--dtype bfloat16] [--tokens 10] [--new 128]

Greedy. Each line is the median of `--repeats`, after a warm-up. `generate` is transformers' own prompt lookup, which
serves one sequence at a time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.serving.embedded_model import embedded_model_dir
from hf_async_batching import BatchingConfig, GenerationManager

REPORT = (
    "The bridge was opened in 1874. It has three spans of forty metres, and two towers of red brick. In 1921 the deck "
    "was made wider, so that two carriages could pass. The towers were cleaned in 1988. Today the bridge carries only "
    "people on foot, and a small museum in the east tower tells how it was built."
)
TASKS = {
    "repeats": f"Copy the following text word for word, and nothing else.\n\n{REPORT}",
    "does not": "Write a short story about a fisherman who finds a letter in a bottle.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a chat model (the embedded SmolLM2)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=10, help="prompt_lookup_num_tokens")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--depth", type=int, default=None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    path = arguments.model or embedded_model_dir()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    settings = {"max_new_tokens": arguments.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    lookup = {"prompt_lookup_num_tokens": arguments.tokens}
    config = BatchingConfig(depth=arguments.depth, prefix_cache=False)
    print(f"{path}, {dtype}, {device}, torch {torch.__version__}")
    print(f"{arguments.new} new tokens, drafts of up to {arguments.tokens}")
    with GenerationManager(model, config) as manager:
        manager.warmup()
        for name, text in TASKS.items():
            ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
            prompt: list[int] = ids["input_ids"]

            def ours(rows: int, extra: dict[str, Any], prompt: list[int] = prompt) -> list[list[int]]:
                handles = [manager.submit(prompt, **settings, **extra) for _ in range(rows)]
                return [handle.result().token_ids for handle in handles]

            def theirs(rows: int, extra: dict[str, Any], prompt: list[int] = prompt) -> list[list[int]]:
                batch = torch.tensor([prompt], device=device)
                return [model.generate(batch, **settings, **extra)[0, len(prompt) :].tolist() for _ in range(rows)]

            for rows in arguments.rows:
                before = manager.stats()
                seconds, tokens = measure(ours, rows, {}, arguments.repeats)
                drafted_seconds, drafted_tokens = measure(ours, rows, lookup, arguments.repeats)
                after = manager.stats()
                accepted = after.accepted_tokens - before.accepted_tokens
                share = accepted / max(1, after.drafted_tokens - before.drafted_tokens)
                made = rows * arguments.new
                print(
                    f"{name:9s} {rows} rows: {made / seconds:7.1f} tok/s, with drafts {made / drafted_seconds:7.1f} "
                    f"(x {seconds / drafted_seconds:.2f}); {share:.0%} of drafted tokens right; "
                    f"tokens {'equal' if tokens == drafted_tokens else 'differ'}",
                    flush=True,
                )
            seconds, _ = measure(theirs, 1, {}, arguments.repeats)
            drafted_seconds, _ = measure(theirs, 1, lookup, arguments.repeats)
            print(
                f"{name:9s} `generate`: {arguments.new / seconds:5.1f} tok/s, "
                f"with drafts {arguments.new / drafted_seconds:5.1f} (x {seconds / drafted_seconds:.2f})",
                flush=True,
            )


def measure(run: Any, rows: int, extra: dict[str, Any], repeats: int) -> tuple[float, list[list[int]]]:
    """Return the median of the seconds, and the tokens."""
    tokens = run(rows, extra)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run(rows, extra)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), tokens


if __name__ == "__main__":
    main()
