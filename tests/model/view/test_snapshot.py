"""A living model: whatever is done to it between two calls, the next one's tokens are the new model's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pace import slowed
from support.tiny_models import VOCAB, greedy_alone, ragged_prompts, tiny_model
from torch import nn

from hf_async_batching import (
    BatchingConfig,
    EngineClosedError,
    EngineFailedError,
    GenerationManager,
    UnsupportedModelError,
)
from hf_async_batching.model.view.snapshot import ModelSnapshot

# Longer than a page, so that keys and values computed before the change would be found after it.
PROMPTS = [prompt * 40 if len(prompt) < 4 else prompt * 2 for prompt in ragged_prompts(4, 30, seed=5)]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
IDS = torch.tensor([PROMPTS[3]])


def train(model: Any) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.zero_grad()
    model.eval()


def train_with_adam(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=True)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def load(model: Any) -> None:
    model.load_state_dict(tiny_model("Llama", seed=1).state_dict())


def assign(model: Any) -> None:
    model.load_state_dict(tiny_model("Llama", seed=1).state_dict(), assign=True)


def other_data(model: Any) -> None:
    for parameter, other in zip(model.parameters(), tiny_model("Llama", seed=1).parameters(), strict=True):
        parameter.data = other.data


def grow_vocabulary(model: Any) -> None:
    model.resize_token_embeddings(VOCAB + 30, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:].normal_(std=2.0)


def replace_lm_head(model: Any) -> None:
    torch.manual_seed(5)
    model.lm_head = nn.Linear(64, VOCAB, bias=False)


def replace_layer(model: Any) -> None:
    model.model.layers[1] = tiny_model("Llama", seed=1).model.layers[1]


def swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index


def replace_activation(model: Any) -> None:
    """No tensor changes at all."""
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()


def replace_parameter(model: Any) -> None:
    torch.manual_seed(5)
    model.model.layers[0].self_attn.k_proj.weight = nn.Parameter(torch.randn(32, 64))


def tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def halve(model: Any) -> None:
    model.to(torch.bfloat16)


CHANGES: list[Callable[[Any], None]] = [
    train,
    train_with_adam,
    load,
    assign,
    other_data,
    grow_vocabulary,
    replace_lm_head,
    replace_layer,
    swap_layers,
    replace_activation,
    replace_parameter,
    tie,
    halve,
]


def served(manager: GenerationManager) -> list[list[int]]:
    if manager.model.dtype == torch.bfloat16:
        # One by one: some processors' sums depend on the batch.
        return [manager.submit(prompt, **GREEDY).result(60).token_ids for prompt in PROMPTS]
    handles = [manager.submit(prompt, **GREEDY) for prompt in PROMPTS]
    return [handle.result(60).token_ids for handle in handles]


def expected(model: Any) -> list[list[int]]:
    return [greedy_alone(model, prompt, 8, eos_token_id=None) for prompt in PROMPTS]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_call_sees_the_change(change: Callable[[Any], None], fused: bool) -> None:
    model = tiny_model("Llama")
    config = BatchingConfig(page_size=16, max_batch_tokens=64, fuse_weights=fused, debug=True)
    with GenerationManager(model, config) as manager:
        before = served(manager)
        assert before == expected(model)
        change(model)
        after = served(manager)
        assert after == expected(model)
        assert served(manager) == after
        assert manager.assembly is not None
        assert after != before or manager.assembly.forward.layers[0].dtype == torch.bfloat16, (
            "the change changes nothing: this test would prove nothing"
        )
        if fused:
            assert manager.assembly.forward.packed_groups


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_writes_that_nobody_counts_need_a_word(fused: bool) -> None:
    model = tiny_model("Llama")
    config = BatchingConfig(page_size=16, max_batch_tokens=64, fuse_weights=fused)
    with GenerationManager(model, config) as manager:
        before = served(manager)
        for parameter in model.parameters():
            parameter.data.mul_(1.3)
        manager.weights_updated()
        after = served(manager)
    assert after == expected(model)
    assert after != before


def test_a_move_off_the_device_refuses_and_hurts_nobody_else() -> None:
    model, other = tiny_model("Llama"), tiny_model("Llama")
    config = BatchingConfig(page_size=16, max_batch_tokens=64)
    with GenerationManager(model, config) as manager, GenerationManager(other, config) as second:
        handle = manager.submit(PROMPTS[3], **{**GREEDY, "max_new_tokens": 300})
        innocent = second.submit(PROMPTS[3], **GREEDY)
        model.to("meta")
        with pytest.raises(UnsupportedModelError, match="meta"):
            manager.submit(PROMPTS[3], **GREEDY)
        # What the old tensors hold is still there for whoever began with them.
        assert handle.result(60).token_ids == greedy_alone(other, PROMPTS[3], 300, eos_token_id=None)
        assert innocent.result(60).token_ids == expected(other)[3]


def test_live_requests_fail_where_their_weights_are_taken_away() -> None:
    model = tiny_model("Llama")
    with GenerationManager(model, BatchingConfig(page_size=16, max_batch_tokens=64)) as manager:
        with slowed(manager):
            handle = manager.submit(PROMPTS[3], **{**GREEDY, "max_new_tokens": 400})
            model.to(torch.bfloat16)
        assert served(manager) == expected(model)
        # By the manager, or by a step that met the new weights before it.
        with pytest.raises((EngineClosedError, EngineFailedError), match=r"moved|dtype"):
            handle.result(60)


def test_a_switch_while_the_engine_starts_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_async_batching.engine import supervisor

    model = tiny_model("Llama")
    build_engine = supervisor.build_engine

    def switched_meanwhile(*arguments: Any) -> Any:
        assembly = build_engine(*arguments)
        replace_activation(model)
        return assembly

    monkeypatch.setattr(supervisor, "build_engine", switched_meanwhile)
    with GenerationManager(model, BatchingConfig(page_size=16, max_batch_tokens=64)) as manager:
        served(manager)
        monkeypatch.undo()
        assert served(manager) == expected(model)


def test_training_and_serving_in_turns_from_many_threads() -> None:
    """Between two steps of training, callers in several threads get the tokens of the weights as they are."""
    model = tiny_model("Llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    wrong: list[int] = []
    with GenerationManager(model, BatchingConfig(page_size=16, max_batch_tokens=64)) as manager:
        for step in range(5):
            want = expected(model)

            def call(want: list[list[int]] = want, step: int = step) -> None:
                if served(manager) != want:
                    wrong.append(step)

            threads = [threading.Thread(target=call) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert wrong == []


def test_weights_that_are_equal_can_share_a_view() -> None:
    model = tiny_model("Llama")
    before = ModelSnapshot.of(model)
    assert ModelSnapshot.of(model) == before
    model(IDS)
    assert ModelSnapshot.of(model) == before, "a forward changes nothing"
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    after = ModelSnapshot.of(model)
    assert after == before
    assert after.changes > before.changes
    model.to(torch.float16)
    moved = ModelSnapshot.of(model)
    assert moved != before
    assert moved.moved_from(before)
    replace_lm_head(model)
    assert not ModelSnapshot.of(model).moved_from(moved)
