"""Measures one model on two GPUs: data parallel over a dataset, and tensor parallel.

python -m benchmarks.two_gpus data --out results        # four minutes on two H100s
python -m benchmarks.two_gpus tensor --out results      # two minutes on two H100s; writes the weights to --folder
python -m benchmarks.two_gpus data --shape tiny --device cpu --rows 60 --longest-prompt 60 --longest-new 20
python -m benchmarks.two_gpus tensor --shape tiny --device cpu --new 20

`data` runs the rows of `benchmarks.dataset_speed` through `generate_dataset` with a `resume_dir`, in one process and
in two that `accelerate launch` starts. Every process has the whole model. The time runs from the end of the last
warm-up to the merged dataset.

`tensor` compares greedy tokens of a small shape in float32 on one device and on two (`tp_plan="auto"` under
torchrun), at depth 1 and 2, with captured graphs and without. Then it times --shape in bfloat16, with 32 rows, on one
and on two devices. It needs space for the weights in --folder (/dev/shm if it exists).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from benchmarks.dataset_speed import lengths, prompts, word_tokenizer
from hf_async_batching import BatchingConfig, GenerationManager, generate_dataset
from hf_async_batching.bench.shapes import SHAPES, random_model

ROWS, PROMPT = 32, 128
# The small shape. All its sizes can be divided by two ranks, and its float32 sums have hundreds of terms.
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["data", "tensor"])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=4000, help="rows of the dataset")
    parser.add_argument("--longest-prompt", type=int, default=1024)
    parser.add_argument("--longest-new", type=int, default=640)
    parser.add_argument("--new", type=int, default=256, help="tokens of each timed row of `tensor`")
    parser.add_argument("--folder", type=Path, help="folder for weights and datasets (a temporary one)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--process", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process is not None:
        {"data": data_process, "one": one_process, "two": two_processes}[arguments.process](arguments)
        return
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as made:
        folder = arguments.folder or Path(made)
        results = (data if arguments.what == "data" else tensor)(folder)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        about = {"shape": arguments.shape, "torch": torch.__version__, "command": " ".join(sys.argv[1:])}
        if arguments.device == "cuda":
            about["cards"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        path = arguments.out / f"two-gpus-{arguments.what}-{arguments.shape}.json"
        path.write_text(json.dumps(about | results, indent=1))
        print(f"wrote {path}")


def start(launcher: Sequence[str], process: str, folder: Path) -> dict[str, Any]:
    """Run this module again with `launcher`; return the results of its first process."""
    command = [sys.executable, *launcher, "-m", "benchmarks.two_gpus", *sys.argv[1:]]
    subprocess.run([*command, "--process", process, "--folder", str(folder)], check=True)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def here(arguments: argparse.Namespace) -> torch.device:
    """Return the device of this process."""
    if arguments.device == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def join(arguments: argparse.Namespace) -> None:
    distributed.init_process_group("gloo" if arguments.device == "cpu" else "cpu:gloo,cuda:nccl")


def data(folder: Path) -> dict[str, Any]:
    both = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    both += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29581"]
    one, two = start([], "data", folder / "one"), start(both, "data", folder / "two")
    texts = zip(one.pop("texts"), two.pop("texts"), strict=True)
    equal = sum(a == b for a, b in texts) / one["rows"]
    print(f"\n{'':12}{'seconds':>10}{'output tok/s':>14}")
    for name, run in (("one device", one), ("two devices", two)):
        print(f"{name:12}{run['seconds']:10.2f}{run['tokens'] / run['seconds']:14,.0f}")
    ratio = one["seconds"] / two["seconds"]
    print(f"{ratio:.2f}x; {equal:.1%} of {one['rows']:,} completions equal")
    return {"one": one, "two": two, "ratio": ratio, "equal": equal}


def data_process(arguments: argparse.Namespace) -> None:
    """Run a process of `data`, alone or with another one."""
    from datasets import Dataset

    device, rank = here(arguments), int(os.environ.get("RANK", "0"))
    shared = "RANK" in os.environ
    if shared:
        join(arguments)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = random_model(arguments.shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer = word_tokenizer(model.config.vocab_size)
    sizes = lengths(arguments.rows, arguments.longest_prompt, arguments.longest_new)

    def rows(seed: int, count: int, most: int) -> Dataset:
        ids = prompts(sizes[:count], model.config.vocab_size, seed)
        texts = [" ".join(f"w{token}" for token in prompt) for prompt in ids]
        new = [min(new, most) for _, new in sizes[:count]]
        return Dataset.from_dict({"prompt": texts, "max_new_tokens": new})

    options: dict[str, Any] = {"row_parameters": ["max_new_tokens"], "do_sample": False, "progress": False}
    config = BatchingConfig(max_sequence_length=max(a + b for a, b in sizes) + 16, idle_timeout=None)
    with GenerationManager(model, config) as manager:
        manager.warmup()
        generate_dataset(manager, rows(1, 256, 4), tokenizer, rank=0, world_size=1, **options)
        dataset = rows(0, len(sizes), arguments.longest_new)
        if shared:
            distributed.barrier()
        began = time.perf_counter()
        done = generate_dataset(manager, dataset, tokenizer, resume_dir=arguments.folder / "run", **options)
        seconds = time.perf_counter() - began
    assert done["completion_tokens"][:] == dataset["max_new_tokens"][:]
    if rank == 0:
        result = {"seconds": seconds, "rows": len(sizes), "tokens": sum(done["completion_tokens"])}
        (arguments.folder / "result.json").write_text(json.dumps(result | {"texts": done["completion"][:]}))
    if shared:
        distributed.barrier()
        distributed.destroy_process_group()


def tensor(folder: Path) -> dict[str, Any]:
    one = start([], "one", folder)
    two = start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], "two", folder)
    expected, same = one.pop("tokens"), {}
    for name, tokens in two.pop("tokens").items():
        same[name] = sum(a == b for a, b in zip(tokens, expected, strict=True))
        print(f"small shape, float32, two devices, {name}: {same[name]} of {len(expected)} equal to one device's")
    print(f"\n{'':32}{'seconds':>10}{'output tok/s':>14}{'ms/step':>10}")
    for name, run in [("one device", one["timed"]), *two["timed"].items()]:
        print(f"{name:32}{run['seconds']:10.2f}{run['tokens_per_second']:14,.0f}{run['ms_per_step']:10.2f}")
    return {"small_equal": same, "small_requests": len(expected), "one": one["timed"], "two": two["timed"]}


def one_process(arguments: argparse.Namespace) -> None:
    """Run the model on one device, and leave its weights in the folder."""
    device = here(arguments)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    small = random_model("llama-3.1-8b", device, torch.float32, num_attention_heads=8, head_dim=64, **SMALL)
    small.save_pretrained(arguments.folder / "small")
    with GenerationManager(small, small_config(2)) as manager:
        tokens = small_tokens(manager)
    del small
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(arguments.shape, device, dtype)
    with GenerationManager(model, timed_config(arguments)) as manager:
        result = {"tokens": tokens, "timed": timed(manager, arguments)}
    model.save_pretrained(arguments.folder / "large", max_shard_size="4GB")
    (arguments.folder / "result.json").write_text(json.dumps(result))


def two_processes(arguments: argparse.Namespace) -> None:
    """Run a rank of the model on two devices."""
    device, path = here(arguments), arguments.folder / "result.json"
    join(arguments)
    small = AutoModelForCausalLM.from_pretrained(arguments.folder / "small", tp_plan="auto", dtype=torch.float32)
    results: dict[str, Any] = {"tokens": {}, "timed": {}}
    graphs = [False, True] if device.type == "cuda" else [False]
    for depth in (1, 2):
        for captured in graphs:
            with GenerationManager(small.eval(), small_config(depth, cuda_graphs=captured)) as manager:
                if manager.leads:
                    results["tokens"][f"depth {depth}{', captured' if captured else ''}"] = small_tokens(manager)
                    path.write_text(json.dumps(results))
                else:
                    manager.follow()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "large", tp_plan="auto", dtype=dtype).eval()
    for captured in graphs:
        with GenerationManager(model, timed_config(arguments, cuda_graphs=captured)) as manager:
            if manager.leads:
                results["timed"][f"two devices{', captured' if captured else ''}"] = timed(manager, arguments)
                path.write_text(json.dumps(results))
            else:
                manager.follow()
    distributed.barrier()
    distributed.destroy_process_group()


def small_config(depth: int, **changes: Any) -> BatchingConfig:
    return BatchingConfig(depth=depth, max_rows=8, max_sequence_length=512, num_pages=256, page_size=16, **changes)


def small_tokens(manager: GenerationManager) -> list[list[int]]:
    """Return greedy tokens of prompts of different lengths, more prompts than the engine has rows."""
    ids = prompts([(9 + 17 * i % 300, 0) for i in range(24)], SMALL["vocab_size"], 3)
    handles = [manager.submit(prompt, max_new_tokens=100, do_sample=False) for prompt in ids]
    return [handle.result().token_ids for handle in handles]


def timed_config(arguments: argparse.Namespace, **changes: Any) -> BatchingConfig:
    longest = PROMPT + arguments.new + 16
    return BatchingConfig(max_rows=ROWS, max_sequence_length=longest, num_pages=ROWS * longest // 8, **changes)


def timed(manager: GenerationManager, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the seconds from the first `submit` to the last token, after a warm-up run."""
    manager.warmup()
    for seed, new in ((1, 8), (2, arguments.new)):
        ids = prompts([(PROMPT, 0)] * ROWS, manager.model.config.vocab_size, seed)
        began, before = time.perf_counter(), manager.stats().steps
        for handle in [manager.submit(prompt, max_new_tokens=new, do_sample=False) for prompt in ids]:
            handle.result()
        seconds, steps = time.perf_counter() - began, manager.stats().steps - before
    return {
        "seconds": seconds,
        "tokens_per_second": ROWS * arguments.new / seconds,
        "ms_per_step": 1e3 * seconds / steps,
    }


if __name__ == "__main__":
    main()
