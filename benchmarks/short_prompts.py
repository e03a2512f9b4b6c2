"""Measures short prompts that join decoding rows, with their steps captured as CUDA graphs and without.

python -m benchmarks.short_prompts --shape qwen3-0.6b --context 512
python -m benchmarks.short_prompts --shape llama-3.1-8b --context 2048
python -m benchmarks.short_prompts --shape tiny --device cpu --rows 2 --context 16 --joins 3   # nothing is captured

--joins prompts of 20 to 219 tokens arrive one after the other, each for 4 new tokens, while --rows requests decode.
The first run also captures the graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.bench.shapes import SHAPES, random_model


def join(manager: GenerationManager, rows: int, context: int, joins: int, first: int) -> tuple[float, float]:
    """Return the mean seconds of a join, and the median time to its first token. `first` makes prompts differ."""
    vocab: int = manager.model.config.vocab_size
    greedy = {"do_sample": False, "eos_token_id": None}
    base = [manager.submit([i % vocab] * context, max_new_tokens=40 * joins, **greedy) for i in range(rows)]
    while not all(handle.token_ids for handle in base):
        time.sleep(0.01)
    began, waited = time.perf_counter(), []
    for number in range(joins):
        prompt = [(7 * (first + number) + i) % vocab for i in range(20 + 37 * number % 200)]
        metrics = manager.submit(prompt, max_new_tokens=4, **greedy).result().metrics
        assert metrics.time_to_first_token is not None
        waited.append(metrics.time_to_first_token)
    seconds = (time.perf_counter() - began) / joins
    for handle in base:
        handle.cancel()
        handle.result()
    return seconds, statistics.median(waited)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--joins", type=int, default=60)
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    model = random_model(arguments.shape, torch.device(arguments.device), dtype)
    with GenerationManager(model, BatchingConfig(prefix_cache=False)) as manager:
        manager.warmup()
        runner = manager.assembly.runner
        sizes = runner.paddings
        for number, captured in enumerate((True, True, False, True, False)):
            runner._paddings = sizes if captured else []
            first = number * arguments.joins
            each, median = join(manager, arguments.rows, arguments.context, arguments.joins, first)
            print(
                f"{arguments.shape}, {arguments.rows} rows at {arguments.context}, "
                f"{'captured' if captured else 'not captured'}: {1e3 * each:.1f} ms a join, "
                f"first token {1e3 * median:.1f} ms, {len(runner.graphs.captured)} graphs",
                flush=True,
            )


if __name__ == "__main__":
    main()
