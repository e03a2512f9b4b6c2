"""Routes beyond the lengths at which a model begins to compute otherwise, on a small model of its class."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
import transformers
from packaging.version import parse
from support.tiny_models import tiny_model as llama_like
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel
from transformers.models.ministral3 import modeling_ministral3

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager, UnsupportedModelError
from hf_async_batching.attention import hf_interface as interface
from hf_async_batching.attention.hf_interface import PagedLayer
from hf_async_batching.attention.select import make_backend
from hf_async_batching.checks import small_copy_check as module
from hf_async_batching.checks.parity_check import check_parity
from hf_async_batching.checks.small_copy_check import SmallCopyCheck
from hf_async_batching.coverage.check import check_model, make_prompts, reference
from hf_async_batching.coverage.families import tiny_model
from hf_async_batching.model.forward import packed_forward as model_forward_module
from hf_async_batching.model.forward.cache_forward import CacheForward
from hf_async_batching.model.forward.packed_forward import PackedForward
from hf_async_batching.model.forward.row_cache import RowCache

# Beyond what the parity check's own prompts reach.
FAR = 200

needs_masks = pytest.mark.skipif(
    parse(transformers.__version__) < parse("5.24"),
    reason="the masks of older releases of transformers bear no padded batch beside this cache",
)


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_verdicts", {})


def without(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Packed layers that know nothing of a window, or of a chunk."""
    init = PackedForward.__init__

    def forgets(self: PackedForward, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        seen = {"sliding_window": None, "chunk": None}
        self._paged_layers = {
            key: PagedLayer(layer.index, **{name: getattr(layer, name) for name in seen} | changes)
            for key, layer in self._paged_layers.items()
        }

    monkeypatch.setattr(PackedForward, "__init__", forgets)


def counts_from_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ministral-3's temperature by the place in the step, in packed forwards alone."""
    packed = threading.local()
    call, scale = PackedForward._call, modeling_ministral3.get_llama_4_attn_scale

    def wrong_call(self: PackedForward, *args: Any) -> Any:
        packed.now = True
        try:
            return call(self, *args)
        finally:
            packed.now = False

    def wrong_scale(positions: torch.Tensor, *args: Any) -> Any:
        if getattr(packed, "now", False):
            positions = torch.arange(positions.shape[-1])[None]
        return scale(positions, *args)

    monkeypatch.setattr(PackedForward, "_call", wrong_call)
    monkeypatch.setattr(modeling_ministral3, "get_llama_4_attn_scale", wrong_scale)


TEMPERATURE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.5}
CHUNKS: dict[str, Any] = {"attention_chunk_size": FAR, "attn_temperature_tuning": False}
SPARSE: dict[str, Any] = {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_topk_blocks": 2}
# The threshold, a class that has it, its config, and how the packed route is made wrong beyond it.
MISTAKES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "sliding_window": ("MistralForCausalLM", {"sliding_window": FAR}, lambda m: without(m, sliding_window=None)),
    "attention_chunk_size": ("Llama4ForCausalLM", CHUNKS, lambda m: without(m, chunk=None)),
    "floor_scale": (
        "Llama4ForCausalLM",
        {"floor_scale": FAR, "attn_scale": 0.5},
        lambda m: m.setattr(model_forward_module, "cache_argument", lambda *_: None),
    ),
    "rope_parameters.original_max_position_embeddings": (
        "Ministral3ForCausalLM",
        {"rope_parameters": {**TEMPERATURE, "original_max_position_embeddings": FAR}},
        counts_from_the_step,
    ),
    "index_topk": (
        "DeepseekV32ForCausalLM",
        {"index_topk": FAR},
        lambda m: m.setattr(interface, "HARMLESS", interface.HARMLESS | {"indices"}),
    ),
    "index_topk_blocks*index_block_size": (
        "MiniMaxM3VLForCausalLM",
        {**SPARSE, "index_block_size": FAR // 2},
        lambda m: m.setattr(interface, "HARMLESS", interface.HARMLESS | {"block_indices"}),
    ),
}


@pytest.mark.parametrize("threshold", MISTAKES)
def test_a_packed_route_that_is_wrong_beyond_a_threshold_is_caught(
    threshold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_name, changes, plant = MISTAKES[threshold]
    model = tiny_model(class_name, **changes)
    check = SmallCopyCheck(model)
    assert threshold in check.thresholds
    if "index" not in threshold:
        check.refuse("packed", PackedForward)
    module._verdicts.clear()
    plant(monkeypatch)
    if threshold != "index_topk":  # there the parity check's own prompts reach beyond it
        check_parity(model, PackedForward(model), make_backend("auto", torch.device("cpu")))
    with pytest.raises(
        UnsupportedModelError, match=rf"beyond its thresholds .*{threshold.split('*')[0]}.*small model"
    ):
        SmallCopyCheck(model).refuse("packed", PackedForward)


@needs_masks
@pytest.mark.parametrize("mistake", ["window", "positions"])
def test_a_padded_route_that_is_wrong_beyond_a_threshold_is_caught(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys behind a window that are left out too early; a temperature that counts the padding of short rows."""
    model = tiny_model("MistralForCausalLM", sliding_window=FAR)
    if mistake == "window":
        load = RowCache._load_pages

        def drops(self: RowCache, cache: Any, *args: Any) -> None:
            load(self, cache, *args)
            for layer in cache.layers:
                if layer.keys.shape[-2] == layer.sliding_window - 1:
                    layer.keys[:, :, 0] = 0

        monkeypatch.setattr(RowCache, "_load_pages", drops)
    else:
        model = tiny_model("Llama4ForCausalLM", floor_scale=FAR, attn_scale=0.5)
    check_parity(model, CacheForward(model, "padded", False), make_backend("auto", torch.device("cpu")))
    with pytest.raises(UnsupportedModelError, match="beyond its thresholds"):
        SmallCopyCheck(model).refuse("padded", lambda small: CacheForward(small, "padded", False))


@needs_masks
def test_the_engine_takes_another_route(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("MistralForCausalLM", sliding_window=FAR)
    without(monkeypatch, sliding_window=None)
    known = reference(model, make_prompts(190, (5, 230, 1, 30, 14, 210)))
    settings = BatchingConfig(page_size=16, max_rows=4, max_batch_tokens=64, max_sequence_length=256)
    with caplog.at_level(logging.WARNING, "hf_async_batching"):
        verdict = check_model(model, known, config=settings)
    assert (verdict.status, verdict.reason, verdict.route) == ("exact", "", "padded")
    assert f"beyond its thresholds (sliding_window={FAR})" in caplog.text


def test_a_far_temperature_is_packed_and_exact() -> None:
    model = tiny_model("Llama4ForCausalLM", floor_scale=100, attn_scale=0.5, attention_chunk_size=64)
    prompts = make_prompts(190, (5, 230, 1, 90, 14, 210))
    known = reference(model, prompts)
    settings = BatchingConfig(page_size=16, max_rows=4, max_batch_tokens=64, max_sequence_length=256)
    verdict = check_model(model, known, config=settings)
    assert (verdict.status, verdict.reason, verdict.route) == ("exact", "", "packed")
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor([[0] * (230 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (230 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=mask, custom_generate=hf_async_batching.generate, **arguments)
    assert out[:, 230:].tolist() == known.tokens


def fail(*_: Any) -> Any:
    raise AssertionError("a small model was made")


@pytest.mark.parametrize(
    ("fields", "longest", "expected"),
    [
        ({}, None, {}),
        ({"sliding_window": 400, "max_position_embeddings": 512}, None, {"sliding_window": 400}),
        ({"sliding_window": 512, "max_position_embeddings": 512}, None, {}),
        ({"sliding_window": 400, "max_position_embeddings": 512}, 400, {}),
    ],
)
def test_only_what_is_within_reach_costs_anything(
    fields: dict[str, Any], longest: int | None, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama_like("Mistral", **fields) if fields else llama_like("Llama")
    check = SmallCopyCheck(model, longest)
    assert check.thresholds == expected
    if not expected:
        monkeypatch.setattr(module, "_make", fail)
        check.refuse("packed", PackedForward)
        with check.beside("packed", PackedForward, True):
            assert not any("small copy" in thread.name for thread in threading.enumerate())


def test_one_check_for_models_of_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = module._make
    monkeypatch.setattr(module, "_make", lambda *args: made.append(args[2]) or make(*args))
    for _ in range(2):
        SmallCopyCheck(llama_like("Mistral")).refuse("packed", PackedForward)
    assert made == [0]
    SmallCopyCheck(llama_like("Mistral", num_key_value_heads=4)).refuse("packed", PackedForward)
    assert made == [0, 0]


def test_what_a_thread_finds_out_beside_is_known() -> None:
    model = llama_like("Mistral")
    check = SmallCopyCheck(model)
    with check.beside("packed", PackedForward, False):
        pass
    assert not module._verdicts
    with check.beside("packed", PackedForward, True):
        pass
    assert list(module._verdicts.values()) == [None]


class Own(MistralForCausalLM):
    """Made in a way of its own."""

    def __init__(self, config: Any, needed: int) -> None:
        super().__init__(config)
        self.needed = needed


class Further(MistralForCausalLM):
    """Made as its base class is."""


def of(model_class: Any, *args: Any) -> PreTrainedModel:
    model: PreTrainedModel = model_class(llama_like("Mistral").config, *args).eval()
    return model


@pytest.mark.parametrize("why", ["its own way", "too large", "does not generate", "not finite"])
def test_what_cannot_be_told_is_logged(
    why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of(Own, 3) if why == "its own way" else of(Further)
    if why == "too large":
        monkeypatch.setattr(module, "_MOST_PARAMETERS", 10)
    elif why == "does not generate":
        monkeypatch.setattr(Further, "forward", lambda *_, **__: 1 / 0)
    elif why == "not finite":

        def no_numbers(*args: Any, **kwargs: Any) -> Any:
            out = MistralForCausalLM.forward(*args, **kwargs)
            out.logits = out.logits * torch.nan
            return out

        monkeypatch.setattr(Further, "forward", no_numbers)
    with caplog.at_level(logging.INFO, "hf_async_batching"):
        SmallCopyCheck(model).refuse("packed", PackedForward)
    assert "is not checked beyond sliding_window" in caplog.text
    reason = {
        "its own way": "no rule makes a small Own",
        "too large": "parameters",
        "does not generate": "ZeroDivisionError",
        "not finite": "are not finite",
    }
    assert reason[why] in caplog.text


class Unfilled(MistralForCausalLM):
    """Its class leaves memory as it was, as `torch.empty` does."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        torch.nn.init.constant_(self.lm_head.weight, torch.nan)


def test_weights_that_a_class_leaves_unset_are_drawn() -> None:
    with torch.no_grad():
        made: Any = module._make(Unfilled, llama_like("Mistral").config, 0)
    assert torch.isfinite(made.lm_head.weight).all()
    assert made.lm_head.weight.std() > 0


def test_a_small_copy_tells_its_keys_apart() -> None:
    """As drawn by its class it takes the mean of all values, and a mistake in one of them looks like rounding."""
    config = llama_like("Mistral").config
    config._attn_implementation = "eager"
    with torch.no_grad():
        made = module._make(MistralForCausalLM, config, 0)
        weights = made(torch.arange(3, 13)[None], output_attentions=True).attentions
    for layer in weights:
        assert layer[0, :, -1].log().std(-1).mean() > 0.2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_small_copy_has_the_attention_of_its_model(attention: str) -> None:
    model = llama_like("Mistral")
    model.config._attn_implementation = attention
    assert SmallCopyCheck(model)._small_config._attn_implementation == attention


def test_a_copy_that_is_made_in_inference_mode_serves_outside_of_it() -> None:
    check = SmallCopyCheck(llama_like("Mistral"))
    with torch.inference_mode():
        check.refuse("packed", PackedForward)
    (made,) = check._models.values()
    assert not any(parameter.is_inference() for parameter in made.parameters())
    check.refuse("padded", lambda small: CacheForward(small, "padded", False))
    assert list(check._models.values()) == [made], "one copy for all routes"


def test_prompts_and_chunks_lie_on_both_sides_of_every_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module, "check_parity", lambda *_, prompts: seen.append(prompts))
    SmallCopyCheck(llama_like("Mistral")).refuse("packed", PackedForward)
    for lengths in ([len(prompts.second) for prompts in seen], [prompts.chunk for prompts in seen]):
        assert min(lengths) < 16 < max(lengths)
    assert min(len(prompt) for prompts in seen for prompt in prompts) < 8


def test_a_class_that_is_made_as_its_base_is_checked() -> None:
    SmallCopyCheck(of(Further)).refuse("packed", PackedForward)
    assert list(module._verdicts.values()) == [None]


@needs_masks
@pytest.mark.parametrize("class_name", ["MistralForCausalLM", "Gemma2ForCausalLM", "Mamba2ForCausalLM"])
def test_a_callers_settings_neither_matter_nor_change(class_name: str) -> None:
    model = tiny_model(class_name)
    before = torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            SmallCopyCheck(model).refuse("padded", lambda small: CacheForward(small, "padded", True))
    finally:
        torch.set_default_dtype(torch.float32)
    assert list(module._verdicts.values()) == [None]
    assert torch.equal(torch.get_rng_state(), before)


def test_rounding_near_a_tie_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= failures:
            raise UnsupportedModelError("Mistral is not served: its logits differ. Do this.")

    monkeypatch.setattr(module, "check_parity", sometimes)
    failures = 1
    SmallCopyCheck(llama_like("Mistral")).refuse("packed", PackedForward)
    failures = 100
    module._verdicts.clear()
    with pytest.raises(UnsupportedModelError, match=r"shows \(.*its logits differ\)"):
        SmallCopyCheck(llama_like("Mistral")).refuse("packed", PackedForward)


def test_an_unchecked_engine_makes_no_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_make", fail)
    config = BatchingConfig(page_size=16, attach_check=False)
    with GenerationManager(llama_like("Mistral"), config) as manager:
        assert manager.submit([5, 6], max_new_tokens=2).result(60).token_ids
    assert isinstance(llama_like("Llama"), LlamaForCausalLM)
