"""Many families: ragged prompts together in one batch, token for token as alone.

The others are in `docs/model-coverage.md`, which a slow test makes anew.
"""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, greedy_alone, ragged_prompts, tiny_model

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.coverage.families import check_family


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_prompts_equal_generate_alone(family: str) -> None:
    model = tiny_model(family)
    prompts = ragged_prompts(8, 60)
    # A small budget forces chunked prefill beside decoding rows.
    config = BatchingConfig(page_size=16, max_batch_tokens=32, max_rows=6, depth=2, debug=True)
    with GenerationManager(model, config) as manager:
        handles = [manager.submit(prompt, max_new_tokens=12 + i, do_sample=False) for i, prompt in enumerate(prompts)]
        got = [handle.result(120).token_ids for handle in handles]
    expected = [greedy_alone(model, prompt, 12 + i) for i, prompt in enumerate(prompts)]
    assert got == expected
    distinct = {token for tokens in expected for token in tokens}
    assert len(distinct) > 10, "the reference says the same token over and over: this test would prove nothing"


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "StableLm"])
def test_drop_in_equals_padded_generate(family: str) -> None:
    model = tiny_model(family)
    prompts = ragged_prompts(4, 20)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    arguments = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(ids, **arguments)
    got = model.generate(ids, custom_generate=hf_async_batching.generate, **arguments)
    assert torch.equal(got, expected)
    assert got.dtype == expected.dtype


# At least one of each way to be served, and of what makes a family special.
REPRESENTATIVES = {
    "GPT2LMHeadModel": "packed",  # learned positions
    "OPTForCausalLM": "packed",
    "GptOssForCausalLM": "packed",  # attention sinks
    "Llama4ForCausalLM": "packed",  # chunked attention
    "DeepseekV3ForCausalLM": "packed",  # latent attention: keys and values of different sizes
    "BloomForCausalLM": "padded",  # ALiBi
    "DiffLlamaForCausalLM": "padded",  # attends twice per layer
    "DeepseekV32ForCausalLM": "single",  # its indexer picks other keys at once than one by one
    "FalconH1ForCausalLM": "packed, row states",  # attention and a state space in one layer
    "JambaForCausalLM": "packed, row states",  # a scan token by token
    "KimiLinearForCausalLM": "packed, row states",  # linear attention, three convolutions in a layer
    "ZayaForCausalLM": "padded, row states",  # a convolution of its own
    "InklingForCausalLM": "lockstep, row states",
    "BartForCausalLM": "lockstep",  # positions follow the length of the cache
    "RecurrentGemmaForCausalLM": "single",  # states in modules
}


@pytest.mark.parametrize("class_name", REPRESENTATIVES)
def test_each_way_to_be_served(class_name: str) -> None:
    verdict = check_family(class_name)
    assert (verdict.status, verdict.reason, verdict.route) == ("exact", "", REPRESENTATIVES[class_name])
