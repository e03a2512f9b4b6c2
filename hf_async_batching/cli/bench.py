"""Runs `hf-async-batching bench`; its arguments are in `bench_arguments`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_async_batching.bench import report
from hf_async_batching.bench.accuracy import Accuracy, equal_fraction, equal_to_generate, sample, teacher_forced
from hf_async_batching.bench.choices import SIZES, SWITCHES
from hf_async_batching.bench.machine import Machine, look_at
from hf_async_batching.bench.measure import KEPT_STEPS, Measured, measure
from hf_async_batching.bench.peer_run import PeerRun
from hf_async_batching.bench.peers import run_peer
from hf_async_batching.bench.quantized import quantization_config
from hf_async_batching.bench.sampling_option import SamplingOption
from hf_async_batching.bench.shapes import SHAPES, random_model
from hf_async_batching.bench.workloads import WORKLOADS, Workload, make_workload
from hf_async_batching.cli.arguments import CommandError
from hf_async_batching.config import Admission, BatchingConfig
from hf_async_batching.core.timeline_picture import draw
from hf_async_batching.errors import HfAsyncBatchingError
from hf_async_batching.experts.mxfp4_model import keep_mxfp4


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        CommandError: An argument is wrong.
    """
    if arguments.timeline is not None:
        return _draw_again(arguments)
    _check(arguments)
    return _bench(arguments)


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.workloads:
        raise CommandError(f"name at least one WORKLOAD: {', '.join(WORKLOADS)}")
    for name in arguments.workloads:
        if name not in WORKLOADS:
            raise CommandError(f"there is no workload {name!r}; choose from {', '.join(WORKLOADS)}")
    if (arguments.shape is None) == (arguments.model is None):
        raise CommandError("name either a --shape or a --model")
    if arguments.shape is not None and arguments.shape not in SHAPES:
        raise CommandError(f"there is no shape {arguments.shape!r}; choose one of {', '.join(SHAPES)}")
    if arguments.layers is not None and arguments.shape is None:
        raise CommandError("--layers belongs to --shape: a model of your own has the layers that it was trained with")
    if arguments.turns is not None and "chat" not in arguments.workloads:
        raise CommandError("--turns belongs to the workload chat")
    if arguments.sampling is not None:
        if arguments.peer:
            raise CommandError("--sampling is for our own engine: peers are greedy")
        try:
            SamplingOption.parse(arguments.sampling)
        except ValueError as error:
            raise CommandError(f"--sampling: {error}") from error
    if arguments.accuracy < 0:
        raise CommandError(f"--accuracy must not be negative, got {arguments.accuracy}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch sees no CUDA GPU here; use --device cpu")


def _bench(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    # Making the model can take minutes, so wrong settings are reported before.
    configs = [_config(arguments, depth, order) for order in arguments.admission for depth in arguments.depth]
    model = _model(arguments, device, dtype)
    machine = look_at(device)
    print(f"{machine}; {str(dtype).removeprefix('torch.')}", flush=True)
    ok = True
    for name in arguments.workloads:
        ok = _bench_workload(arguments, name, model, machine, configs) and ok
    return 0 if ok else 1


def _config(arguments: argparse.Namespace, depth: int, admission: Admission) -> BatchingConfig:
    """Make the settings of a run.

    Raises:
        CommandError: A setting is out of range, or does not exist in this version.
    """
    known = {field.name for field in fields(BatchingConfig)}
    values: dict[str, Any] = {name: getattr(arguments, name) for name in SIZES}
    for switch, setting in SWITCHES.items():
        if getattr(arguments, switch):
            if setting not in known:
                raise CommandError(f"--{switch.replace('_', '-')}: BatchingConfig has no `{setting}` in this version")
            values[setting] = False
    try:
        return BatchingConfig(depth=depth, admission=admission, timeline_steps=KEPT_STEPS, idle_timeout=None, **values)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _model(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    quantize: str | None = arguments.quantize
    if arguments.shape is not None:
        changes = {} if arguments.layers is None else {"num_hidden_layers": arguments.layers}
        try:
            return random_model(arguments.shape, device, dtype, quantize=quantize, **changes)
        except ValueError as error:
            raise CommandError(f"--shape {arguments.shape}: {error}") from error
    try:
        settings: dict[str, Any] = {}
        if quantize == "mxfp4":
            settings = {"config": keep_mxfp4(arguments.model), "device_map": {"": device}}
        elif quantize is not None:
            settings = {"quantization_config": quantization_config(quantize, dtype), "device_map": {"": device}}
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, **settings)
    except (OSError, ValueError) as error:
        raise CommandError(f"--model {arguments.model}: {error}") from error
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
    # Each line is printed when it is ready, so that an interrupted run has shown its results so far.
    print(report.header(), flush=True)
    measured: list[Measured] = []
    for config in configs:
        # The limit is the longest request of the workload. A warm-up request has about 16 tokens.
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
            raise CommandError(f"{name}: {error}") from error
        measured.append(one)
        print(report.run_row(one, equal_fraction(one.tokens, measured[0].tokens)), flush=True)
    # Sampled tokens need not be the arg-max, so they are not checked.
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
        raise CommandError(f"--timeline {path}: {error}") from error
    target = path.with_suffix(".svg")
    try:
        _draw(contents, arguments.out / target.name if arguments.out else target)
    except ValueError as error:
        raise CommandError(f"--timeline {path}: {error}") from error
    return 0


def _draw(contents: dict[str, Any], path: Path) -> None:
    picture = draw(report.panels(contents))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture, encoding="utf-8")
    print(f"wrote {path}")
