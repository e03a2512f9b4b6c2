"""Parallel projections are found by watching, share a product, and stay the user's parameters."""

import copy
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_async_batching.linear.engine_linear import EngineLinear
from hf_async_batching.linear.packing import LinearCalls, pack, parallel_projections, watch_linears
from hf_async_batching.model.forward.packed_forward import PackedForward


def groups_of(model: PreTrainedModel) -> list[list[str]]:
    names = {id(module): name for name, module in model.named_modules()}
    with torch.no_grad(), watch_linears(model) as seen:
        model(torch.arange(1, 5)[None])
    return [[names[id(module)] for module in group] for group in parallel_projections(model, seen)]


def storage(p: torch.Tensor) -> int:
    return p.untyped_storage().data_ptr()


def test_projections_of_one_input_are_found() -> None:
    found = groups_of(tiny_model("Llama"))
    assert found[0] == [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    assert found[1] == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert len(found) == 4


def test_what_is_fused_already_has_no_groups() -> None:
    assert groups_of(tiny_model("Phi3")) == []


class Odd(nn.Module):
    """Projections of one input that cannot share a product, for one reason each."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.tied, self.tie = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.tie.weight = self.tied.weight
        self.narrow = nn.Linear(4, 4)
        self.half = nn.Linear(4, 4).half()
        self.unbiased = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> None:
        for module in (self.twice, self.twice, self.tied, self.tie, self.narrow, self.unbiased):
            module(x)


def test_unlike_projections_stay_apart() -> None:
    odd = Odd()
    with watch_linears(odd) as seen:
        odd(torch.randn(2, 4))
    assert parallel_projections(odd, seen) == []
    assert not any(module._forward_pre_hooks for module in odd.modules())


def test_values_identity_and_memory_stay() -> None:
    model = tiny_model("Qwen2")  # with biases
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    ids = torch.arange(1, 9)[None]
    want = model(ids).logits
    forward = PackedForward(model, fused=True)
    assert forward.packed_groups == 4
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, p in model.named_parameters():
        assert p is parameters[name]
        assert torch.equal(p, before[name])
        assert not p.is_inference()
    attention = model.model.layers[0].self_attn
    assert storage(attention.q_proj.weight) == storage(attention.k_proj.weight) == storage(attention.v_proj.weight)
    assert storage(attention.q_proj.bias) == storage(attention.v_proj.bias)
    total = sum({storage(p): p.untyped_storage().nbytes() for p in model.parameters()}.values())
    assert total == sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values()), "no second copy"
    assert torch.equal(model(ids).logits, want)


def view_output(forward: PackedForward) -> torch.Tensor:
    attention = forward.view.model.layers[0].self_attn
    x = torch.linspace(-1, 1, attention.q_proj.in_features)[None]
    with torch.inference_mode():
        return torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)


def plain_output(model: PreTrainedModel) -> torch.Tensor:
    attention = model.model.layers[0].self_attn
    x = torch.linspace(-1, 1, attention.q_proj.in_features)[None]
    return torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)


def test_what_the_user_updates_is_what_the_product_reads() -> None:
    model = tiny_model("Llama")
    forward = PackedForward(model, fused=True)
    torch.testing.assert_close(view_output(forward), plain_output(model).detach())

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = view_output(forward)
    model(torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss.backward()
    optimizer.step()
    assert not torch.equal(view_output(forward), before)
    torch.testing.assert_close(view_output(forward), plain_output(model).detach())

    other = tiny_model("Llama", seed=1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(view_output(forward), plain_output(other).detach())


def test_saving_and_loading(tmp_path: Path) -> None:
    model = tiny_model("Llama")
    want = copy.deepcopy(model.state_dict())
    PackedForward(model, fused=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 1.1 * sum(p.nbytes for p in model.parameters()) + 10_000
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(value, want[name]) for name, value in state.items())


def test_a_second_view_shares_what_is_packed() -> None:
    model = tiny_model("Llama")
    PackedForward(model, fused=True)
    places = [p.data_ptr() for p in model.parameters()]
    again = PackedForward(model, fused=True)
    assert again.packed_groups == 4
    assert [p.data_ptr() for p in model.parameters()] == places
    torch.testing.assert_close(view_output(again), plain_output(model).detach())


def test_parameters_in_a_shared_buffer_are_left_alone() -> None:
    model = tiny_model("Llama")
    attention = model.model.layers[0].self_attn
    flat = torch.cat([attention.k_proj.weight.detach().flatten(), attention.q_proj.weight.detach().flatten()])
    k, q = attention.k_proj.weight.shape, attention.q_proj.weight.shape
    attention.k_proj.weight.data = flat[: k.numel()].view(k)
    attention.q_proj.weight.data = flat[k.numel() :].view(q)
    place = attention.q_proj.weight.data_ptr()
    forward = PackedForward(model, fused=True)
    assert forward.packed_groups == 3
    assert attention.q_proj.weight.data_ptr() == place
    torch.testing.assert_close(view_output(forward), plain_output(model).detach())


def test_inputs_that_differ_get_their_own_products() -> None:
    layers = [nn.Linear(4, 6), nn.Linear(4, 2)]
    from hf_async_batching.linear.engine_linear import convert

    plain = copy.deepcopy(layers)
    for layer in layers:
        convert(layer, torch.zeros(1, dtype=torch.int32), skinny=False)
    assert pack([layers]) == 1
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    assert isinstance(layers[0], EngineLinear)
    # Called in the order that was seen, then with an input that nobody computed, then in another order.
    for order in ([(0, first), (1, first)], [(0, first), (1, second)], [(1, first), (0, second)]):
        for index, x in order:
            torch.testing.assert_close(layers[index](x), plain[index](x))
    layers[0](first)
    layers[1](first)
    assert layers[0].bundle.source is None
    assert layers[0].bundle.output is None, "what was computed must not outlive its use"


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text", "GPTNeoX", "Mixtral"])
def test_families(family: str) -> None:
    model = tiny_model(family)
    names = [name for name, _ in model.named_parameters()]
    PackedForward(model, fused=True)
    assert [name for name, _ in model.named_parameters()] == names


def test_calls_without_groups() -> None:
    assert parallel_projections(tiny_model("Llama"), LinearCalls()) == []
