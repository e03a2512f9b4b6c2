"""`on_unsupported="generate"`: a call that the engine does not serve gives what plain `model.generate` gives."""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.criteria import RowWise
from support.recorder import Recorder
from support.tiny_models import VOCAB, ragged_prompts, tiny_model
from support.tiny_tokenizer import tiny_tokenizer
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

import hf_async_batching
from hf_async_batching import (
    BatchingConfig,
    GenerationManager,
    RequestTooLongError,
    UnsupportedArgumentError,
    UnsupportedModelError,
)
from hf_async_batching.drop_in import (
    fallback as plain_generate,
)
from hf_async_batching.model.forward.cache_forward import MODES

ROOT = Path(__file__).parents[2]
CONFIG = BatchingConfig(page_size=16, max_batch_tokens=64, debug=True)
PROMPTS = ragged_prompts(3, 12, seed=5)
WAYS = ["in place", "bound", "direct", "folder"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def manager(model: Any) -> Any:
    with GenerationManager(model, CONFIG) as manager:
        yield manager


@pytest.fixture(autouse=True)
def forget() -> Any:
    plain_generate._warn_once.cache_clear()
    plain_generate._refused.clear()


def padded() -> dict[str, torch.Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def call(way: str, model: Any, manager: Any, *, on_unsupported: str = "generate", **arguments: Any) -> Any:
    ours = {"manager": manager} if manager is not None else {}
    if way == "in place":
        plug = partial(hf_async_batching.generate, on_unsupported=on_unsupported, **ours)
        return model.generate(custom_generate=plug, **arguments)
    if way == "bound":
        return model.generate(custom_generate=manager.bind(on_unsupported=on_unsupported), **arguments)
    if way == "direct":
        return hf_async_batching.generate(model, on_unsupported=on_unsupported, **ours, **arguments)
    return model.generate(
        custom_generate=str(ROOT), trust_remote_code=True, on_unsupported=on_unsupported, **ours, **arguments
    )


class Halves(LogitsProcessor):
    """A processor that nobody knows."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * 0.5 + torch.arange(scores.shape[1]) * 0.01 * input_ids.shape[1]


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams, several of them": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3},
    "beams, sampled": {"num_beams": 2, "do_sample": True, "top_k": 20},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "positions": {"position_ids": torch.arange(12)[None].expand(3, -1) + 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_the_outcome_is_that_of_generate(
    model: Any, manager: Any, name: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {**padded(), "max_new_tokens": 6, "do_sample": False, **UNSUPPORTED[name]}
    before = (copy.deepcopy(model.config.to_dict()), model.generation_config.to_dict(), model.training)
    torch.manual_seed(3)
    expected = model.generate(**arguments)
    with caplog.at_level(logging.WARNING, logger="hf_async_batching"):
        for _ in range(2):
            torch.manual_seed(3)
            got = call(way, model, manager, **arguments)
            if isinstance(expected, torch.Tensor):
                assert torch.equal(got, expected)
            else:
                assert type(got) is type(expected)
                assert torch.equal(got.sequences, expected.sequences)
                assert got.keys() == expected.keys()
    assert (model.config.to_dict(), model.generation_config.to_dict(), model.training) == before
    ours = [record for record in caplog.records if record.name.startswith("hf_async_batching")]
    assert [record.levelname for record in ours] == ["WARNING"], "once for each reason"
    with pytest.raises(UnsupportedArgumentError):
        call(way, model, manager, on_unsupported="error", **arguments)


@pytest.mark.parametrize("way", WAYS)
def test_assisted_decoding(model: Any, manager: Any, way: str) -> None:
    assistant = tiny_model("Llama", num_hidden_layers=1)
    arguments = {"input_ids": torch.tensor([PROMPTS[-1]]), "assistant_model": assistant, "max_new_tokens": 12}
    expected = model.generate(**arguments, do_sample=False)
    assert torch.equal(call(way, model, manager, **arguments, do_sample=False), expected)
    with pytest.raises(UnsupportedArgumentError, match="`assistant_model`"):
        call(way, model, manager, on_unsupported="error", **arguments, do_sample=False)


def test_assisted_decoding_with_another_tokenizer(model: Any, manager: Any) -> None:
    assistant = tiny_model("Llama", num_hidden_layers=1, vocab_size=VOCAB + 3)
    arguments = {
        "input_ids": torch.tensor([PROMPTS[-1]]),
        "assistant_model": assistant,
        "tokenizer": tiny_tokenizer(),
        "assistant_tokenizer": tiny_tokenizer(),
        "max_new_tokens": 12,
        "do_sample": False,
    }
    expected = model.generate(**arguments)
    for way in WAYS:
        assert torch.equal(call(way, model, manager, **arguments), expected)


@pytest.mark.parametrize("way", ["in place", "bound", "direct"])
def test_contrastive_search_lives_elsewhere(model: Any, manager: Any, way: str) -> None:
    """transformers loads it from a repository of the Hub, and wants `trust_remote_code` for that.

    A folder is loaded with `trust_remote_code`, but the flag does not reach it.
    """
    arguments = {"input_ids": torch.tensor([PROMPTS[-1]]), "penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="trust_remote_code") as plain:
        model.generate(**arguments)
    with pytest.raises(ValueError, match="trust_remote_code") as ours:
        call(way, model, manager, **arguments)
    assert str(ours.value) == str(plain.value)


@pytest.mark.parametrize("way", [*WAYS, "bound streamer"])
def test_streamers_stop_strings_and_criteria_go_along(model: Any, manager: Any, way: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([PROMPTS[-1]])
    arguments: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    arguments |= {"output_hidden_states": True, "return_dict_in_generate": True}
    full = tokenizer.decode(model.generate(ids, **arguments).sequences[0, ids.shape[1] :])
    arguments |= {"stop_strings": [full[14:17]], "tokenizer": tokenizer}
    expected, got = Recorder(), Recorder()
    plain, ours = RowWise(set()), RowWise(set())
    want = model.generate(ids, streamer=expected, stopping_criteria=StoppingCriteriaList([plain]), **arguments)
    if way == "bound streamer":
        plug = manager.bind(streamer=got, tokenizer=tokenizer, on_unsupported="generate")
        del arguments["tokenizer"]
        out = model.generate(ids, custom_generate=plug, stopping_criteria=StoppingCriteriaList([ours]), **arguments)
    else:
        out = call(
            way, model, manager, inputs=ids, streamer=got, stopping_criteria=StoppingCriteriaList([ours]), **arguments
        )
    assert torch.equal(out.sequences, want.sequences)
    assert out.sequences.shape[1] < ids.shape[1] + 20
    assert got.calls == expected.calls
    assert ours.calls == plain.calls


@pytest.mark.parametrize("way", ["in place", "direct", "folder"])
def test_models_that_are_refused(way: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what they are, and by what the parity check finds; that is not looked for again in every call."""
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    arguments = {**padded(), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**arguments)
    with caplog.at_level(logging.WARNING, logger="hf_async_batching"):
        assert torch.equal(call(way, model, None, **arguments), expected)
    assert "encoder" in caplog.text
    with pytest.raises(UnsupportedModelError, match="encoder"):
        call(way, model, None, on_unsupported="error", **arguments)

    llama = tiny_model("Llama")
    checks: list[Any] = []

    def wrong(*args: Any) -> None:
        checks.append(args)
        raise UnsupportedModelError("LlamaForCausalLM is not served: its logits differ")

    monkeypatch.setattr(hf_async_batching.engine.route, "check_parity", wrong)
    for _ in range(3):
        assert torch.equal(call(way, llama, None, **arguments), llama.generate(**arguments))
    assert len(checks) == 1 + len(MODES), "each way to serve it is tried once"
    hf_async_batching.get_manager(llama).close()


def test_a_seed_is_not_lost(model: Any, manager: Any) -> None:
    arguments = {**padded(), "max_new_tokens": 6, "num_beams": 2, "seed": 5}
    for way in WAYS:
        with pytest.raises(UnsupportedArgumentError, match=r"`seed`.*num_beams"):
            call(way, model, manager, do_sample=True, **arguments)
        assert torch.equal(
            call(way, model, manager, do_sample=False, **arguments),
            model.generate(**padded(), max_new_tokens=6, num_beams=2, do_sample=False),
        )


def test_what_is_served_stays_in_the_engine_and_mistakes_stay_mistakes(model: Any, manager: Any) -> None:
    for way in WAYS:
        steps = manager.stats().steps
        call(way, model, manager, **padded(), max_new_tokens=3)
        assert manager.stats().steps > steps
        with pytest.raises(RequestTooLongError):
            call(way, model, manager, **padded(), max_new_tokens=5000)
    for bad in ("plain", None, True):
        with pytest.raises(ValueError, match="`on_unsupported`"):
            manager.bind(on_unsupported=bad)
    with pytest.raises(ValueError, match="`on_unsupported`"):
        hf_async_batching.generate(model, **padded(), on_unsupported="never", manager=manager)


def test_autocast_goes_to_generate(model: Any, manager: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(**padded(), max_new_tokens=4, do_sample=False)
        for way in WAYS:
            assert torch.equal(call(way, model, manager, **padded(), max_new_tokens=4, do_sample=False), expected)


def test_token_healing_goes_along(model: Any, manager: Any) -> None:
    tokenizer = tiny_tokenizer()
    arguments = {"input_ids": torch.tensor([PROMPTS[-1]]), "token_healing": True, "max_new_tokens": 5}
    expected = model.generate(tokenizer=tokenizer, do_sample=False, **arguments)
    for way in ("direct", "folder"):
        got = call(way, model, manager, tokenizer=tokenizer, do_sample=False, **arguments)
        assert torch.equal(got, expected)
        with pytest.raises(UnsupportedArgumentError, match="token_healing"):
            call(way, model, manager, on_unsupported="error", tokenizer=tokenizer, **arguments)


def test_processors_in_a_config(model: Any, manager: Any) -> None:
    config = GenerationConfig(max_new_tokens=6, num_beams=2, do_sample=False, pad_token_id=0)
    before = config.to_dict()
    arguments = {**padded(), "logits_processor": LogitsProcessorList([Halves()]), "generation_config": config}
    expected = model.generate(**arguments)
    for way in WAYS:
        assert torch.equal(call(way, model, manager, **arguments), expected)
    assert config.to_dict() == before
