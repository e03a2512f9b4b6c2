"""Scenarios with small models in a whole engine, for a few steps of each kind."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_async_batching import BatchingConfig, GenerationHandle, GenerationManager
from hf_async_batching.devices.pdl import supports_pdl
from hf_async_batching.engine.builder import EngineParts

VOCAB = 4112
"""The models' vocabulary: a multiple of 16, which the products need, but not of any block of the sampling kernels."""

_HYBRIDS = ("Lfm2ForCausalLM", "Qwen3_5ForCausalLM", "FalconH1ForCausalLM", "BambaForCausalLM")
_SECONDS = 300.0


def decode(device: torch.device) -> None:
    """Decode rows in buckets of 1, 2 and 4, each of them captured."""
    with GenerationManager(_llama(device), _config(fuse_weights=device.type == "cuda")) as manager:
        for rows in (1, 2, 4):
            _finish([manager.submit(_prompt(5 + 9 * i), **_greedy(6)) for i in range(rows)])
        _check(manager, device)


def mixed(device: torch.device) -> None:
    """Compute pieces of prompts beside decoding rows, often enough to capture their steps."""
    with GenerationManager(_llama(device), _config(max_batch_tokens=24, max_rows=6)) as manager:
        handles = []
        for i in range(8):
            handles += [manager.submit(_prompt(3 + i), **_greedy(12)), manager.submit(_prompt(60 + i), **_greedy(3))]
        _finish(handles)
        _check(manager, device)


def draws(device: torch.device) -> None:
    """Sample rows in every usual way, alone and together, and one row whose sampling is not captured."""
    ways: list[dict[str, Any]] = [
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "top_p": 0.6, "min_p": 0.02, "repetition_penalty": 1.2},
        {"do_sample": False, "repetition_penalty": 1.3, "min_new_tokens": 3},
    ]
    with GenerationManager(_llama(device), _config()) as manager:
        for logprobs in (False, True):
            for _ in range(2):
                _finish(
                    [
                        manager.submit(_prompt(6 + i), max_new_tokens=5, seed=i, logprobs=logprobs, **way)
                        for i, way in enumerate(ways)
                    ]
                )
        _finish([manager.submit(_prompt(9), **_greedy(5), no_repeat_ngram_size=2)])
        _check(manager, device)


def drafts(device: torch.device) -> None:
    """Compute drafts for prompts that repeat themselves."""
    with GenerationManager(_llama(device), _config(prompt_lookup_rows=4)) as manager:
        for rows in (1, 3, 3):
            prompts = [_prompt(7, seed=i) * 4 for i in range(rows)]
            _finish([manager.submit(p, **_greedy(10), prompt_lookup_num_tokens=4) for p in prompts])
        if not manager.stats().drafted_tokens:
            raise RuntimeError("no row has computed a draft")
        _check(manager, device)


def windows(device: torch.device) -> None:
    """Decode beyond a window, so that pages before it are released; with head size 256."""
    model = _model(
        "Gemma2", device, hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=256,
        query_pre_attn_scalar=256, sliding_window=24, attn_logit_softcapping=20.0,
    )  # fmt: skip
    with GenerationManager(model, _config(max_batch_tokens=32)) as manager:
        for _ in range(2):
            _finish([manager.submit(_prompt(10 + 25 * i), **_greedy(20)) for i in range(3)])
        _check(manager, device)


def compiled(device: torch.device) -> None:
    """Capture layers that Inductor has compiled; with PDL if the card supports it, for their kernels and ours."""
    cuda = device.type == "cuda"
    config = _config(compile=cuda, fuse_weights=cuda, max_rows=2)
    with GenerationManager(_llama(device), config) as manager:
        manager.warmup()
        assembly = _assembly(manager)
        if cuda and assembly.runner._forward is assembly.forward:
            raise RuntimeError("the engine did not change over to compiled layers")
        print(f"early launches: {supports_pdl(device)}", flush=True)
        for _ in range(2):
            _finish([manager.submit(_prompt(8 + 20 * i), **_greedy(6)) for i in range(2)])
        _check(manager, device)


def hybrid(device: torch.device) -> None:
    """Serve a family with recurrent or convolution states through its own cache class."""
    from hf_async_batching.coverage.families import tiny_model

    name = next((name for name in _HYBRIDS if hasattr(transformers, name)), None)
    if name is None:
        raise RuntimeError(f"transformers {transformers.__version__} has none of {', '.join(_HYBRIDS)}")
    model: Any = tiny_model(name)
    model.to(device)
    vocab = int(model.config.get_text_config().vocab_size)
    with GenerationManager(model, _config(max_batch_tokens=32)) as manager:
        _finish([manager.submit(_prompt(4 + 13 * i, vocab=vocab), **_greedy(5)) for i in range(3)])
        print(f"{name}: {_assembly(manager).forward.route}", flush=True)


def _config(**changes: Any) -> BatchingConfig:
    """Make a config with small tables; compiling, packing and checks are off unless a scenario needs them."""
    fields: dict[str, Any] = {
        "page_size": 16, "num_pages": 64, "max_rows": 4, "max_sequence_length": 160, "max_batch_tokens": 64,
        "compile": False, "fuse_weights": False, "attach_check": False, "prefix_cache": False,
    }  # fmt: skip
    return BatchingConfig(**(fields | changes))


def _llama(device: torch.device) -> PreTrainedModel:
    return _model(
        "Llama", device, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=512,
    )  # fmt: skip


def _model(family: str, device: torch.device, **fields: Any) -> PreTrainedModel:
    """Make two layers with random weights, in bfloat16 on a GPU. The CPU makes them, so that initcheck sees writes."""
    torch.manual_seed(11)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, intermediate_size=512, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False, **fields,
    )  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = {"attn_implementation": "eager"} if family == "Gemma2" else {}
    classes: Any = AutoModelForCausalLM
    model: Any = classes.from_config(config, dtype=torch.float32, **attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4.0)
    made: PreTrainedModel = model.to(device, dtype)
    return made


def _prompt(length: int, *, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    tokens: list[int] = torch.randint(3, vocab, (length,), generator=generator).tolist()
    return tokens


def _greedy(new: int) -> dict[str, Any]:
    return {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}


def _finish(handles: list[GenerationHandle]) -> None:
    for handle in handles:
        handle.result(_SECONDS)


def _assembly(manager: GenerationManager) -> EngineParts:
    worker = manager._engines.thread
    assembly = None if worker is None else worker.parts
    if assembly is None:
        raise RuntimeError("the manager has no engine")
    return assembly


def _check(manager: GenerationManager, device: torch.device) -> None:
    """Check that steps were captured on a GPU; otherwise the scenario adds nothing to the others."""
    graphs = manager.stats().graphs
    print(f"{graphs} graphs", flush=True)
    if device.type == "cuda" and not graphs:
        raise RuntimeError("no step was captured")
