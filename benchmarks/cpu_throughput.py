"""SmolLM2 on a CPU: this engine, one padded `model.generate` batch, and transformers' own continuous batching.

16 ragged requests (prompts of 16 to 256 tokens, 16 to 128 new tokens, greedy, no end-of-sequence), all there at the
start; the same requests for everyone, in the same process, each after a warm-up; best of `--repeats`.

    python -m benchmarks.cpu_throughput
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from demo.embedded import embedded_model_dir
from hf_async_batching import BatchingConfig, GenerationManager

Requests = list[tuple[list[int], int]]


def make_requests(count: int, vocab: int) -> Requests:
    rng = random.Random(0)
    return [
        ([rng.randrange(100, vocab) for _ in range(rng.randint(16, 256))], rng.randint(16, 128)) for _ in range(count)
    ]


def engine(model: PreTrainedModel, requests: Requests, config: BatchingConfig) -> Callable[[], list[list[int]]]:
    def run() -> list[list[int]]:
        handles = [
            manager.submit(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None) for prompt, new in requests
        ]
        return [handle.result().token_ids for handle in handles]

    manager = GenerationManager(model, config)
    manager.submit(requests[0][0], max_new_tokens=2, do_sample=False).result()
    return run


def padded(model: PreTrainedModel, requests: Requests) -> Callable[[], list[list[int]]]:
    width = max(len(prompt) for prompt, _ in requests)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in requests])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in requests])
    longest = max(new for _, new in requests)

    def run() -> list[list[int]]:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=0)
        return [row[:new] for row, (_, new) in zip(out[:, width:].tolist(), requests, strict=True)]

    model.generate(ids[:, -8:], attention_mask=mask[:, -8:], max_new_tokens=2, do_sample=False, pad_token_id=0)
    return run


def transformers_batching(model: PreTrainedModel, requests: Requests) -> Callable[[], list[list[int]]]:
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=128)

    def run_some(some: Requests) -> list[list[int]]:
        with model.continuous_batching_context_manager(generation_config=config, persistent_manager=True) as manager:
            ids = [manager.add_request(prompt, max_new_tokens=new) for prompt, new in some]
            finished: dict[str, list[int]] = {}
            while len(finished) < len(ids):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    finished[output.request_id] = output.generated_tokens
        return [finished[request_id] for request_id in ids]

    run_some([(prompt, 2) for prompt, _ in requests[:2]])
    return lambda: run_some(requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--page-size", type=int, default=None)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    requests = make_requests(arguments.requests, 49_000)
    new = sum(count for _, count in requests)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads; "
        f"{len(requests)} requests, {sum(len(p) for p, _ in requests)} prompt and {new} new tokens"
    )
    # Every repeat computes its prompts, as the others do.
    runs = {
        "hf_async_batching": engine(
            model, requests, BatchingConfig(page_size=arguments.page_size, prefix_cache=False)
        ),
        "model.generate, one padded batch": padded(model, requests),
        "transformers continuous batching": transformers_batching(model, requests),
    }
    outputs: dict[str, list[list[int]]] = {}
    for name, run in runs.items():
        seconds = []
        for _ in range(arguments.repeats):
            started = time.perf_counter()
            outputs[name] = run()
            seconds.append(time.perf_counter() - started)
        same = sum(a == b for a, b in zip(outputs[name], outputs["hf_async_batching"], strict=True))
        print(
            f"{name:34s} {min(seconds):7.2f} s  {new / min(seconds):7.1f} tok/s  same tokens as ours: {same}",
            flush=True,
        )


if __name__ == "__main__":
    main()
