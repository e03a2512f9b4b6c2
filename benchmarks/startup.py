"""Measures the time of a loaded model to its first token and to full speed, with empty and with warm kernel caches.

python -m benchmarks.startup --shape llama-3.1-8b --out DIR

Each start is its own process. It makes the model, waits for the device, and starts the clock at its first `submit`.
Then 32 requests run until the engine's decode steps have reached their final time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.stack_samples import StackSamples

ROWS, PROMPT = 32, 32


def one_start(shape: str, device: torch.device, new: int, profile: Path | None) -> dict[str, Any]:
    from hf_async_batching import BatchingConfig, GenerationManager
    from hf_async_batching.bench.shapes import random_model

    model = random_model(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if device.type == "cuda":
        torch.cuda.synchronize()
    vocab = model.config.vocab_size
    samples = StackSamples()
    with GenerationManager(model, BatchingConfig(timeline_steps=1 << 16)) as manager:
        began = time.perf_counter()
        with nullcontext() if profile is None else samples:
            first = manager.submit([(7 * i + 3) % vocab for i in range(PROMPT)], max_new_tokens=2, do_sample=False)
            submitted = time.perf_counter() - began
            next(iter(first))
            first_token = time.perf_counter() - began
        handles = [
            manager.submit([(11 * i + j) % vocab for i in range(PROMPT)], max_new_tokens=new, do_sample=False)
            for j in range(ROWS)
        ]
        for handle in handles:
            handle.result()
        steps = [s for s in manager.timeline().steps if s.decode_rows == ROWS and not s.prompt_tokens]
        graphs = manager.stats().graphs
    if profile is not None:
        profile.write_text(samples.report())
    seconds = [b.compute[1] - a.compute[1] for a, b in itertools.pairwise(steps) if b.step == a.step + 1]
    final = median(seconds[-50:])
    slow = [i for i in range(len(seconds) - 10) if median(seconds[i : i + 10]) > 1.1 * final]
    return {
        "submit": submitted,
        "first_token": first_token,
        "full_speed": steps[slow[-1] + 10 if slow else 0].compute[1] - began,
        "final_ms_per_step": 1e3 * final,
        "first_ms_per_step": 1e3 * median(seconds[:10]),
        "graphs": graphs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--new", type=int, default=3000, help="tokens of the 32 requests: enough to reach full speed")
    parser.add_argument("--profile", action="store_true", help="write stack samples of the starts into DIR")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.profile and arguments.out is None:
        parser.error("--profile writes its samples into a folder: pass --out DIR")
    if arguments.one:
        name = f"startup-{arguments.one.replace(' ', '-')}.profile"
        profile = arguments.out / name if arguments.profile else None
        print(json.dumps(one_start(arguments.shape, torch.device(arguments.device), arguments.new, profile)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        for name in ("empty caches", "warm caches"):
            command = [sys.executable, "-m", "benchmarks.startup", "--one", name, "--shape", arguments.shape]
            command += ["--device", arguments.device, "--new", str(arguments.new)]
            if arguments.profile:
                arguments.out.mkdir(parents=True, exist_ok=True)
                command += ["--profile", "--out", str(arguments.out)]
            done = subprocess.run(command, env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True, check=True)
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, {key: round(value, 2) for key, value in results[name].items()}, flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"startup-{arguments.shape}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
