"""Which weight follows which in a forward."""

import gc

import torch
from support.tiny_models import tiny_model

from hf_async_batching.linear import order
from hf_async_batching.linear.engine_linear import MAX_STRIPS, EngineLinear, convert
from hf_async_batching.linear.order import following_weight, set_order
from hf_async_batching.model_forward import ModelForward


def following(linear: torch.nn.Module) -> torch.Tensor | None:
    assert isinstance(linear, EngineLinear)
    return following_weight(linear.counters, linear.weight if linear.bundle is None else linear.bundle.weight)


def test_the_order_of_a_llama() -> None:
    forward = ModelForward(tiny_model("Llama"), fused=True)
    view = forward.view
    first, second = view.model.layers
    projections, gate_up = first.self_attn.q_proj.bundle.weight, first.mlp.gate_proj.bundle.weight
    assert following(first.self_attn.k_proj) is None, "attention comes between"
    assert following(first.self_attn.o_proj) is gate_up and gate_up.shape == (192, 64)
    assert following(first.mlp.up_proj) is first.mlp.down_proj.weight
    assert following(first.mlp.down_proj) is second.self_attn.v_proj.bundle.weight is not projections
    assert following(second.mlp.down_proj) is view.lm_head.weight
    assert following(view.lm_head) is None


def test_an_order_ends_with_its_view() -> None:
    forward = ModelForward(tiny_model("Llama"), fused=True)
    address = forward.view.lm_head.counters.data_ptr()
    assert address in order._orders
    del forward
    gc.collect()
    assert address not in order._orders


def test_a_layer_that_serves_twice_has_no_follower() -> None:
    view = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    counters = torch.zeros(MAX_STRIPS, dtype=torch.int32)
    for layer in view:
        convert(layer, counters, skinny=False)
    set_order(view, [view[0], view[1], view[0]], set(), counters)
    assert following(view[0]) is None
    set_order(view, [view[0], view[1]], set(), counters)
    assert following(view[0]) is view[1].weight
