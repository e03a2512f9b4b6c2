"""A run of `generate_dataset` that can be killed: `python -m support.dataset_job '[{"action": "kill", ...}]'`.

Imports and models take seconds, runs do not: the program forks before anything has started a thread, and the child
does the run. Prints a line of JSON for each job: the checksums of the files in its folder, and of those of an
undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset

from hf_async_batching import BatchingConfig, GenerationManager, generate_dataset
from hf_async_batching.dataset.store.journal import read_journal
from support.character_tokenizer import character_tokenizer
from support.pace import slowed
from support.tiny_models import tiny_model

CALLS = ("fsync", "replace", "link", "unlink")


def make_dataset(rows: int) -> Dataset:
    """Texts of many lengths, some of which cannot be served."""
    texts = [None if i % 31 == 7 else f"{'lorem' * (i % 5)}{chr(35 + i % 80)}{i}" for i in range(rows)]
    return Dataset.from_dict({"prompt": texts, "number": range(rows), "tags": [[i, i % 3] for i in range(rows)]})


def run(arguments: dict[str, Any], model: Any = None) -> Any:
    """Complete the dataset."""
    config = BatchingConfig(max_rows=4, page_size=16, max_batch_tokens=32, attach_check=False)
    dataset: Any = make_dataset(arguments["rows"])
    if arguments.get("stream"):
        dataset = dataset.to_iterable_dataset()
    with GenerationManager(model or tiny_model("Llama"), config) as manager, slowed(manager, arguments.get("slow", 0)):
        return generate_dataset(
            manager,
            dataset,
            character_tokenizer(),
            resume_dir=str(arguments["folder"]),
            on_error="record",
            shard_rows=arguments["shard_rows"],
            max_new_tokens=arguments.get("new", 16),
            do_sample=True,
            num_return_sequences=2,
            # Whose last bits depend on what else was in the batch.
            logprobs=arguments.get("logprobs", False),
            eos_token_id=None,
            window=arguments.get("window", 8192),
            rank=arguments.get("rank", 0),
            world_size=arguments.get("world_size", 1),
        )


def checksums(folder: str | Path) -> dict[str, str]:
    """The checksums of the shards, by name."""
    paths = sorted(Path(folder, "data").iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def in_child(work: Callable[[], object]) -> int:
    """Fork, do the work in the child, and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, within: float | None = None) -> int | None:
    """How the child ended (`os.waitstatus_to_exitcode`); None if it has not."""
    deadline = None if within is None else time.monotonic() + within
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def rows_kept(folder: str | Path) -> int:
    """Finished rows in a folder."""
    rows = 0
    for path in Path(folder).glob("data/part-*.parquet"):
        rows += pq.read_metadata(path).num_rows
    for path in Path(folder).glob("work/part-*.journal"):
        if not Path(folder, "data", f"{path.stem}.parquet").exists():
            rows += sum(1 for _ in read_journal(path))
    return rows


def kill_at_random(arguments: dict[str, Any], model: Any) -> dict[str, Any]:
    """Start the run `kills` times, and kill it each time a random moment after it has finished some more rows."""
    draw, kills, moments = random.Random(arguments["seed"]), arguments["kills"], []
    for kill in range(kills):
        # Spread over the run; every fourth before it has finished any more.
        more = 0 if kill % 4 == 0 else draw.randint(1, 2 * arguments["rows"] // kills)
        wanted = min(rows_kept(arguments["folder"]) + more, arguments["rows"] - 10)
        child = in_child(lambda: run(arguments, model))
        status = None
        while status is None and rows_kept(arguments["folder"]) < wanted:
            status = ended(child, 0.01)
        if status is None:
            status = ended(child, draw.uniform(0, arguments["within"]))
        if status is not None:
            raise SystemExit(f"the run ended with {status} after {kill} kills: it is too short for this test")
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        moments.append(rows_kept(arguments["folder"]))
    status = ended(in_child(lambda: run(arguments, model)))
    return {"status": status, "rows_at_kills": moments}


def kill_at_call(arguments: dict[str, Any], model: Any) -> dict[str, Any]:
    """Start the run, and kill it before and after its nth call that brings something to the disk; n = 1, 2, 3, ...

    Each run goes on from where the one before it was killed.
    """
    kills = []
    for n in range(1, 10_000):

        def killed(n: int = n) -> None:
            calls = 0

            def counted(call: Callable[..., Any]) -> Callable[..., Any]:
                def wrapped(*args: Any, **kwargs: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == 1 + n // 2 and n % 2 == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    result = call(*args, **kwargs)
                    if calls == 1 + n // 2 and n % 2 == 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result

                return wrapped

            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            run(arguments, model)

        status = ended(in_child(killed))
        if status != -signal.SIGKILL:
            return {"status": status, "kills": len(kills)}
        kills.append(n)
    raise SystemExit("it never ended")


def main() -> None:
    torch.set_num_threads(1)
    model = tiny_model("Llama")
    for arguments in json.loads(sys.argv[1]):
        undisturbed = {**arguments, "folder": f"{arguments['folder']}-undisturbed", "slow": 0}
        if ended(in_child(lambda undisturbed=undisturbed: run(undisturbed, model))):
            raise SystemExit("a run that nothing disturbed has failed")
        result = (kill_at_random if arguments["action"] == "kill" else kill_at_call)(arguments, model)
        files = {"files": checksums(arguments["folder"]), "undisturbed": checksums(undisturbed["folder"])}
        print(json.dumps({**result, **files}), flush=True)


if __name__ == "__main__":
    main()
