"""Routes are chosen by looking and by a small copy on the CPU: the model itself runs no forward that fails."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from support.hidden_states import hide_functions
from transformers import PreTrainedModel

from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedModelError
from hf_async_batching.checks import small_copy_check
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.engine import route
from hf_async_batching.engine.route import check_servable, choose_route, looks_packed
from hf_async_batching.errors import DeviceFailedError, LogitsDifferError
from hf_async_batching.model.forward.cache_forward import MODES, CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_copy_check, "_verdicts", {})


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("LlamaForCausalLM", True),
        ("Gemma3ForCausalLM", True),
        ("Qwen3MoeForCausalLM", True),
        ("GptOssForCausalLM", True),
        ("DeepseekV2ForCausalLM", True),
        ("Qwen3NextForCausalLM", False),
        ("Lfm2ForCausalLM", False),
        ("NemotronHForCausalLM", False),
        ("Mamba2ForCausalLM", False),
        ("FalconForCausalLM", False),
        ("BloomForCausalLM", False),
        ("RwkvForCausalLM", False),
    ],
)
def test_looks(name: str, packed: bool) -> None:
    assert looks_packed(tiny_model(name)) == packed


def test_code_from_elsewhere_does_not_look_packed() -> None:
    model = tiny_model("LlamaForCausalLM")
    model.__class__ = type("OwnForCausalLM", (type(model),), {})
    assert not looks_packed(model)


def test_a_class_that_keeps_states_does_not_look_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("LlamaForCausalLM")
    monkeypatch.setattr(type(model), "_is_stateful", True, raising=False)
    assert not looks_packed(model)


class Watch:
    """Pretends that models lie on a GPU, and writes down the forwards that are made of one of them."""

    def __init__(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        monkeypatch.setattr(route, "_is_on_cuda", lambda _: True)
        for kind in (PackedForward, CacheForward):
            monkeypatch.setattr(kind, "__init__", self._watched(kind.__init__, model))

    def _watched(self, init: Any, model: PreTrainedModel) -> Any:
        def watched(forward: Any, of: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
            if of is model:
                self.made.append(kwargs.get("batching", "packed") + (" whole" if kwargs.get("whole_prompts") else ""))
            init(forward, of, *args, **kwargs)

        return watched


@pytest.mark.parametrize(
    "name",
    ["FalconForCausalLM", "Mamba2ForCausalLM", "JambaForCausalLM", "Qwen3NextForCausalLM", "ZayaForCausalLM"],
)
def test_only_the_route_that_serves_is_made_of_the_model_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = choose_route(tiny_model(name), BatchingConfig())[0].route
    model = tiny_model(name)
    watch = Watch(model, monkeypatch)
    check_servable(model)
    assert not watch.made
    forward = choose_route(model, BatchingConfig())[0]
    assert forward.route == expected
    assert len(watch.made) == 1


def test_a_mask_that_a_release_cannot_make_is_met_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with transformers 5.17, whose padding masks are indexed out of bounds beside this cache."""
    model = tiny_model("FalconForCausalLM")
    watch = Watch(model, monkeypatch)

    def out_of_bounds(*_: Any) -> Any:
        raise IndexError("index 40 is out of bounds for dimension 0 with size 38")

    monkeypatch.setattr(CacheForward, "_run", out_of_bounds)
    with caplog.at_level(logging.DEBUG, "hf_async_batching"):
        assert choose_route(model, BatchingConfig())[0].route == "single"
    assert watch.made == ["single whole"]
    assert caplog.text.count("out of bounds") >= len(MODES) - 1


def test_what_the_cpu_cannot_tell_is_not_tried_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HrmText and transformers 5.17: no small copy could be made, and the padded route ended the context."""
    model = tiny_model("FalconForCausalLM")
    watch = Watch(model, monkeypatch)

    def none(*_: Any) -> Any:
        raise IndexError("list index out of range")

    monkeypatch.setattr(small_copy_check, "_make", none)
    assert choose_route(model, BatchingConfig())[0].route == "single"
    assert watch.made == ["packed", "single whole"], "the packed route refuses by looking at calls, not by failing"


def test_a_model_that_looks_packed_costs_no_small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("LlamaForCausalLM")
    watch = Watch(model, monkeypatch)
    monkeypatch.setattr(small_copy_check, "_make", lambda *_: pytest.fail("a small copy was made"))
    check_servable(model)
    assert choose_route(model, BatchingConfig())[0].route == "packed"
    assert set(watch.made) == {"packed"}


def test_a_model_that_looks_packed_and_is_not_is_tried_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("LlamaForCausalLM")
    watch = Watch(model, monkeypatch)

    def refuse(*_: Any) -> Any:
        raise UnsupportedModelError("not packed")

    monkeypatch.setattr(route, "_packed_forward", refuse)
    tried: list[str] = []
    refuse_small = small_copy_check.SmallCopyCheck.refuse

    def noted(self: Any, route: str, make: Any, **options: bool) -> None:
        tried.append(f"{route}: {options}")
        refuse_small(self, route, make, **options)

    monkeypatch.setattr(small_copy_check.SmallCopyCheck, "refuse", noted)
    assert choose_route(model, BatchingConfig())[0].route == "padded"
    assert tried == ["padded: {'always': True, 'known': True}"]
    assert watch.made == ["padded"]


def test_a_failing_device_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not: the next route in a context that is gone."""
    made: list[str] = []

    def fail(make: Any, *_: Any) -> Any:
        made.append("fused" if isinstance(make, partial) else "plain")
        raise DeviceFailedError("Llama, served as packed, failed on cuda:0")

    monkeypatch.setattr(route, "_checked", fail)
    with pytest.raises(DeviceFailedError):
        choose_route(tiny_model("LlamaForCausalLM"), BatchingConfig(fuse_weights=True))
    assert made == ["fused"]


def test_a_manager_is_made_without_a_forward_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Mamba2ForCausalLM")
    watch = Watch(model, monkeypatch)
    with GenerationManager(model):
        assert not watch.made
        assert torch.is_inference_mode_enabled() is False


def test_a_refusal_says_what_every_route_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_functions(monkeypatch)
    model = tiny_model("Mamba2ForCausalLM")

    def refuse(_: Any, of: PreTrainedModel, batching: str = "single", whole_prompts: bool = True) -> None:
        raise UnsupportedModelError(f"no {batching}")

    monkeypatch.setattr(CacheForward, "__init__", refuse)
    for ask in (check_servable, lambda model: choose_route(model, BatchingConfig(attach_check=False))):
        with pytest.raises(UnsupportedModelError, match="no single") as caught:
            ask(model)
        assert "AttentionInterface" in str(caught.value.__cause__), "why it is not packed"


def test_an_encoder_is_refused_before_anything_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("LlamaForCausalLM")
    watch = Watch(model, monkeypatch)
    model.config.is_encoder_decoder = True
    for ask in (check_servable, lambda model: choose_route(model, BatchingConfig())):
        with pytest.raises(UnsupportedModelError, match="an encoder and a decoder"):
            ask(model)
    assert not watch.made


def test_what_differs_in_the_wider_dtype_too_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: Any) -> Any:
        raise LogitsDifferError("its logits differ", plain=True)

    monkeypatch.setattr(route, "check_parity", differs)
    monkeypatch.setattr(route, "agrees_in_wide_dtype", lambda *_, **__: None)
    with pytest.raises(LogitsDifferError, match="its logits differ"):
        choose_route(tiny_model("LlamaForCausalLM"), BatchingConfig())
