"""Which layers of a view keep states by functions of ours, and what becomes of them."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import pytest
import torch
from recurrent.step_cases import Case, context_of
from support.hidden_states import hide_functions

from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.errors import UnsupportedModelError
from hf_async_batching.kv_cache.state_tables import StateTables
from hf_async_batching.model.foreign_kernels.kernel_wrappers import is_rebound, rebind_wrappers
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.forward.state_mixers import Mixers, NoStates
from hf_async_batching.model.view.model_view import make_view
from hf_async_batching.recurrent.step import RecurrentStep, active

DELTA, CONV = "torch_chunk_gated_delta_rule", "causal_conv1d_fn"
FOUND = {
    "Qwen3_5ForCausalLM": (2, "Qwen3_5GatedDeltaNet", {CONV, DELTA}),
    "KimiLinearForCausalLM": (2, "KimiLinearDeltaAttention", {CONV, "chunk_kimi_delta_attention"}),
    "Lfm2ForCausalLM": (2, "Lfm2ShortConv", {CONV}),
    "Mamba2ForCausalLM": (4, "Mamba2Mixer", {CONV, "mamba2_chunk_scan"}),
    "FalconH1ForCausalLM": (4, "FalconH1Mixer", {CONV, "mamba2_chunk_scan"}),
    "JambaForCausalLM": (2, "JambaMambaMixer", {CONV, "mamba_selective_scan"}),
}
each_family = pytest.mark.parametrize("class_name", FOUND)


def mixers_of(model: Any) -> Mixers:
    return Mixers(make_view(model, None))


@each_family
@pytest.mark.parametrize("rebound", [False, True], ids=["plain", "reference kernels"])
def test_layers_are_found(class_name: str, rebound: bool) -> None:
    count, layer, names = FOUND[class_name]
    view = make_view(tiny_model(class_name), None)
    if rebound:
        rebind_wrappers(view, lambda wrapper: wrapper)  # as with kernels of other packages
        assert any(is_rebound(vars(module).get("forward")) for module in view.modules())
    own = {id(module): vars(module).get("forward") for module in view.modules()}
    mixers = Mixers(view)
    assert [type(module).__name__ for module in mixers.modules] == [layer] * count
    assert not rebound or all(is_rebound(own[id(module)]) for module in mixers.modules)
    assert mixers.names == names
    assert sorted(index for index, _ in mixers.layers.values()) == list(range(count))
    for index, functions in mixers.layers.values():
        assert mixers.layers[mixers.modules[index]._state_tag.data_ptr()][0] == index
        assert functions.keys() == names
    others = [module for module in view.modules() if not any(module is one for one in mixers.modules)]
    assert all(vars(module).get("forward") is own[id(module)] for module in others)


def test_a_model_of_attention_alone_has_none() -> None:
    mixers = mixers_of(tiny_model("LlamaForCausalLM"))
    assert not mixers.modules and not mixers.names and not mixers.layers
    forward = PackedForward(tiny_model("LlamaForCausalLM"))
    assert (forward.states, forward.state_bytes, forward.route) == ({}, 0, "packed")
    assert forward.prefix_cacheable and forward.capturable and forward.compilable


@each_family
def test_layers_of_a_class_share_one_forward(class_name: str) -> None:
    """Otherwise each of them would be compiled by itself."""
    mixers = mixers_of(tiny_model(class_name))
    assert len({module.forward.__func__ for module in mixers.modules}) == 1
    assert all(module.forward.__self__ is module for module in mixers.modules)


def test_tags_are_aligned_alike() -> None:
    mixers = mixers_of(tiny_model("Mamba2ForCausalLM"))
    assert {tag % 64 for tag in mixers.layers} == {next(iter(mixers.layers)) % 64}
    assert len(mixers.layers) == 4


def test_a_forward_of_the_user_is_left_alone() -> None:
    model: Any = tiny_model("Lfm2ForCausalLM")
    of_class = next(module for module in model.modules() if type(module).__name__ == "Lfm2ShortConv")
    calls: list[int] = []

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(self).forward(self, *args, **kwargs)

    of_class.forward = types.MethodType(own, of_class)
    view = make_view(model, None)
    mixers = Mixers(view)
    assert len(mixers.modules) == 1
    kept = [m for m in view.modules() if type(m).__name__ == "Lfm2ShortConv" and m is not mixers.modules[0]]
    assert len(kept) == 1 and not hasattr(kept[0], "_state_tag")
    assert kept[0].forward.__func__ is own
    with pytest.raises(UnsupportedModelError, match="outside of attention"):
        PackedForward(model)
    assert calls


def test_a_wrapper_that_names_the_family_s_forward_is_left_alone_too() -> None:
    view: Any = make_view(tiny_model("Lfm2ForCausalLM"), None)
    layer = next(module for module in view.modules() if type(module).__name__ == "Lfm2ShortConv")

    @functools.wraps(type(layer).forward)
    def own(*args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = own
    assert len(Mixers(view).modules) == 1
    assert layer.forward is own


def test_a_class_from_elsewhere_is_left_alone() -> None:
    model: Any = tiny_model("Lfm2ForCausalLM")
    layer = next(module for module in model.modules() if type(module).__name__ == "Lfm2ShortConv")

    class Own(type(layer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    layer.__class__ = Own
    assert len(mixers_of(model).modules) == 1


def test_no_functions_are_found_that_have_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_functions(monkeypatch, "mamba2_chunk_scan")
    mixers = mixers_of(tiny_model("Mamba2ForCausalLM"))
    assert mixers.names == {CONV}
    hide_functions(monkeypatch)
    assert not mixers_of(tiny_model("Mamba2ForCausalLM")).modules


def test_a_cache_that_holds_nothing() -> None:
    cache, given = NoStates(), torch.ones(2, 3)
    assert cache.get_conv_state(0, state_idx=0) is None
    assert cache.get_recurrent_state(0, state_idx=0) is None
    assert cache.has_previous_state() is False and cache.has_previous_state(1) is False
    assert cache.is_recording_past(0) is False
    assert cache.update_conv_state(given, 0, conv_kernel_size=4) is given
    empty = given[:0]
    assert cache.update_recurrent_state(empty, layer_idx=0) is empty


class Untouchable:
    """A cache object of the family. A layer reads nothing of it."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"`{name}` was read")


@each_family
def test_a_layer_reads_no_cache_but_ours(class_name: str) -> None:
    model = tiny_model(class_name)
    forward = PackedForward(model)
    layer, tables = forward._mixers.modules[0], StateTables(3, torch.device("cpu"))
    parameters = inspect.signature(inspect.unwrap(type(layer).forward)).parameters
    (name,) = {"cache", "cache_params", "past_key_values"} & set(parameters)
    hidden = torch.randn(1, 2, model.config.hidden_size)
    context = context_of(Case([(2, 0), (1, 0)]))
    results = []
    with torch.inference_mode():
        for cache in (Untouchable(), None):
            with active(RecurrentStep(context, tables, forward._mixers.layers)):
                out = layer(hidden, **{name: cache})
            results.append(out[0] if isinstance(out, tuple) else out)
    assert torch.equal(*results)


def test_a_state_that_another_function_has_computed_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="recurrent states come from a function that is not known"):
        NoStates().update_recurrent_state(torch.ones(2, 3), 0)


@each_family
def test_the_model_is_left_as_it_was(class_name: str) -> None:
    model: Any = tiny_model(class_name)
    ids = torch.tensor([[5, 3, 8, 1, 9, 20, 4]])

    def generated() -> torch.Tensor:
        out: torch.Tensor = model.generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        ).logits  # fmt: skip
        return torch.cat(list(out))

    before = generated()
    names = [set(vars(module)) for module in model.modules()]
    forward = PackedForward(model)
    assert forward.states
    assert names == [set(vars(module)) for module in model.modules()]
    assert not any(hasattr(m, "_state_tag") or "forward" in vars(m) for m in model.modules())
    assert all(hasattr(module, "_state_tag") for module in forward._mixers.modules)
    assert torch.equal(generated(), before)


@each_family
def test_states_and_what_they_forbid(class_name: str) -> None:
    count, _, names = FOUND[class_name]
    forward = PackedForward(tiny_model(class_name))
    assert forward.route == "packed, row states"
    assert forward.prefix_cacheable
    assert forward.capturable == forward.compilable == ("mamba_selective_scan" not in names)
    scans = [key for key in forward.states if key[1] == "scan"]  # type: ignore[index]
    convolutions = [key for key in forward.states if key[0] == "conv"]  # type: ignore[index]
    assert len(scans) == (0 if class_name == "Lfm2ForCausalLM" else count)
    assert len(convolutions) == count
    assert forward.state_bytes == sum(state.num_bytes for state in forward.states.values()) > 0


def test_another_view_has_tags_of_its_own() -> None:
    model = tiny_model("Mamba2ForCausalLM")
    forward = PackedForward(model)
    other = forward.on_view(make_view(model, None))
    assert other.states == forward.states
    assert len(other._mixers.modules) == len(forward._mixers.modules)
    assert not other._mixers.layers.keys() & forward._mixers.layers.keys()
    assert all(module in list(other.view.modules()) for module in other._mixers.modules)
