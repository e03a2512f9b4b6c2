"""Compares `generate_dataset` with the bare engine, and with a padded loop of `model.generate`, on the same lengths.

python -m benchmarks.dataset_speed --out results               # about four minutes on an H100
python -m benchmarks.dataset_speed --shape tiny --device cpu --rows 40 --plain-rows 8

Rows are texts, and each word is one token. The measured time includes tokenizing, decoding and row parameters. Lengths
are log-normal, as in chats: prompts of 150 tokens (median; 8 to 1,024), completions of 140 (8 to 640). Random weights,
greedy, no end of sequence. With the package `datasets`, the rows are a `Dataset` and are written to a `resume_dir` as
they finish; that also needs the packages that `datasets` requires (pyarrow, dill, multiprocess, xxhash, pandas,
fsspec, huggingface-hub). Without `datasets`, or with --no-datasets, the rows are a list of dictionaries.

The padded loop serves --plain-rows rows in their order. A short trial of each of --plain-batches finds the batch size
with most tokens per second, and the loop uses that size.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_async_batching import BatchingConfig, GenerationManager, generate_dataset
from hf_async_batching.bench.machine import look_at
from hf_async_batching.bench.shapes import SHAPES, random_model
from hf_async_batching.core.request import Request

TRIAL_STEPS = 12


def lengths(rows: int, longest_prompt: int, longest_new: int) -> list[tuple[int, int]]:
    """Draw the numbers of prompt and new tokens of each row."""
    draw = random.Random(0)

    def one(median: float, longest: int) -> int:
        return max(min(8, longest), min(longest, round(draw.lognormvariate(0, 0.8) * min(median, longest / 4))))

    return [(one(150, longest_prompt), one(140, longest_new)) for _ in range(rows)]


def prompts(sizes: list[tuple[int, int]], vocab: int, seed: int) -> list[list[int]]:
    """Draw the token ids; prompts of another seed share no prefix with them."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocab) for _ in range(length)] for length, _ in sizes]


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose token 17 is the word "w17"."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w0")


def bare_engine(manager: GenerationManager, sizes: list[tuple[int, int]], ids: list[list[int]]) -> float:
    """Serve requests that all arrive at the start, as the bench does. Returns seconds."""
    requests = [Request(f"bare-{i}", tuple(p), new) for i, (p, (_, new)) in enumerate(zip(ids, sizes, strict=True))]
    began = time.perf_counter()
    results = [handle.result() for handle in manager.submit_requests(requests)]
    seconds = time.perf_counter() - began
    assert [len(result.token_ids) for result in results] == [new for _, new in sizes]
    return seconds


def over_dataset(
    manager: GenerationManager, sizes: list[tuple[int, int]], ids: list[list[int]], tokenizer: Any, with_datasets: bool
) -> float:
    """Complete texts with `generate_dataset`. Returns seconds."""
    rows = [
        {"prompt": " ".join(f"w{token}" for token in prompt), "max_new_tokens": new}
        for prompt, (_, new) in zip(ids, sizes, strict=True)
    ]
    arguments: dict[str, Any] = {"row_parameters": ["max_new_tokens"], "do_sample": False, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        dataset: Any = rows
        if with_datasets:
            from datasets import Dataset

            dataset = Dataset.from_list(rows)
            arguments["resume_dir"] = Path(folder, "run")
        began = time.perf_counter()
        done = generate_dataset(manager, dataset, tokenizer, **arguments)
        seconds = time.perf_counter() - began
        counts = done["completion_tokens"][:] if with_datasets else [row["completion_tokens"] for row in done]
    assert counts == [new for _, new in sizes]
    return seconds


def padded(model: Any, sizes: list[tuple[int, int]], ids: list[list[int]], batch: int, new: int | None) -> float:
    """Run `model.generate` over left-padded batches, each to its longest completion or `new`. Returns seconds."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        width = max(map(len, part))
        input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=model.device)
        longest = new or max(count for _, count in sizes[start : start + batch])
        out = model.generate(input_ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=0)
        out.tolist()
    return time.perf_counter() - began


def best_batch(model: Any, sizes: list[tuple[int, int]], ids: list[list[int]], batches: list[int]) -> dict[int, float]:
    """Return the tokens per second of a few steps, without the prompts, at each batch size that fits into memory."""
    found = {}
    for batch in batches:
        part = [(ids * (1 + batch // len(ids)))[i] for i in range(batch)]
        try:
            padded(model, sizes, part, batch, 2)
            one, many = (padded(model, sizes, part, batch, new) for new in (1, 1 + TRIAL_STEPS))
        except torch.OutOfMemoryError:
            break
        found[batch] = batch * TRIAL_STEPS / max(many - one, 1e-9)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--longest-prompt", type=int, default=1024)
    parser.add_argument("--longest-new", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--plain-rows", type=int, default=128, help="rows of the padded loop; 0 leaves it out")
    parser.add_argument("--plain-batches", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--no-datasets", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with_datasets = not arguments.no_datasets and importlib.util.find_spec("datasets") is not None
    model = random_model(arguments.shape, device, dtype)
    vocab = model.config.vocab_size
    machine, tokenizer = look_at(device), word_tokenizer(vocab)
    sizes = lengths(arguments.rows, arguments.longest_prompt, arguments.longest_new)
    tokens, longest = sum(new for _, new in sizes), max(a + b for a, b in sizes)
    print(
        f"{machine}; {arguments.shape}, {dtype}; {len(sizes):,} rows, {sum(p for p, _ in sizes):,} prompt and "
        f"{tokens:,} new tokens; rows as {'a Dataset, with resume_dir' if with_datasets else 'a list'}",
        flush=True,
    )
    results: dict[str, Any] = {"bare": [], "dataset": []}
    config = BatchingConfig(max_sequence_length=longest + 16, max_waiting=len(sizes), idle_timeout=None)
    with GenerationManager(model, config) as manager:
        began = time.perf_counter()
        manager.warmup()
        brief = [(p, min(new, 4)) for p, new in sizes]
        bare_engine(manager, brief, prompts(sizes, vocab, -1))
        results["start_seconds"] = time.perf_counter() - began
        for repeat in range(arguments.repeats):
            results["bare"].append(bare_engine(manager, sizes, prompts(sizes, vocab, 2 * repeat)))
            ids = prompts(sizes, vocab, 2 * repeat + 1)
            results["dataset"].append(over_dataset(manager, sizes, ids, tokenizer, with_datasets))
    bare, dataset = tokens / min(results["bare"]), tokens / min(results["dataset"])
    table = [("the engine, without a dataset", bare, ""), ("generate_dataset", dataset, f"{dataset / bare:.1%}")]
    if arguments.plain_rows:
        few = slice(0, arguments.plain_rows)
        ids = prompts(sizes, vocab, -2)
        trials = best_batch(model, sizes[few], ids[few], arguments.plain_batches)
        batch = max(trials, key=lambda size: trials[size])
        seconds = padded(model, sizes[few], ids[few], batch, None)
        plain = sum(new for _, new in sizes[few]) / seconds
        results |= {"plain": seconds, "plain_batch": batch, "plain_trials": trials, "plain_rows": arguments.plain_rows}
        table.append((f"padded model.generate, batches of {batch}", plain, f"dataset {dataset / plain:.2f}x"))
    print(f"\n{'':42}{'output tok/s':>14}\n" + "\n".join(f"{a:42}{b:14,.0f}   {c}" for a, b, c in table), flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"dataset-{arguments.shape}.json"
        document = {
            "machine": str(machine),
            "torch": torch.__version__,
            "shape": arguments.shape,
            "dtype": str(dtype),
            "rows": len(sizes),
            "prompt_tokens": sum(p for p, _ in sizes),
            "new_tokens": tokens,
            "as_dataset": with_datasets,
            "output_tokens_per_second": {name: rate for name, rate, _ in table},
            **results,
        }
        path.write_text(json.dumps(document, indent=1))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
