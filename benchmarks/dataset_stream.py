"""Checks that memory stays flat over a stream of many short rows on a tiny random model.

python -m benchmarks.dataset_stream                      # 100,000 rows, printed every 10,000
python -m benchmarks.dataset_stream --resume-dir FOLDER  # the same, written to shards
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Features, IterableDataset, Value

from benchmarks.dataset_speed import word_tokenizer
from hf_async_batching import BatchingConfig, DatasetProgress, GenerationManager, generate_dataset
from hf_async_batching.bench.shapes import random_model


def rows(count: int) -> Iterator[dict[str, Any]]:
    for i in range(count):
        yield {"prompt": " ".join(f"w{3 + (i * k) % 200}" for k in range(1, 3 + i % 6)), "number": i}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--every", type=int, default=10_000)
    parser.add_argument("--new", type=int, default=4)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--resume-dir", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    tokenizer, process, began = word_tokenizer(model.config.vocab_size), psutil.Process(), time.perf_counter()
    shown = 0

    def show(done: int) -> None:
        nonlocal shown
        if done >= shown + arguments.every:
            shown = done // arguments.every * arguments.every
            now = process.memory_info().rss / 1e6
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            rate = done / (time.perf_counter() - began)
            print(f"{done:8,} rows   {now:7.1f} MB now   {peak:7.1f} MB at most   {rate:6.0f} rows/s", flush=True)

    def callback(progress: DatasetProgress) -> None:
        show(progress.rows)

    features = Features({"prompt": Value("string"), "number": Value("int64")})
    stream = IterableDataset.from_generator(rows, gen_kwargs={"count": arguments.rows}, features=features)
    config = BatchingConfig(max_rows=128, max_batch_tokens=1024, page_size=16, num_pages=1024)
    with GenerationManager(model, config) as manager:
        done = generate_dataset(
            manager,
            stream,
            tokenizer,
            max_new_tokens=arguments.new,
            do_sample=False,
            window=arguments.window,
            resume_dir=arguments.resume_dir,
            callback=callback,
        )
        count = 0
        for count, row in enumerate(done, 1):
            assert row["number"] == count - 1
            show(count)
    print(f"{count:,} rows in {time.perf_counter() - began:.0f} s")
    assert count == arguments.rows


if __name__ == "__main__":
    main()
