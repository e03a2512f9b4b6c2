"""SmolLM2 on a CPU: this engine, one padded `model.generate` batch, and transformers' own continuous batching.

16 requests of different lengths (prompts of 16 to 256 tokens, 16 to 128 new tokens, greedy, no end of sequence) arrive
together at the start. All three serve the same requests in the same process, each after a warm-up. Times are medians
of `--repeats`.

    python -m benchmarks.cpu_throughput
"""

from __future__ import annotations

import argparse
import random
from functools import partial

import torch
from transformers import AutoModelForCausalLM

from demo.serving.embedded_model import embedded_model_dir
from hf_async_batching import BatchingConfig
from hf_async_batching.bench.machine import look_at
from hf_async_batching.bench.measure import KEPT_STEPS, measure
from hf_async_batching.bench.peers import run_peer
from hf_async_batching.bench.workloads import Workload
from hf_async_batching.core.request import Request


def make_requests(count: int, vocab: int, seed: int) -> Workload:
    """Make requests. Each seed has the same lengths and other tokens, so that no run finds an earlier run's prefix."""
    rng = random.Random(0)
    requests = [
        Request(
            str(i),
            tuple(100 + (rng.randrange(100, vocab) + seed) % (vocab - 100) for _ in range(rng.randint(16, 256))),
            rng.randint(16, 128),
        )
        for i in range(count)
    ]
    return Workload("ragged", tuple(requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--page-size", type=int, default=None)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    make = partial(make_requests, arguments.requests, 49_000)
    workload = make(0)
    machine = look_at(model.device)
    print(f"{machine}; {workload.num_requests} requests, {workload.prompt_tokens} prompt, {workload.new_tokens} new")
    # Without a prefix cache every repeat computes its prompts, as the peers do.
    config = BatchingConfig(page_size=arguments.page_size, timeline_steps=KEPT_STEPS, prefix_cache=False)
    ours = measure(model, make, config, machine.copy_bandwidth, repeats=arguments.repeats)
    print(row("hf_async_batching", ours.run.seconds, ours.run.output_tokens), flush=True)
    for name in ("generate", "generate_batch"):
        peer = run_peer(name, model, make, repeats=arguments.repeats)
        if peer.error is not None or peer.seconds is None or peer.output_tokens is None:
            print(f"{name}: {peer.error}")
            continue
        same = sum(peer.tokens[i] == tokens for i, tokens in ours.tokens[0].items())
        print(row(name, peer.seconds, peer.output_tokens), f" same tokens as ours: {same}", flush=True)


def row(name: str, seconds: float, tokens: int) -> str:
    return f"{name:34s} {seconds:7.2f} s  {tokens / seconds:7.1f} tok/s"


if __name__ == "__main__":
    main()
