"""Rounding is told from a mistake in a wider dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.hidden_states import hide_functions
from transformers import PreTrainedModel

from hf_async_batching import BatchingConfig, UnsupportedModelError, per_token
from hf_async_batching.attention.hf_interface import PagedLayer
from hf_async_batching.attention.select import make_backend
from hf_async_batching.attention.torch_backend import TorchBackend
from hf_async_batching.checks import wide_check
from hf_async_batching.checks.wide_check import agrees_in_wide_dtype
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.engine import route
from hf_async_batching.engine.route import _packed_forward, choose_route
from hf_async_batching.errors import DeviceFailedError, LogitsDifferError
from hf_async_batching.linear.engine_linear import EngineLinear
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.small.length_thresholds import makes_choices
from hf_async_batching.model.view import wide_tensor
from hf_async_batching.model.view.wide_tensor import WideTensor, widen_weights

ROUNDING = LogitsDifferError("its logits differ")
CPU_KERNELS = make_backend("auto", torch.device("cpu"))


def experts(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model whose router flips in bfloat16: the parity check finds 0.26, of 0.1 that it allows."""
    return tiny_model("GptOssForCausalLM").to(dtype)  # type: ignore[no-any-return]


def test_choices_that_rounding_decides_cost_no_route(caplog: pytest.LogCaptureFixture) -> None:
    model = experts()
    before = {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}
    with caplog.at_level(logging.INFO, "hf_async_batching"):
        forward, _, view = choose_route(model, BatchingConfig())
    assert forward.route == "packed"
    assert forward.dtype == torch.bfloat16
    assert view is not None and next(view.parameters()).dtype == torch.bfloat16
    assert "in torch.float32 they agree" in caplog.text
    assert before == {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}


def layer_without(**changes: Any) -> Callable[[PackedForward], None]:
    def plant(forward: PackedForward) -> None:
        layers = sorted(forward._paged_layers.items(), key=lambda item: item[1].index)
        key, layer = layers[0]
        seen = {name: getattr(layer, name) for name in ("sliding_window", "chunk")}
        forward._paged_layers[key] = PagedLayer(layer.index, **seen | changes)

    return plant


def another_expert(forward: PackedForward) -> None:
    """Two experts of one layer change places."""
    module = next(module for module in forward.view.modules() if hasattr(module, "down_proj"))
    weight = module.down_proj
    changed = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    changed[[0, 1]] = changed[[1, 0]].clone()
    module._parameters["down_proj"] = changed


def scaled_output(forward: PackedForward) -> None:
    """One layer's experts count for a tenth more."""
    module = next(module for module in forward.view.modules() if hasattr(module, "down_proj"))
    module.register_forward_hook(lambda _module, _args, out: out * 1.1)


def shifted_positions(forward: PackedForward) -> None:
    """Rotary frequencies of one layer's queries and keys stand a token further apart."""
    module = next(module for module in forward.view.modules() if hasattr(module, "sinks"))

    def shift(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, kwargs | {"position_embeddings": (cos.roll(1, dims=1), sin.roll(1, dims=1))}

    module.register_forward_pre_hook(shift, with_kwargs=True)


@pytest.mark.parametrize(
    "plant",
    [layer_without(sliding_window=20), another_expert, scaled_output, shifted_positions],
    ids=lambda p: p.__name__,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_mistake_in_one_layer_is_no_rounding(plant: Callable[[PackedForward], None], dtype: torch.dtype) -> None:
    def make(model: PreTrainedModel) -> PackedForward:
        forward = PackedForward(model)
        plant(forward)
        return forward

    model = experts(dtype)
    assert agrees_in_wide_dtype(model, PackedForward, CPU_KERNELS, 16, ROUNDING) is not None
    assert agrees_in_wide_dtype(model, make, CPU_KERNELS, 16, ROUNDING) is None


def test_routes_through_a_cache_class_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_functions(monkeypatch)
    model = tiny_model("NemotronHForCausalLM").to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="recurrent states"):
        PackedForward(model)
    assert choose_route(model, BatchingConfig())[0].route == "padded, row states"


def test_what_is_the_same_for_all_routes_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_functions(monkeypatch)
    tried: list[str] = []

    def differs(make: Any, *_: Any) -> Any:
        tried.append(make.keywords["batching"])
        if tried[-1] == "single":
            raise UnsupportedModelError("nor that")
        raise LogitsDifferError("it differs from itself", plain=True)

    monkeypatch.setattr("hf_async_batching.engine.route._checked", differs)
    with pytest.raises(UnsupportedModelError, match="nor that"):
        choose_route(tiny_model("Mamba2ForCausalLM"), BatchingConfig(attach_check=False))
    assert tried == ["padded", "single"]


REASONS = ["quantized", "float64", "memory", "not finite", "nothing is chosen", "autocast", "narrow logits"]
REASONS += ["user's code", "tensor parallel"]


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_compared_is_no_rounding(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = experts(torch.float64 if reason == "float64" else torch.bfloat16)
    error, autocast = ROUNDING, False
    if reason == "quantized":
        monkeypatch.setattr("hf_async_batching.checks.wide_check.is_quantized", lambda _: True)
    elif reason == "user's code":
        model.lm_head.register_forward_hook(per_token(lambda module, args, out: out))
    elif reason == "tensor parallel":
        monkeypatch.setattr(wide_check, "parallel_modules", lambda model: [model])
    elif reason == "memory":

        def none_left(*_: Any) -> Any:
            raise torch.OutOfMemoryError("none left")

        monkeypatch.setattr("hf_async_batching.checks.wide_check.check_parity", none_left)
    elif reason == "not finite":
        error = LogitsDifferError("its logits differ", finite=False)
    elif reason == "nothing is chosen":
        model = tiny_model("LlamaForCausalLM").to(torch.bfloat16)
    elif reason == "narrow logits":
        monkeypatch.setattr("hf_async_batching.checks.wide_check.widen_weights", lambda *_: None)
    autocast = reason == "autocast"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert agrees_in_wide_dtype(model, PackedForward, CPU_KERNELS, 16, error) is None


@pytest.mark.parametrize(
    ("agreeing", "right"), [([0], True), ([1, 2], True), ([1], False), ([2], False), ([], False)], ids=str
)
def test_a_tie_in_the_wider_dtype_is_no_mistake(
    agreeing: list[int], right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def sometimes(model: Any, forward: Any, backend: Any, page_size: int, prompts: Any) -> None:
        assert backend is CPU_KERNELS
        assert prompts not in seen, "other tokens each time"
        seen.append(prompts)
        if len(seen) - 1 not in agreeing:
            raise LogitsDifferError("they differ")

    monkeypatch.setattr("hf_async_batching.checks.wide_check.check_parity", sometimes)
    view = agrees_in_wide_dtype(experts(), PackedForward, CPU_KERNELS, 16, ROUNDING)
    assert (view is not None) == right
    assert view is None or view.generation_config.max_new_tokens == 1, "it can be asked at once"  # type: ignore[union-attr]


@pytest.mark.parametrize("kernels", ["wrong", "not finite"])
def test_wrong_kernels_are_no_rounding(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute in the wider dtype, too."""
    decode = TorchBackend.attend

    def wrong(self: TorchBackend, *args: Any, **options: Any) -> torch.Tensor:
        out = decode(self, *args, **options)
        return out * (0.9 if kernels == "wrong" else float("nan"))

    monkeypatch.setattr(TorchBackend, "attend", wrong)
    with pytest.raises(UnsupportedModelError):
        _packed_forward(PackedForward, experts(), BatchingConfig(), CPU_KERNELS)


def test_what_is_fused_is_compared_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wide view has no fused products, and would not notice."""

    def differs(*_: Any) -> Any:
        raise LogitsDifferError("they differ")

    monkeypatch.setattr(route, "check_parity", differs)
    monkeypatch.setattr(route, "agrees_in_wide_dtype", lambda *_, **__: "a view")
    model, made = experts(), partial(PackedForward, fused=True)
    assert route._checked(made, model, BatchingConfig(), CPU_KERNELS)[2] == "a view"
    product = EngineLinear._product
    monkeypatch.setattr(EngineLinear, "_product", lambda *args: product(*args) * 1.3)
    with pytest.raises(LogitsDifferError):
        route._checked(made, model, BatchingConfig(), CPU_KERNELS)
    assert route._checked(PackedForward, model, BatchingConfig(), CPU_KERNELS)[2] == "a view"


@pytest.mark.parametrize("small", [192, 4096])
def test_wide_views_of_fused_forwards(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are converted by each operation, behind views of them too; convolutions are plain parameters."""

    def differs(*_: Any) -> Any:
        raise LogitsDifferError("they differ")

    monkeypatch.setattr(wide_tensor, "_SMALL", small)
    monkeypatch.setattr(route, "check_parity", differs)
    makers: list[Any] = []

    def compared(model: Any, make: Any, *rest: Any, **options: Any) -> Any:
        makers.append(make)
        return agrees_in_wide_dtype(model, make, *rest, **options)

    monkeypatch.setattr(route, "agrees_in_wide_dtype", compared)
    model = tiny_model("Lfm2MoeForCausalLM").bfloat16()
    found = route._checked(partial(PackedForward, fused=True), model, BatchingConfig(), CPU_KERNELS)
    assert found.forward.packed_groups and found.view is not None
    assert makers == [PackedForward], "moved weights would be compared with themselves"


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("LlamaForCausalLM", False),
        ("Gemma3ForCausalLM", False),
        ("MambaForCausalLM", False),
        ("GptOssForCausalLM", True),
        ("MixtralForCausalLM", True),
        ("DeepseekV32ForCausalLM", True),
        ("DbrxForCausalLM", True),
    ],
)
def test_which_models_choose(name: str, chosen: bool) -> None:
    assert makes_choices(tiny_model(name).config) == chosen


def test_a_device_that_fails_in_the_comparison_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise DeviceFailedError("the context is gone")

    monkeypatch.setattr(wide_check, "check_parity", fails)
    with pytest.raises(DeviceFailedError):
        agrees_in_wide_dtype(experts(), PackedForward, CPU_KERNELS, 16, ROUNDING)


def test_a_wide_weight_is_converted_where_it_is_used() -> None:
    narrow = torch.randn(6, 40, 30).to(torch.bfloat16)
    wide = WideTensor(narrow, torch.float32)
    one = wide[2]
    assert isinstance(one, WideTensor) and one.dtype == torch.float32
    assert one._narrow.data_ptr() == narrow[2].data_ptr(), "nothing was copied"
    inputs = torch.randn(5, 30)
    assert torch.equal(torch.nn.functional.linear(inputs, one), inputs @ narrow[2].float().T)
    assert torch.equal(inputs @ one.T, inputs @ narrow[2].float().T)
    assert torch.equal(torch.nn.functional.embedding(torch.tensor([3, 3]), one), narrow[2].float()[[3, 3]])
    assert torch.equal(wide + 1, narrow.float() + 1)
    assert type(wide * 2) is torch.Tensor
    assert "kept in torch.bfloat16" in repr(wide)


def test_weights_stay_shared_and_tied() -> None:
    module = torch.nn.ModuleDict({"first": torch.nn.Linear(1100, 1000), "second": torch.nn.Linear(1100, 1000)})
    module.to(torch.bfloat16)
    module["second"].weight = module["first"].weight
    module.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    module.register_buffer("scales", torch.ones(3, dtype=torch.bfloat16))
    module.register_buffer("exact", torch.ones(3, dtype=torch.float64))
    kept = module["first"].weight.data_ptr()
    widen_weights(module, torch.float32)
    first, second = module["first"].weight, module["second"].weight
    assert first is second
    assert isinstance(first, WideTensor) and isinstance(first, torch.nn.Parameter)
    assert first._narrow.data_ptr() == kept
    assert type(module["first"].bias) is torch.nn.Parameter and module["first"].bias.dtype == torch.float32
    assert module.mask.dtype == torch.bool
    assert module.scales.dtype == torch.float32
    assert module.exact.dtype == torch.float64, "never narrower"
    assert module["first"](torch.ones(1, 1100)).dtype == torch.float32


def test_forwards_of_both_kinds_take_wide_weights() -> None:
    model = experts()
    widen_weights(model, torch.float32)
    for forward in (PackedForward(model), CacheForward(model, "padded", False)):
        assert forward.dtype == torch.float32


def test_rounding_of_states_is_told_from_a_mistake_without_any_choice() -> None:
    model = tiny_model("Mamba2ForCausalLM").bfloat16()
    assert agrees_in_wide_dtype(model, PackedForward, CPU_KERNELS, 16, ROUNDING) is None, "it makes no choices"
    assert agrees_in_wide_dtype(model, PackedForward, CPU_KERNELS, 16, ROUNDING, stateful=True) is not None

    def forgetful(model: PreTrainedModel) -> PackedForward:
        forward = PackedForward(model)
        forward._mixers.layers = {key: (0, functions) for key, (_, functions) in forward._mixers.layers.items()}
        return forward

    assert agrees_in_wide_dtype(model, forgetful, CPU_KERNELS, 16, ROUNDING, stateful=True) is None
