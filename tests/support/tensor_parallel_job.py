"""What each rank of a tensor-parallel run does: `torchrun ... -m support.tensor_parallel_job FOLDER`.

FOLDER has a folder for each model, with the checkpoint in `model`; rank 0 writes `result.json` beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import distributed
from transformers import AutoModelForCausalLM

from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedArgumentError, generate_dataset
from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.engine import builder
from support.fake_graphs import RankDevice
from support.tiny_models import ragged_prompts

PROMPTS = ragged_prompts(12, 40, seed=3)
NEW = {"max_new_tokens": 16, "do_sample": False}
SAMPLED = {"max_new_tokens": 16, "do_sample": True, "temperature": 1.5, "top_k": 20, "min_new_tokens": 3}
ROWS = Dataset.from_dict({"prompt": PROMPTS})


def config(depth: int, **changes: Any) -> BatchingConfig:
    """Few rows and pages: requests are preempted."""
    fields = {"max_rows": 4, "page_size": 16, "max_batch_tokens": 32, "num_pages": 8, "debug": True, **changes}
    return BatchingConfig(depth=depth, **fields)


def serve(manager: GenerationManager) -> dict[str, Any]:
    """Many requests, some cancelled; twice, with the engine closed in between by its idle time-out."""
    worker = manager._engines.thread
    assert worker is not None
    greedy = [manager.submit(prompt, **NEW) for prompt in PROMPTS]
    sampled = [manager.submit(prompt, seed=i, logprobs=True, **SAMPLED) for i, prompt in enumerate(PROMPTS)]
    manager.submit(PROMPTS[3], max_new_tokens=90).cancel()
    result = {
        "greedy": [handle.result().token_ids for handle in greedy],
        "sampled": [handle.result().token_ids for handle in sampled],
        "preemptions": manager.stats().preemptions,
    }
    worker.memory_free.wait()
    result["again"] = manager.submit(PROMPTS[5], **NEW).result().token_ids
    return result


def serve_captured(model: Any, rank: int) -> dict[str, Any]:
    """With graphs, which are captured anew after kernels were measured; three captures in a row fail on rank 1."""
    device = RankDevice(lambda number: rank == 1 and 2 < number < 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "make_device", lambda torch_device: device)
        patch.setattr(TorchBackend, "reads_back", False)
        with GenerationManager(model, config(2)) as manager:
            if not manager.leads:
                manager.follow()
                return {"captures": device.captures, "failures": device.failures}
            manager.warmup()
            replayed = [manager.submit(prompt, **NEW) for prompt in PROMPTS]
            result: dict[str, Any] = {"replayed": [handle.result().token_ids for handle in replayed]}
            manager.warmup(tune=True)
            greedy = [manager.submit(prompt, **NEW) for prompt in PROMPTS]
            result["greedy"] = [handle.result().token_ids for handle in greedy]
        return {**result, "captures": device.captures, "failures": device.failures}


def run(folder: Path) -> None:
    """Serve the model in a folder at both depths, with captured graphs, and over a dataset."""
    rank, result = distributed.get_rank(), {}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto", dtype=torch.float32).eval()
    before = dict(vars(model.model.layers[0].self_attn.q_proj))
    for depth in (1, 2):
        with GenerationManager(model, config(depth, idle_timeout=0.2)) as manager:
            manager.warmup() if manager.leads else None
            if manager.leads:
                result[f"depth {depth}"] = serve(manager)
            else:
                with pytest.raises(UnsupportedArgumentError, match="follow"):
                    manager.submit(PROMPTS[0])
                manager.follow()
    captured = [None] * distributed.get_world_size()
    distributed.all_gather_object(captured, serve_captured(model, rank))
    result["captured"] = captured
    plain = generate_dataset(model, ROWS, batching_config=config(2), **NEW)
    kept = generate_dataset(model, ROWS, batching_config=config(2), resume_dir=folder / "run", **NEW)
    assert (plain is None) == (rank != 0)
    result["dataset"] = kept["completion_ids"][:]  # every rank has it
    assert dict(vars(model.model.layers[0].self_attn.q_proj)) == before, "the user's layer has changed"
    assert model.model.layers[0].self_attn.config._attn_implementation != "hf_async_batching"
    print(f"{folder.name}, rank {rank}: {len(result['dataset'])} rows", flush=True)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    distributed.barrier()


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for model in sorted(Path(sys.argv[1]).glob("*/model")):
        run(model.parent)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
