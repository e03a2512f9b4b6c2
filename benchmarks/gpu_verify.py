"""Checks correctness on one GPU, then prints the table of depths. Prints all results and writes them as JSON.

python -m benchmarks.gpu_verify tiny                      # families in float32, token for token, captured or not
python -m benchmarks.gpu_verify smollm2 --model DIR       # real text in bfloat16, contract 2
python -m benchmarks.gpu_verify llama8b                   # random Llama-3.1-8B shape: depth 1, 2, 3
python -m benchmarks.gpu_verify syncs                     # synchronizing calls in the loop, from the profiler
"""

from __future__ import annotations

import argparse
import gc
import json
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.bench.accuracy import equal_fraction, teacher_forced
from hf_async_batching.bench.machine import copy_bandwidth
from hf_async_batching.bench.measure import KEPT_STEPS, Measured, measure
from hf_async_batching.bench.report import header, run_row
from hf_async_batching.bench.shapes import random_model
from hf_async_batching.bench.workloads import Workload, make_workload
from hf_async_batching.core.request import Request


def run_engine(
    model: PreTrainedModel, requests: list[Request], config: BatchingConfig, bandwidth: float
) -> tuple[Measured, dict[str, list[int]]]:
    """Serve the requests without the engine's thread, after a warm-up with the same requests."""
    given = Workload("given", tuple(requests))
    measured = measure(model, lambda _: given, config, bandwidth, through_engine=True)
    return measured, measured.tokens[0]


def tiny(device: torch.device, only: list[str]) -> dict[str, Any]:
    import sys

    sys.path.insert(0, "tests")
    from support.tiny_models import FAMILIES, ragged_prompts, tiny_model

    out: dict[str, Any] = {}
    for family in only or FAMILIES:
        model = tiny_model(family).to(device)
        prompts = ragged_prompts(8, 60)
        want = [_generate_alone(model, prompt, 12 + i) for i, prompt in enumerate(prompts)]
        for depth, graphs, compiled in ((1, False, False), (2, True, False), (3, True, True)):
            config = BatchingConfig(
                depth=depth,
                page_size=16,
                max_rows=6,
                max_batch_tokens=32,
                cuda_graphs=graphs,
                compile=compiled,
                num_pages=60,
                debug=True,
            )
            try:
                with GenerationManager(model, config) as manager:
                    if compiled:
                        manager.warmup()
                    handles = [
                        manager.submit(p, max_new_tokens=12 + i, do_sample=False) for i, p in enumerate(prompts)
                    ]
                    got = [handle.result(120).token_ids for handle in handles]
                    captured = manager.stats().graphs
            except Exception as error:
                print(f"{family:12s} depth {depth} graphs {graphs!s:5s}: {error!r} {error.__cause__!r}", flush=True)
                continue
            same = sum(a == b for a, b in zip(got, want, strict=True))
            what = f"{family} depth {depth}, captured {captured}, {'compiled' if compiled else 'not compiled'}"
            out[what] = same
            print(f"{what}: {same} of 8 equal", flush=True)
    out |= _drafts(device, [f for f in ("Llama", "Gemma3Text") if f in (only or FAMILIES)])
    return out | _grown_contexts(device, [f for f in ("Llama", "Mistral") if f in (only or FAMILIES)])


def _drafts(device: torch.device, families: list[str]) -> dict[str, Any]:
    """Compare captured steps with drafts token for token; the drafts are the expected tokens, with some errors."""
    from support.tiny_models import ragged_prompts, tiny_model

    import hf_async_batching.scheduler.sequence as sequences
    from hf_async_batching.core.step_layout import Padding
    from hf_async_batching.runner.cuda_graphs import Captured, GraphCache
    from hf_async_batching.scheduler.prompt_lookup import PromptLookup

    out: dict[str, Any] = {}
    texts: list[list[int]] = []

    class Told(PromptLookup):
        def find(self, tokens: Sequence[int], limit: int) -> tuple[int, ...]:
            length = len(tokens)
            text = next((text for text in texts if text[:length] == list(tokens)), [])
            draft = text[length : length + min(limit, self._num_tokens)]
            return (*draft[:-1], draft[-1] ^ (length % 3 == 0)) if draft else ()

    captured = [0]
    capture = GraphCache._capture

    def count(graphs: GraphCache, key: Captured, work: Any) -> Any:
        graph = capture(graphs, key, work)
        captured[0] += isinstance(key.size, Padding) and graph is not None
        return graph

    own, sequences.PromptLookup = sequences.PromptLookup, Told  # type: ignore[misc]
    GraphCache._capture = count  # type: ignore[method-assign]
    try:
        for family in families:
            model = tiny_model(family, max_position_embeddings=1024).to(device)
            prompts = ragged_prompts(4, 30, seed=12)
            want = [_generate_alone(model, prompt, 120, eos_token_id=None) for prompt in prompts]
            texts[:] = [prompt + tokens for prompt, tokens in zip(prompts, want, strict=True)]
            for depth, compiled in ((1, False), (2, False), (2, True)):
                config = BatchingConfig(depth=depth, page_size=16, num_pages=200, compile=compiled, debug=True)
                captured[0] = 0
                with GenerationManager(model, config) as manager:
                    if compiled:
                        manager.warmup()
                    got: list[list[int]] = []
                    for rows in (1, 4):  # each request twice, so that its steps are captured
                        for _ in range(2):
                            handles = [
                                manager.submit(
                                    p,
                                    max_new_tokens=120,
                                    do_sample=False,
                                    eos_token_id=None,
                                    prompt_lookup_num_tokens=5,
                                )
                                for p in prompts[:rows]
                            ]
                            got += [handle.result(300).token_ids for handle in handles]
                    stats = manager.stats()
                what = f"{family} drafts depth {depth}, {'compiled' if compiled else 'not compiled'}"
                out[what] = same = sum(a == b for a, b in zip(got, [want[0]] * 2 + want * 2, strict=True))
                print(
                    f"{what}: {same} of 10 equal, {stats.accepted_tokens} of {stats.drafted_tokens} accepted, "
                    f"{captured[0]} graphs of steps with drafts",
                    flush=True,
                )
    finally:
        sequences.PromptLookup = own  # type: ignore[misc]
        GraphCache._capture = capture  # type: ignore[method-assign]
    return out


def _grown_contexts(device: torch.device, families: list[str]) -> dict[str, Any]:
    """Capture graphs at contexts of about 8 tokens; replay them up to 600, past page borders and bounds at capture.

    Tokens are compared in float32, token for token. The requests include a sliding window, a row that ends with an
    end-of-sequence token while another row continues, and rows that join long after the capture.
    """
    from support.tiny_models import ragged_prompts, tiny_model

    out: dict[str, Any] = {}
    for family in families:
        model = tiny_model(family, max_position_embeddings=1024).to(device)
        prompts = ragged_prompts(6, 8, seed=11)
        news = [600 - len(prompt) - 40 * i for i, prompt in enumerate(prompts)]
        want = [_generate_alone(model, p, new, eos_token_id=None) for p, new in zip(prompts, news, strict=True)]
        # Two rows end with a token that comes late in their own text, if there is one.
        eos = [_late_token(tokens) if i in (1, 2) else None for i, tokens in enumerate(want)]
        want = [t[: t.index(e) + 1] if e is not None else t for t, e in zip(want, eos, strict=True)]
        for depth in (1, 2, 3):
            config = BatchingConfig(
                depth=depth, page_size=16, max_rows=6, max_batch_tokens=64, num_pages=300, debug=True
            )
            with GenerationManager(model, config) as manager:
                handles = [
                    manager.submit(p, max_new_tokens=new, do_sample=False, eos_token_id=e)
                    for p, new, e in zip(prompts[:4], news[:4], eos[:4], strict=True)
                ]
                handles[3].result(600)
                handles += [
                    manager.submit(p, max_new_tokens=new, do_sample=False, eos_token_id=e)
                    for p, new, e in zip(prompts[4:], news[4:], eos[4:], strict=True)
                ]
                got = [handle.result(600).token_ids for handle in handles]
                captured = manager.stats().graphs
            same = sum(a == b for a, b in zip(got, want, strict=True))
            out[f"{family} grown contexts depth {depth}"] = same
            lengths = [len(tokens) for tokens in want]
            print(
                f"{family:12s} depth {depth} captured {captured}, grown to {lengths} new tokens: {same} of 6 equal",
                flush=True,
            )
    return out


def _late_token(tokens: list[int]) -> int | None:
    """Find the earliest token in the last two thirds of `tokens` that does not occur in the first third."""
    start = len(tokens) // 3
    return next((token for token in tokens[start:] if token not in tokens[:start]), None)


def _generate_alone(model: PreTrainedModel, prompt: list[int], new: int, **arguments: Any) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    return model.generate(ids, max_new_tokens=new, do_sample=False, **arguments)[0, len(prompt) :].tolist()


def smollm2(device: torch.device, path: str) -> dict[str, Any]:
    import sys

    sys.path.insert(0, "tests")
    from support.smollm2 import chat_token_ids
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval().to(device)
    prompts = chat_token_ids(AutoTokenizer.from_pretrained(path))
    eos = model.generation_config.eos_token_id
    requests = [
        Request(str(i), tuple(prompt), 64, eos_token_ids=(eos,) if isinstance(eos, int) else tuple(eos))
        for i, prompt in enumerate(prompts)
    ]
    out: dict[str, Any] = {}
    first: dict[str, list[int]] | None = None
    print(header())
    bandwidth = copy_bandwidth(device)
    for depth in (1, 2, 3):
        measured, tokens = run_engine(model, requests, BatchingConfig(depth=depth, timeline_steps=4096), bandwidth)
        first = first or tokens
        print(run_row(measured, equal_fraction([tokens], [first])), flush=True)
        out[f"depth {depth}"] = measured.run.as_dict()
        out[f"depth {depth} equals depth 1"] = sum(tokens[i] == first[i] for i in tokens)
    assert first is not None
    accuracy = teacher_forced(model, requests, first)
    print("contract 2, bfloat16:", accuracy)
    alone = [_generate_alone(model, list(r.prompt), 64) for r in requests[:24]]
    same = sum(a == first[r.request_id] for a, r in zip(alone, requests, strict=False))
    print(f"{same} of {len(alone)} completions equal plain generate alone in bfloat16")
    out["accuracy"] = str(accuracy)
    out["same length"] = _same_at_every_depth(model, requests, bandwidth)
    exact = model.float()
    _, tokens = run_engine(exact, requests[:24], BatchingConfig(depth=2), bandwidth)
    alone = [_generate_alone(exact, list(r.prompt), 64) for r in requests[:24]]
    same = sum(a == tokens[r.request_id] for a, r in zip(alone, requests, strict=False))
    print(f"float32: {same} of {len(alone)} completions equal plain generate alone")
    out["float32 equal"] = same
    out |= _threads(exact, prompts, device)
    return out


def _same_at_every_depth(model: PreTrainedModel, requests: list[Request], bandwidth: float) -> dict[str, Any]:
    """Compare the tokens of all depths. Without an end-of-sequence token, all depths have the same batches."""
    fixed = [Request(r.request_id, r.prompt, 512) for r in requests[:32]]
    first: dict[str, list[int]] | None = None
    out: dict[str, Any] = {}
    print(f"32 real prompts, 512 new tokens each, no end of sequence\n{header()}")
    for depth in (1, 2, 3):
        measured, tokens = run_engine(model, fixed, BatchingConfig(depth=depth, timeline_steps=4096), bandwidth)
        first = first or tokens
        same = sum(tokens[i] == first[i] for i in tokens)
        print(run_row(measured, same / len(tokens)), flush=True)
        out[f"depth {depth}"] = {**measured.run.as_dict(), "equal to depth 1": same}
    return out


def _threads(model: PreTrainedModel, prompts: list[list[int]], device: torch.device) -> dict[str, Any]:
    """Call the drop-in from 64 threads while the owner generates with the same model; check that memory comes back."""
    expected = [_generate_alone(model, prompt, 8 + i % 17) for i, prompt in enumerate(prompts)]
    got: list[list[int]] = [[] for _ in prompts]
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    with GenerationManager(model, BatchingConfig(depth=2)) as manager:
        started = time.perf_counter()
        manager.warmup()
        warm = time.perf_counter() - started
        print(f"warmup {warm:.1f} s, {manager.stats().graphs} graphs, {manager.stats().graph_bytes >> 20} MiB")

        def call(i: int) -> None:
            ids = torch.tensor([prompts[i]], device=device)
            out = model.generate(ids, max_new_tokens=8 + i % 17, do_sample=False, custom_generate=manager.bind())
            got[i] = out[0, len(prompts[i]) :].tolist()

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        own = [_generate_alone(model, prompt, 8 + i % 17) for i, prompt in enumerate(prompts[:12])]
        for thread in threads:
            thread.join()
        held = torch.cuda.memory_reserved(device) - before
    gc.collect()
    torch.cuda.empty_cache()
    after = torch.cuda.memory_reserved(device)
    same = sum(a == b for a, b in zip(got, expected, strict=True))
    undisturbed = sum(a == b for a, b in zip(own, expected, strict=False))
    print(f"float32, 64 threads: {same} of {len(prompts)} equal to generate alone")
    print(f"the owner's own generate meanwhile: {undisturbed} of {len(own)} right")
    print(f"memory: {held / 2**30:.1f} GiB held while open, {(after - before) / 2**20:.0f} MiB after close")
    return {"threads equal": same, "owner equal": undisturbed, "held": held, "left": after - before, "warmup": warm}


def llama8b(device: torch.device, layers: int, prompt: int, new: int, rows: int) -> dict[str, Any]:
    smaller = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000} if device.type == "cpu" else {}
    started = time.perf_counter()
    model = random_model("llama-3.1-8b", device, torch.bfloat16, num_hidden_layers=layers, **smaller)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} G parameters made in "
        f"{time.perf_counter() - started:.1f} s"
    )
    bandwidth = copy_bandwidth(device)
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")

    def workload(seed: int) -> Workload:
        return make_workload("seed", model.config.vocab_size, seed=seed, rows=rows, prompt=prompt, new=new)

    out: dict[str, Any] = {"copy_bandwidth": bandwidth, "rows": rows, "prompt": prompt, "new": new}
    print(f"{rows} requests, prompt {prompt}, {new} new tokens, greedy, bfloat16\n{header()}")
    first: Measured | None = None
    for depth, graphs in ((1, True), (2, True), (3, True), (1, False), (2, False)):
        config = BatchingConfig(
            depth=depth, cuda_graphs=graphs, timeline_steps=KEPT_STEPS, max_sequence_length=prompt + new + 16
        )
        measured = measure(model, workload, config, bandwidth, through_engine=True)
        first = first or measured
        same = equal_fraction(measured.tokens, first.tokens)
        print(run_row(measured, same), flush=True)
        out[f"depth {depth} graphs {graphs}"] = {**measured.run.as_dict(), "equal to depth 1": same}
    assert first is not None
    accuracy = teacher_forced(model, workload(0).first[:4], first.tokens[0])
    print("contract 2, bfloat16, random weights:", accuracy)
    out["accuracy"] = str(accuracy)
    return out


def syncs(device: torch.device) -> dict[str, Any]:
    """Count CUDA calls that make the host wait, in a run with warm kernels and graphs."""
    model = random_model("llama-3.1-8b", device, torch.bfloat16, num_hidden_layers=4)
    requests = make_workload("seed", model.config.vocab_size, rows=32, prompt=64, new=64).first
    from hf_async_batching.engine.builder import build_engine

    engine = build_engine(model, BatchingConfig(depth=2, max_sequence_length=256)).engine

    def serve() -> int:
        for request in requests:
            engine.add(request)
        steps = 0
        with torch.inference_mode():
            while engine.has_work:
                engine.step()
                steps += 1
        return steps

    serve()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        serve()
    torch.cuda.set_sync_debug_mode("default")
    warned = [str(w.message).splitlines()[0] for w in caught if "synchroniz" in str(w.message)]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        steps = serve()
    waits: Counter[str] = Counter()
    busy = 0.0
    spans = []
    for event in profile.events():
        if "ynchronize" in event.name or event.name in ("cudaMemcpy", "cudaStreamWaitEvent"):
            waits[event.name] += 1
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
    spans.sort()
    end = spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    share = busy / (end - spans[0][0])
    print(f"{steps} steps; warnings of set_sync_debug_mode: {warned or 'none'}; calls: {dict(waits)}")
    print(
        f"kernels and copies cover {100 * share:.1f} % of the time by the profiler "
        "(4 layers only, and the prefill step is not captured: launch gaps show)"
    )
    engine.close()
    return {"steps": steps, "sync_debug_warnings": warned, "calls": dict(waits), "profiler_busy": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["tiny", "smollm2", "llama8b", "syncs"])
    parser.add_argument("--model", help="folder of SmolLM2 for `smollm2`")
    parser.add_argument("--families", nargs="*", default=[], help="families for `tiny` (all)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}; torch {torch.__version__}, transformers {transformers.__version__}")
    for what in arguments.what:
        print(f"\n== {what}", flush=True)
        if what == "tiny":
            result = tiny(device, arguments.families)
        elif what == "smollm2":
            result = smollm2(device, arguments.model)
        elif what == "llama8b":
            result = llama8b(device, arguments.layers, arguments.prompt, arguments.new, arguments.rows)
        else:
            result = syncs(device)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"{what}.json").write_text(json.dumps({"card": card, **result}, indent=1))


if __name__ == "__main__":
    main()
