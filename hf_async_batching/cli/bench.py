"""`hf-async-batching bench`: its arguments, and the order of things."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_async_batching.bench import report
from hf_async_batching.bench.accuracy import Accuracy, equal_fraction, equal_to_generate, sample, teacher_forced
from hf_async_batching.bench.machine import Machine, look_at
from hf_async_batching.bench.measure import KEPT_STEPS, Measured, measure
from hf_async_batching.bench.peer_run import PeerRun
from hf_async_batching.bench.peers import PEERS, run_peer
from hf_async_batching.bench.quantized import nf4_config
from hf_async_batching.bench.sampling_option import SamplingOption
from hf_async_batching.bench.shapes import QUANTIZATIONS, SHAPES, random_model
from hf_async_batching.bench.timeline_picture import draw
from hf_async_batching.bench.workloads import WORKLOADS, Workload, make_workload
from hf_async_batching.cli.arguments import command_parser, count
from hf_async_batching.config import Admission, BatchingConfig
from hf_async_batching.errors import HfAsyncBatchingError

SUMMARY = "measure speed, GPU use and accuracy, also against transformers itself"

_EXAMPLES = f"""\
examples:
  synchronous against asynchronous batching, on random weights of a real model's shape:
    hf-async-batching bench seed --shape llama-3.1-8b --depth 1 2 --out results

  against transformers' own continuous batching and padded generate, on the same work in the same process:
    hf-async-batching bench mix --shape llama-3.1-8b --peer generate_batch generate

  requests in the order in which they came, and longest first:
    hf-async-batching bench mix --shape llama-3.1-8b --depth 2 --admission fcfs longest_first

  a small model, where the host is the bottleneck; the median of three runs:
    hf-async-batching bench small --shape qwen3-0.6b --depth 1 2 --repeats 3

  what drawing costs, with every usual filter on every row:
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

  your own model, on a part of the work:
    hf-async-batching bench mix small --model path/or/hub-name --rows 32 --new 64

  a dry run in seconds, without a GPU:
    hf-async-batching bench seed small mix chat --shape tiny --rows 4 --prompt 8 --new 8 --device cpu

  the picture of a saved measurement, drawn again:
    hf-async-batching bench --timeline results/seed-llama-3.1-8b.json

workloads (greedy, random token ids, all requests there at the start, no end of sequence):
  seed    32 requests of 32 prompt and 8,192 new tokens
  small   256 requests of 64 prompt and 512 new tokens
  mix     256 requests whose prompts and completions have 16 to 1,024 tokens each
  chat    16 conversations of 8 turns behind a system prompt of 500 tokens that all share; each message comes with the
          end of the answer before it

shapes:
{textwrap.fill(", ".join(SHAPES), 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)}

The table: host ms/step is planning, launching and reading, without waiting. MBU is the bytes that the steps must read
(all weights once per step, the live keys and values once) over their time, over the copy bandwidth measured in the
same process. The first token's time counts from a request's arrival; warm-up is the start of a fresh engine until its
first token, plus `GenerationManager.warmup()`. With --out, WORKLOAD-SHAPE.json holds everything that was measured and
WORKLOAD-SHAPE.svg shows host and GPU in the same steps.
"""

# Switches that turn a setting of `BatchingConfig` off.
_SWITCHES = {
    "no_compile": "compile",
    "no_fuse": "fuse_weights",
    "no_graphs": "cuda_graphs",
    "no_prefix_cache": "prefix_cache",
}
_SIZES = ("page_size", "max_batch_tokens", "max_rows")


class BenchError(Exception):
    """What a person can put right; the message says how."""


def add_parser(commands: Any) -> None:
    """Add `bench` to the sub-commands of an argument parser."""
    parser = command_parser(commands, "bench", SUMMARY, _EXAMPLES)
    add = parser.add_argument
    add("workloads", nargs="*", metavar="WORKLOAD", help=f"what to serve: {', '.join(WORKLOADS)}")
    add("--shape", metavar="NAME", help="random weights of this shape (see below)")
    add("--model", metavar="NAME", help="a model's folder or its name on the Hub, instead of a shape")
    add("--layers", type=count, metavar="N", help="of --shape: the first N layers, some of each kind where N allows")
    add("--quantize", choices=QUANTIZATIONS, help="linear layers by bitsandbytes: 4-bit NormalFloat")
    add("--depth", type=count, nargs="+", default=[1, 2], metavar="N", help="steps in flight, one run each (1 2)")
    add("--engine", action="store_true", help="step the engine directly, without GenerationManager's thread")
    add("--peer", nargs="+", default=[], choices=PEERS, metavar="NAME", help=f"also run: {', '.join(PEERS)}")
    add("--peer-limit", type=float, default=300.0, metavar="S", help="give a peer's run up after S seconds (300)")
    add("--repeats", type=count, default=1, metavar="N", help="counted runs; the one with the median time counts (1)")
    add("--accuracy", type=int, default=2, metavar="N", help="check N requests against the plain forward (2; 0: none)")
    add("--sampling", metavar="FIELDS", help="draw tokens, as in 'temperature=0.8,top_k=50'; not checked for accuracy")
    add("--device", choices=("cuda", "cpu"), help="where to run (cuda where there is one)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights (bfloat16; float32 on the CPU)")
    add("--out", type=Path, metavar="DIR", help="write the JSON and the picture of each workload there")
    add("--timeline", type=Path, metavar="FILE", help="draw the picture of a saved JSON, and do nothing else")
    sizes = parser.add_argument_group("smaller work, for quick runs")
    sizes.add_argument("--rows", type=count, metavar="N", help="requests; of chat: conversations")
    sizes.add_argument("--prompt", type=count, metavar="N", help="prompt tokens; of mix: at most; of chat: shared")
    sizes.add_argument("--new", type=count, metavar="N", help="new tokens; of mix and chat: at most")
    sizes.add_argument("--turns", type=count, metavar="N", help="of chat: messages per conversation")
    settings = parser.add_argument_group("settings of the engine (BatchingConfig), the defaults where not given")
    for name in _SIZES:
        settings.add_argument(f"--{name.replace('_', '-')}", type=count, metavar="N")
    settings.add_argument(
        "--admission",
        nargs="+",
        choices=get_args(Admission),
        default=["fcfs"],
        help="one run each, at each depth (fcfs)",
    )
    for switch, setting in _SWITCHES.items():
        settings.add_argument(f"--{switch.replace('_', '-')}", action="store_true", help=f"{setting}=False")
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        if arguments.timeline is not None:
            return _draw_again(arguments)
        _check(arguments)
        return _bench(arguments)
    except BenchError as error:
        parser.error(str(error))


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.workloads:
        raise BenchError(f"name at least one WORKLOAD: {', '.join(WORKLOADS)}")
    for name in arguments.workloads:
        if name not in WORKLOADS:
            raise BenchError(f"there is no workload {name!r}; choose from {', '.join(WORKLOADS)}")
    if (arguments.shape is None) == (arguments.model is None):
        raise BenchError("name either a --shape or a --model")
    if arguments.shape is not None and arguments.shape not in SHAPES:
        raise BenchError(f"there is no shape {arguments.shape!r}; choose one of {', '.join(SHAPES)}")
    if arguments.layers is not None and arguments.shape is None:
        raise BenchError("--layers belongs to --shape: a model of your own has the layers that it was trained with")
    if arguments.turns is not None and "chat" not in arguments.workloads:
        raise BenchError("--turns belongs to the workload chat")
    if arguments.sampling is not None:
        if arguments.peer:
            raise BenchError("--sampling is for our own engine: peers are greedy")
        try:
            SamplingOption.parse(arguments.sampling)
        except ValueError as error:
            raise BenchError(f"--sampling: {error}") from error
    if arguments.accuracy < 0:
        raise BenchError(f"--accuracy must not be negative, got {arguments.accuracy}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch sees no CUDA GPU here; use --device cpu")


def _bench(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    # Before the model is made, which can take minutes.
    configs = [_config(arguments, depth, order) for order in arguments.admission for depth in arguments.depth]
    model = _model(arguments, device, dtype)
    machine = look_at(device)
    print(f"{machine}; {str(dtype).removeprefix('torch.')}", flush=True)
    ok = True
    for name in arguments.workloads:
        ok = _bench_workload(arguments, name, model, machine, configs) and ok
    return 0 if ok else 1


def _config(arguments: argparse.Namespace, depth: int, admission: Admission) -> BatchingConfig:
    """The settings of a run.

    Raises:
        BenchError: A setting is out of range, or this version does not have it.
    """
    known = {field.name for field in fields(BatchingConfig)}
    values: dict[str, Any] = {name: getattr(arguments, name) for name in _SIZES}
    for switch, setting in _SWITCHES.items():
        if getattr(arguments, switch):
            if setting not in known:
                raise BenchError(f"--{switch.replace('_', '-')}: BatchingConfig has no `{setting}` in this version")
            values[setting] = False
    try:
        return BatchingConfig(depth=depth, admission=admission, timeline_steps=KEPT_STEPS, idle_timeout=None, **values)
    except ValueError as error:
        raise BenchError(str(error)) from error


def _model(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    quantize: str | None = arguments.quantize
    if arguments.shape is not None:
        changes = {} if arguments.layers is None else {"num_hidden_layers": arguments.layers}
        try:
            return random_model(arguments.shape, device, dtype, quantize=quantize, **changes)
        except ValueError as error:
            raise BenchError(f"--shape {arguments.shape}: {error}") from error
    try:
        settings = {"quantization_config": nf4_config(dtype), "device_map": {"": device}} if quantize else {}
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, **settings)
    except (OSError, ValueError) as error:
        raise BenchError(f"--model {arguments.model}: {error}") from error
    model.generation_config.eos_token_id = None
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _label(arguments: argparse.Namespace) -> str:
    parts = [arguments.shape or Path(arguments.model).name]
    if arguments.layers is not None:
        parts.append(f"{arguments.layers}-layers")
    if arguments.quantize is not None:
        parts.append(arguments.quantize)
    return "-".join(parts)


def _bench_workload(
    arguments: argparse.Namespace,
    name: str,
    model: PreTrainedModel,
    machine: Machine,
    configs: list[BatchingConfig],
) -> bool:
    label = _label(arguments)

    def make(seed: int) -> Workload:
        sizes = {"rows": arguments.rows, "prompt": arguments.prompt, "new": arguments.new}
        if name == "chat":
            sizes["turns"] = arguments.turns
        vocab: int = model.config.get_text_config().vocab_size
        made = make_workload(name, vocab, seed=seed, **sizes)
        return made if arguments.sampling is None else SamplingOption.parse(arguments.sampling).of(made)

    workload = make(0)
    print(
        f"\n{name}, {label}: {workload.num_requests} requests, {workload.prompt_tokens:,} prompt and "
        f"{workload.new_tokens:,} new tokens{f', {arguments.sampling}' if arguments.sampling else ''}\n",
        flush=True,
    )
    # Line by line, as they are made: who stops a long run keeps what it has shown.
    print(report.header(), flush=True)
    measured: list[Measured] = []
    for config in configs:
        # As long as the longest request and no longer; a warm-up request has some 16 tokens.
        config = replace(
            config,
            max_sequence_length=max(16, workload.longest),
            max_waiting=max(config.max_waiting, 2 * len(workload.first)),
        )
        try:
            one = measure(
                model,
                make,
                config,
                machine.copy_bandwidth,
                through_engine=arguments.engine,
                repeats=arguments.repeats,
            )
        except (HfAsyncBatchingError, ValueError) as error:
            raise BenchError(f"{name}: {error}") from error
        measured.append(one)
        print(report.run_row(one, equal_fraction(one.tokens, measured[0].tokens)), flush=True)
    # Drawn tokens are no arg-max.
    checked = arguments.accuracy if arguments.sampling is None else 0
    accuracy = _accuracy(model, workload, measured[0], checked)
    peers: list[PeerRun] = []

    def save() -> dict[str, Any]:
        contents = report.document(
            workload=workload,
            model={
                "name": label,
                "random_weights": arguments.shape is not None,
                "class": type(model).__name__,
                "parameters": model.num_parameters(),
                "dtype": str(model.dtype).removeprefix("torch."),
                "quantization": arguments.quantize,
            },
            machine=machine,
            measured=measured,
            peers=peers,
            equal=[equal_fraction(one.tokens, measured[0].tokens) for one in measured],
            accuracy=accuracy,
            arguments=sys.argv[1:] if arguments.argv is None else arguments.argv,
        )
        report.write(path, contents)
        return contents

    path = (arguments.out or Path()) / f"{name}-{label}.json"
    for peer in arguments.peer:
        if arguments.out is not None:
            save()
        run = run_peer(
            peer,
            model,
            make,
            repeats=arguments.repeats,
            limit=arguments.peer_limit,
            prefix_cache=not arguments.no_prefix_cache,
        )
        if run.error is None:
            run.equal_to_first_run = equal_fraction([run.tokens], measured[0].tokens[:1])
        peers.append(run)
        print(report.peer_row(run), flush=True)
    print(f"\naccuracy: {accuracy or 'not checked'}", flush=True)
    if arguments.out is not None:
        contents = save()
        print(f"wrote {path}")
        _draw(contents, path.with_suffix(".svg"))
    return accuracy is None or accuracy.holds


def _accuracy(model: PreTrainedModel, workload: Workload, measured: Measured, count: int) -> Accuracy | None:
    if not count:
        return None
    tokens = measured.tokens[0]
    requests = sample(workload, tokens, count)
    accuracy = teacher_forced(model, requests, tokens)
    if model.dtype == torch.float32:
        accuracy = replace(accuracy, generate_equal=equal_to_generate(model, requests, tokens))
    return accuracy


def _draw_again(arguments: argparse.Namespace) -> int:
    path: Path = arguments.timeline
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"--timeline {path}: {error}") from error
    target = path.with_suffix(".svg")
    try:
        _draw(contents, arguments.out / target.name if arguments.out else target)
    except ValueError as error:
        raise BenchError(f"--timeline {path}: {error}") from error
    return 0


def _draw(contents: dict[str, Any], path: Path) -> None:
    picture = draw(report.panels(contents))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture, encoding="utf-8")
    print(f"wrote {path}")
