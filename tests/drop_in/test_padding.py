"""Masks of a batch on every kind of model: the same as `generate`, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedArgumentError
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.coverage.variants import VARIANTS

WIDTH, HIDDEN = 40, 9
# Name, and whether all layers attend to all tokens by their positions.
KINDS = {
    "LlamaForCausalLM": True,
    "GPT2LMHeadModel": True,  # positions from a table
    "FalconForCausalLM+alibi": True,  # biases by positions, which the mask counts
    "BloomForCausalLM": False,  # biases, and no positions in its forward
    "MptForCausalLM": False,  # biases by places
    "MistralForCausalLM": False,  # windows
    "GPTNeoForCausalLM": False,  # windows of which its cache knows nothing
    "Gemma3ForCausalLM": False,  # some layers with windows
    "Llama4ForCausalLM": False,  # chunks
    "Lfm2ForCausalLM": False,  # convolutions
    "MambaForCausalLM": False,
    "Mamba2ForCausalLM": False,
    "Qwen3NextForCausalLM": False,  # gated delta rule
}
# Its temperature follows from a token's place: padding changes what plain `generate` says, and not what we say.
CHANGES: dict[str, Any] = {"Llama4ForCausalLM": {"attn_temperature_tuning": False}, **VARIANTS}


@pytest.fixture(scope="module", params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def manager(name: str) -> Any:
    model = tiny_model(name.partition("+")[0], **CHANGES.get(name, {}))
    with GenerationManager(model, BatchingConfig(page_size=16, max_batch_tokens=24, num_pages=40)) as manager:
        yield manager


def batch(hidden: slice) -> dict[str, torch.Tensor]:
    """Two prompts, of which the first one has pad tokens at `hidden`."""
    ids = torch.randint(4, 60, (2, WIDTH), generator=torch.Generator().manual_seed(1))
    ids[0, hidden] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def run(model: Any, inputs: dict[str, torch.Tensor], **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **arguments,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def as_in_generate(manager: Any, inputs: dict[str, torch.Tensor]) -> None:
    tokens, logits = run(copy.deepcopy(manager.model), inputs)
    got, got_logits = run(manager.model, inputs, custom_generate=manager.bind())
    assert torch.equal(got, tokens)
    torch.testing.assert_close(got_logits, logits, rtol=1e-3, atol=1e-3)


def test_padding_on_the_left_is_as_in_generate(manager: Any) -> None:
    as_in_generate(manager, batch(slice(0, HIDDEN)))


@pytest.mark.parametrize("hidden", [HIDDEN, 1])
def test_padding_on_the_right_is_refused(manager: Any, hidden: int) -> None:
    """`generate` goes on behind it: its first token follows from the pad token's own place."""
    inputs = batch(slice(WIDTH - hidden, WIDTH))
    with pytest.raises(UnsupportedArgumentError, match=r"`attention_mask` .* \(row 0; .*Pad on the left"):
        run(manager.model, inputs, custom_generate=manager.bind())
    tokens, _ = run(copy.deepcopy(manager.model), inputs)
    plug = manager.bind(on_unsupported="generate")
    assert torch.equal(run(manager.model, inputs, custom_generate=plug)[0], tokens)


def test_zeros_between_tokens_are_as_in_generate_or_refused(name: str, manager: Any) -> None:
    inputs = batch(slice(WIDTH // 2, WIDTH // 2 + HIDDEN))
    if KINDS[name]:
        as_in_generate(manager, inputs)
        return
    with pytest.raises(UnsupportedArgumentError, match="`attention_mask` with zeros between tokens"):
        run(manager.model, inputs, custom_generate=manager.bind())


def test_a_row_of_padding_alone_is_refused(manager: Any) -> None:
    with pytest.raises(UnsupportedArgumentError, match="`attention_mask` hides every token of row 0"):
        run(manager.model, batch(slice(0, WIDTH)), custom_generate=manager.bind())


def test_a_pad_token_at_the_end_is_padding_where_no_mask_is_given(manager: Any) -> None:
    """`generate` makes the mask itself."""
    inputs = {"input_ids": batch(slice(WIDTH - 1, WIDTH))["input_ids"]}
    with pytest.raises(UnsupportedArgumentError, match="without a mask"):
        run(manager.model, inputs, custom_generate=manager.bind())
