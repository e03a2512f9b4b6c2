"""The arguments of `hf-async-batching bench`; imports no torch, so that `--help` comes at once."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any, get_args

from hf_async_batching.bench.choices import PEERS, QUANTIZATIONS, SIZES, SWITCHES
from hf_async_batching.bench.shape_configs import SHAPES
from hf_async_batching.bench.workloads import WORKLOADS
from hf_async_batching.cli.arguments import command_parser, count
from hf_async_batching.config import Admission

SUMMARY = "measure speed, GPU use and accuracy, also against transformers itself"

_EXAMPLES = f"""\
examples:
  synchronous against asynchronous batching, on random weights of a real model's shape:
    hf-async-batching bench seed --shape llama-3.1-8b --depth 1 2 --out results

  against transformers' own continuous batching and padded generate, on the same work in the same process:
    hf-async-batching bench mix --shape llama-3.1-8b --peer generate_batch generate

  requests in order of arrival, and longest first:
    hf-async-batching bench mix --shape llama-3.1-8b --depth 2 --admission fcfs longest_first

  a small model, where the host is the bottleneck; the median of three runs:
    hf-async-batching bench small --shape qwen3-0.6b --depth 1 2 --repeats 3

  the cost of sampling, with all common filters on every row:
    hf-async-batching bench small --shape qwen3-0.6b --depth 2 --repeats 3
    hf-async-batching bench small --shape qwen3-0.6b --depth 2 --repeats 3 \\
        --sampling temperature=0.8,top_k=50,top_p=0.95,repetition_penalty=1.1

  conversations, with the prefix cache and without it:
    hf-async-batching bench chat --shape qwen3-8b
    hf-async-batching bench chat --shape qwen3-8b --no-prefix-cache

  a mixture of experts, and a model whose linear layers are quantized to 4 bits (needs bitsandbytes):
    hf-async-batching bench small --shape qwen3-30b-a3b
    hf-async-batching bench small --shape qwen3-8b --quantize nf4

  the first layers of a large model, some of each kind:
    hf-async-batching bench small --shape nemotron-h-8b --layers 8

  your own model, on a smaller workload:
    hf-async-batching bench mix small --model path/or/hub-name --rows 32 --new 64

  a dry run in seconds, without a GPU:
    hf-async-batching bench seed small mix chat --shape tiny --rows 4 --prompt 8 --new 8 --device cpu

  the picture of a saved measurement, drawn again:
    hf-async-batching bench --timeline results/seed-llama-3.1-8b.json

workloads (greedy, random token ids, all requests arrive at the start, no end of sequence):
  seed    32 requests of 32 prompt and 8,192 new tokens
  small   256 requests of 64 prompt and 512 new tokens
  mix     256 requests whose prompts and completions have 16 to 1,024 tokens each
  chat    16 conversations of 8 turns; all share a system prompt of 500 tokens; each message follows at once after the
          answer before it

shapes:
{textwrap.fill(", ".join(SHAPES), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)}

The table: host ms/step is the time of planning, launching and reading, without waiting. MBU is memory bandwidth
utilization: the bytes that the steps must read (all weights once per step, the live keys and values once), over the
time of the steps, over the copy bandwidth measured in the same process. The time of the first token counts from a
request's arrival. Warm-up is the time of a fresh engine to its first token, plus `GenerationManager.warmup()`. With
--out, WORKLOAD-SHAPE.json holds all results, and WORKLOAD-SHAPE.svg shows host and GPU in the same steps.
"""


def add_parser(commands: Any) -> None:
    """Add `bench` to the sub-commands of an argument parser."""
    parser = command_parser(commands, "bench", SUMMARY, _EXAMPLES)
    add = parser.add_argument
    add("workloads", nargs="*", metavar="WORKLOAD", help=f"workloads to serve: {', '.join(WORKLOADS)}")
    add("--shape", metavar="NAME", help="random weights of this shape (see below)")
    add("--model", metavar="NAME", help="a model's folder or its name on the Hub, instead of a shape")
    add("--layers", type=count, metavar="N", help="only the first N layers of --shape, some of each kind if N allows")
    add(
        "--quantize",
        choices=QUANTIZATIONS,
        help="linear layers (nf4 needs bitsandbytes; fp8) or experts of gpt-oss (mxfp4)",
    )
    add("--depth", type=count, nargs="+", default=[1, 2], metavar="N", help="steps in flight, one run each (1 2)")
    add("--engine", action="store_true", help="step the engine directly, without GenerationManager's thread")
    add("--peer", nargs="+", default=[], choices=PEERS, metavar="NAME", help=f"also run: {', '.join(PEERS)}")
    add("--peer-limit", type=float, default=300.0, metavar="S", help="stop a peer's run after S seconds (300)")
    add("--repeats", type=count, default=1, metavar="N", help="counted runs; the median run is reported (1)")
    add("--accuracy", type=int, default=2, metavar="N", help="check N requests against the plain forward (2; 0: none)")
    add("--sampling", metavar="FIELDS", help="sample, as in 'temperature=0.8,top_k=50'; turns the accuracy check off")
    add("--device", choices=("cuda", "cpu"), help="device to run on (cuda if available)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="dtype of the weights (bfloat16; float32 on CPU)")
    add("--out", type=Path, metavar="DIR", help="write the JSON and the picture of each workload there")
    add("--timeline", type=Path, metavar="FILE", help="only draw the picture of a saved JSON file")
    sizes = parser.add_argument_group("smaller workloads, for quick runs")
    sizes.add_argument("--rows", type=count, metavar="N", help="requests (for chat: conversations)")
    sizes.add_argument(
        "--prompt", type=count, metavar="N", help="prompt tokens (for mix: at most; for chat: of the shared prompt)"
    )
    sizes.add_argument("--new", type=count, metavar="N", help="new tokens (for mix and chat: at most)")
    sizes.add_argument("--turns", type=count, metavar="N", help="messages per conversation of chat")
    settings = parser.add_argument_group("settings of the engine (BatchingConfig); its defaults if not given")
    for name in SIZES:
        settings.add_argument(f"--{name.replace('_', '-')}", type=count, metavar="N")
    settings.add_argument(
        "--admission",
        nargs="+",
        choices=get_args(Admission),
        default=["fcfs"],
        help="one run each, at each depth (fcfs)",
    )
    for switch, setting in SWITCHES.items():
        settings.add_argument(f"--{switch.replace('_', '-')}", action="store_true", help=f"{setting}=False")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from hf_async_batching.cli.bench import run

    return run(arguments)
