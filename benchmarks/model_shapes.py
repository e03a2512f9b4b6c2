"""Shows the route and the speed of each shape of `bench`, and compares its tokens with those of plain `generate`.

python -m benchmarks.model_shapes --shapes qwen3-8b,gpt-oss-20b --rows 1,32 --limit 120 --out FILE.json
python -m benchmarks.model_shapes --shapes nemotron-h-8b --layers 8 --device cuda
python -m benchmarks.model_shapes --shapes qwen3-8b --quantize nf4
python -m benchmarks.model_shapes --shapes gpt-oss-20b --quantize mxfp4 --rows 1,32
python -m benchmarks.model_shapes --shapes deepseek-v2-lite --prompt 8192 --new 128 --again --expanded

Each shape runs in its own process, with random weights. Each phase prints its results as a line of JSON:

- start: seconds until the model is made, and from the first `submit` to its first token (nothing compiled or captured
  yet); the route by which the model is served;
- warmup: seconds until everything is compiled and captured;
- rows N: N greedy requests that arrive together: seconds, new tokens per second, their first tokens. Before that, as
  many requests with other prompts and 8 new tokens run, so that steps with as many prompts are captured; "before" is
  their time in seconds. With `--again` these have the same prompts, so that the prefix cache holds them and the run
  decodes at the contexts' full length from the start;
- generate: a few of these requests by plain `model.generate`, one at a time, and the share of its tokens that equal
  ours at the same position. In bfloat16, rounding changes tokens, and all tokens after the first change differ.

The library's warnings are lines, too. An exception is a line with the phase that raised it, and so is the early end of
a process. After `--limit` seconds a process writes the stacks of all threads to stderr and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
_STDERR = 2
_GRACE = 15  # seconds after the limit in which a process may write its stacks


class ModelShape:
    """The work of one process for one shape; it calls `say` with each line."""

    def __init__(self, arguments: argparse.Namespace, say: Callable[[Line], None]) -> None:
        self._arguments = arguments
        self._say = say
        self._tokens: list[list[int]] = []

    def run(self) -> None:
        """Run all phases; if the start fails, skip the others."""
        self._phase("start", self._start)
        try:
            self._phase("warmup", self._warm_up)
            for rows in self._arguments.rows:
                self._phase(f"rows {rows}", lambda rows=rows: self._rows(rows))
        finally:
            self._manager.close()
        if self._arguments.compare and self._tokens:
            self._phase("generate", self._generate)

    def _phase(self, name: str, work: Callable[[], Line]) -> None:
        handler = _Warnings(lambda text: self._say({"phase": name, "warning": text}))
        logger = logging.getLogger("hf_async_batching")
        logger.addHandler(handler)
        try:
            self._say({"phase": name, **work()})
        except Exception as error:
            self._say({"phase": name, "error": " ".join(f"{type(error).__name__}: {error}".split())})
            if name == "start":
                raise SystemExit(1) from error
        finally:
            logger.removeHandler(handler)

    def _start(self) -> Line:
        import torch

        from hf_async_batching import BatchingConfig, GenerationManager
        from hf_async_batching.bench.shapes import random_model

        arguments = self._arguments
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        changes = {} if arguments.layers is None else {"num_hidden_layers": arguments.layers}
        began = time.perf_counter()
        self._model = random_model(arguments.one, device, dtype, quantize=arguments.quantize, **changes)
        if device.type == "cuda":
            torch.cuda.synchronize()
        made = time.perf_counter()
        longest = max(16, arguments.prompt + arguments.new)
        config = BatchingConfig(
            max_sequence_length=longest,
            max_rows=max(arguments.rows),
            idle_timeout=None,
            latent_pages=not arguments.expanded,
        )
        self._manager = GenerationManager(self._model, config)
        try:
            next(iter(self._manager.submit(self._prompts(1)[0], max_new_tokens=2, do_sample=False)))
            first = time.perf_counter()
            assembly = self._manager.assembly
            assert assembly is not None
        except BaseException:
            self._manager.close()
            raise
        return {
            "model": type(self._model).__name__,
            "parameters": self._model.num_parameters(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": str(dtype).removeprefix("torch."),
            "model_seconds": round(made - began, 2),
            "first_token_seconds": round(first - made, 2),
            "route": str(getattr(assembly.forward, "route", "packed")),
            "page_bytes_per_token": sum(layer.bytes_per_token for layer in assembly.forward.layers),
        }

    def _warm_up(self) -> Line:
        began = time.perf_counter()
        self._manager.warmup()
        return {"seconds": round(time.perf_counter() - began, 2), "graphs": self._manager.stats().graphs}

    def _prompts(self, rows: int, seed: int = 0) -> list[list[int]]:
        draw = random.Random(rows + 1000 * seed)
        vocab = self._model.config.get_text_config().vocab_size
        return [[draw.randrange(vocab) for _ in range(self._arguments.prompt)] for _ in range(rows)]

    def _rows(self, rows: int) -> Line:
        other = 0 if self._arguments.again else 1
        _, before = self._serve(self._prompts(rows, seed=other), min(8, self._arguments.new))
        tokens, seconds = self._serve(self._prompts(rows), self._arguments.new)
        if len(tokens) > len(self._tokens):
            self._tokens = tokens
        return {
            "before": round(before, 3),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(sum(map(len, tokens)) / seconds, 1),
            "first_tokens": [row[0] for row in tokens[:4]],
        }

    def _serve(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        """The new tokens of each prompt, and the seconds until all were there."""
        began = time.perf_counter()
        handles = [self._manager.submit(ids, max_new_tokens=new, do_sample=False) for ids in prompts]
        tokens = [handle.result().token_ids for handle in handles]
        return tokens, time.perf_counter() - began

    def _generate(self) -> Line:
        import torch

        prompts = self._prompts(len(self._tokens))[: self._arguments.compare]
        equal, seconds, identical = 0, 0.0, 0
        for ids, ours in zip(prompts, self._tokens, strict=False):
            inputs = torch.tensor([ids], device=self._model.device)
            began = time.perf_counter()
            made = self._model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=self._arguments.new, do_sample=False
            )
            theirs = made[0, len(ids) :].tolist()
            seconds += time.perf_counter() - began
            equal += sum(one == other for one, other in zip(ours, theirs, strict=False))
            identical += ours == theirs
        tokens = len(prompts) * self._arguments.new
        shares = {"identical_rows": identical, "equal_tokens": round(equal / tokens, 4)}
        return {"rows": len(prompts), **shares, "tokens_per_second_alone": round(tokens / seconds, 1)}


class _Warnings(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say_text = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say_text(" ".join(record.getMessage().split()))


def one_process(shape: str, arguments: argparse.Namespace) -> Iterator[Line]:
    """Run one shape in a process that ends at the limit, and yield its lines."""
    missing = ["start", "warmup", *(f"rows {rows}" for rows in arguments.rows), *["generate"][: arguments.compare]]
    with tempfile.TemporaryDirectory() as folder:
        # The output goes to a file: processes that a compiler leaves behind would hold a pipe open.
        lines = Path(folder, "lines")
        lines.touch()
        command = [
            sys.executable,
            "-m",
            "benchmarks.model_shapes",
            *sys.argv[1:],
            "--one",
            shape,
            "--lines",
            str(lines),
        ]
        process = subprocess.Popen(command, stdout=_STDERR, start_new_session=True)
        killed = time.monotonic() + arguments.limit + _GRACE
        try:
            with lines.open() as read:
                running = True
                while running:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.1)
                    running = process.poll() is None and time.monotonic() < killed
                    for text in read:
                        line = json.loads(text)
                        if "warning" not in line and line["phase"] in missing:
                            missing.remove(line["phase"])
                        failed = line["phase"] == "start" and "error" in line
                        yield {"shape": shape, **line}
                        if failed:
                            return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if missing and process.returncode:
        late = time.monotonic() > killed - _GRACE
        why = f"not finished in {arguments.limit:g} s" if late else f"the process ended with {process.returncode}"
        yield {"shape": shape, "phase": missing[0], "error": f"{why}; see stderr"}


def parser() -> argparse.ArgumentParser:
    def counts(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--shapes", required=True, type=lambda text: text.split(","), metavar="A,B", help="names of shapes")
    add("--rows", type=counts, default=[1, 32], metavar="N,N", help="requests at once, one run each (1,32)")
    add("--prompt", type=int, default=64, metavar="N", help="tokens of each prompt (64)")
    add("--new", type=int, default=256, metavar="N", help="new tokens of each request (256)")
    add("--compare", type=int, default=2, metavar="N", help="rows to compare with plain generate (2; 0: none)")
    add("--limit", type=float, default=120.0, metavar="S", help="time limit of each shape in seconds (120)")
    add("--layers", type=int, metavar="N", help="only the first N layers, some of each kind if N allows")
    add("--quantize", choices=("nf4", "fp8", "mxfp4"), help="linear layers (nf4, fp8) or experts (mxfp4: gpt-oss)")
    add("--again", action="store_true", help="run the same prompts before, so that the prefix cache holds them")
    add("--expanded", action="store_true", help="keep expanded keys and values in pages, in place of latents")
    add("--device", choices=("cuda", "cpu"), help="device to run on (cuda if available)")
    add("--out", type=Path, metavar="FILE", help="write all lines to FILE as one list")
    add("--one", help=argparse.SUPPRESS)
    add("--lines", type=Path, help=argparse.SUPPRESS)
    return made


def main() -> int:
    arguments = parser().parse_args()
    if arguments.one:
        faulthandler.dump_traceback_later(arguments.limit, exit=True)
        with arguments.lines.open("a", buffering=1) as lines:
            ModelShape(arguments, lambda line: print(json.dumps(line), file=lines, flush=True)).run()
        return 0
    seen: list[Line] = []
    for shape in arguments.shapes:
        for line in one_process(shape, arguments):
            print(json.dumps(line), flush=True)
            seen.append(line)
            if arguments.out:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(seen, indent=1))
    return 1 if any("error" in line for line in seen) else 0


if __name__ == "__main__":
    sys.exit(main())
