"""What transformers prepares for a custom generate passes; what a caller has put into it is refused by name."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import EOS, VOCAB, tiny_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import QuantoQuantizedLayer
from transformers.generation import (
    LogitsProcessorList,
    StoppingCriteriaList,
)

import hf_async_batching
from hf_async_batching.drop_in.input_checks import check_mask, check_model_inputs
from hf_async_batching.errors import UnsupportedArgumentError

IDS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


class Prepared:
    """What a custom generate gets."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> None:
        self.input_ids = input_ids
        self.processors, self.criteria, self.config = logits_processor, stopping_criteria, generation_config
        self.kwargs = kwargs

    def check(self) -> torch.Tensor | None:
        """As the drop-in checks it."""
        return check_model_inputs(self.kwargs, self.input_ids)[0]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("Llama")


def prepare(model: PreTrainedModel, **arguments: Any) -> Prepared:
    arguments = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 5, **arguments}
    prepared: Prepared = model.generate(custom_generate=Prepared, **arguments)  # type: ignore[operator]
    return prepared


def refused(prepared: Prepared, *names: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=".*".join(map(re.escape, names))):
        prepared.check()


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
        {"do_sample": True, "top_k": 0, "renormalize_logits": True},
        {"min_new_tokens": 3},
        {"min_length": 6},
        {"min_new_tokens": 2, "eos_token_id": [EOS, 11]},
        {"max_new_tokens": None, "max_length": 9},
        {"eos_token_id": None},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"attention_mask": None, "pad_token_id": 96},
        {"attention_mask": MASK.bool()},
        {"attention_mask": torch.ones_like(IDS)},
    ],
    ids=str,
)
def test_what_generate_itself_prepares_passes(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    prepared = prepare(model, **arguments)
    mask = prepared.check()
    wanted = arguments.get("attention_mask", MASK)
    if wanted is not None and not bool(wanted.all()):
        assert mask is not None
        assert torch.equal(mask.bool()[:: len(mask) // 2], wanted.bool())


# -- inputs of the model ------------------------------------------------------------------------------------------


def test_custom_positions_are_refused(model: PreTrainedModel) -> None:
    for positions in (torch.arange(4).expand(2, -1), torch.arange(2, 6).expand(2, -1), torch.zeros(2, 7)):
        refused(prepare(model, position_ids=positions.long()), "`position_ids`")


def test_positions_that_generate_would_make_pass(model: PreTrainedModel) -> None:
    prepared = prepare(model, position_ids=torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]))
    assert "position_ids" in prepared.kwargs
    prepared.check()
    check_model_inputs({"position_ids": torch.arange(4)[None]}, IDS)
    with pytest.raises(UnsupportedArgumentError, match="`position_ids`"):
        check_model_inputs({"position_ids": torch.arange(1, 5)[None]}, IDS)


def test_embeddings_take_the_place_of_tokens_or_stand_beside_them(model: PreTrainedModel) -> None:
    given = torch.rand(2, 4, 64)
    for ids in (IDS, None):
        prepared = prepare(model, input_ids=ids, inputs_embeds=given)
        mask, embeddings = check_model_inputs(prepared.kwargs, prepared.input_ids)
        assert mask is not None and torch.equal(mask, MASK)
        assert embeddings is given or torch.equal(embeddings, given)
    with pytest.raises(UnsupportedArgumentError, match=r"`inputs_embeds` .*beside `input_ids` of shape \(2, 4\)"):
        check_model_inputs({"inputs_embeds": torch.rand(2, 3, 64)}, IDS)
    with pytest.raises(UnsupportedArgumentError, match="`attention_mask` of shape"):
        check_model_inputs({"inputs_embeds": given, "attention_mask": torch.ones(2, 3)}, IDS[:, :0])


def test_anything_else_that_the_forward_might_read_is_refused() -> None:
    for name in ("token_type_ids", "encoder_outputs", "something"):
        with pytest.raises(UnsupportedArgumentError, match=f"`{name}` is not served"):
            check_model_inputs({name: torch.zeros(2, 4)}, IDS)
        assert check_model_inputs({name: None}, IDS) == (None, None)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_that_holds_tokens_is_refused(model: PreTrainedModel, name: str) -> None:
    cache = DynamicCache(config=model.config)
    check_model_inputs({name: cache}, IDS)
    taken = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        model(input_ids=IDS[:, :2], **{taken: cache})
    assert cache.get_seq_length() == 2
    with pytest.raises(UnsupportedArgumentError, match=f"`{name}` is not served"):
        check_model_inputs({name: cache}, IDS)
    with pytest.raises(UnsupportedArgumentError, match=f"`{name}` is not served"):
        check_model_inputs({name: ((torch.zeros(1), torch.zeros(1)),)}, IDS)


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 4, 4), (1, 4)])
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedArgumentError, match="`attention_mask` of shape"):
        check_model_inputs({"attention_mask": torch.ones(shape)}, IDS)


def test_the_tiny_model_is_what_the_tests_assume(model: PreTrainedModel) -> None:
    assert model.config.vocab_size == VOCAB > IDS.max()


class Rounds(DynamicCache):
    """Stands for caches that quantize or compress."""

    def update(self, key_states: Any, value_states: Any, *arguments: Any, **named: Any) -> Any:
        return super().update(key_states.round(), value_states.round(), *arguments, **named)


def test_only_caches_that_keep_what_they_are_given_pass(model: PreTrainedModel) -> None:
    given: list[Any] = [
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=16),
        EncoderDecoderCache(DynamicCache(), DynamicCache()),
    ]
    for cache in given:
        check_model_inputs({"past_key_values": cache}, IDS)
    lossy = DynamicCache(config=model.config)
    lossy.layers[1] = QuantoQuantizedLayer.__new__(
        QuantoQuantizedLayer
    )  # made without its backend, which may not be installed
    for cache in (Rounds(), Rounds(config=model.config), EncoderDecoderCache(Rounds(), DynamicCache()), lossy):
        with pytest.raises(UnsupportedArgumentError, match="`past_key_values` is not served"):
            check_model_inputs({"past_key_values": cache}, IDS)


# -- masks ----------------------------------------------------------------------------------------------------------

HOLES = torch.tensor([[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1]])
PROMPTS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def test_zeros_between_tokens_are_as_in_generate_where_all_attend_to_all(model: Any) -> None:
    arguments = {"attention_mask": HOLES, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(PROMPTS, **arguments)
    out = model.generate(PROMPTS, **arguments, custom_generate=hf_async_batching.generate)
    assert torch.equal(out, expected)
    for dtype in (torch.bool, torch.float32, torch.int32):
        check_mask(HOLES.to(dtype), model)


@pytest.mark.parametrize("family", ["Mistral", "Mamba", "Mpt"])
def test_zeros_between_tokens_are_refused_where_layers_see_their_places(family: str) -> None:
    other: Any = tiny_model("Mistral") if family == "Mistral" else from_config(family)
    check_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), other)
    with pytest.raises(UnsupportedArgumentError, match="`attention_mask` with zeros between tokens"):
        check_mask(HOLES, other)


@pytest.mark.parametrize("mask", [2 * MASK, -MASK, MASK.float() * 0.5, torch.where(MASK == 0, float("-inf"), 0.0)])
def test_masks_with_other_values_are_refused(model: PreTrainedModel, mask: torch.Tensor) -> None:
    with pytest.raises(UnsupportedArgumentError, match="`attention_mask` with other values"):
        check_mask(mask, model)


def test_a_row_of_which_nothing_is_shown_is_refused_by_name(model: Any) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    with pytest.raises(UnsupportedArgumentError, match="`attention_mask` hides every token of row 1"):
        model.generate(IDS, attention_mask=mask, max_new_tokens=2, custom_generate=hf_async_batching.generate)


# -- inputs that ask for nothing --------------------------------------------------------------------------------------


def from_config(family: str) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    common = {"hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "intermediate_size": 32}
    sizes: dict[str, Any] = {
        "Mamba": common,
        "FalconMamba": common,
        "Mamba2": {**common, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
        "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "Bert": {**common, **heads, "is_decoder": True},
        "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    }
    config = getattr(transformers, f"{family}Config")(**small, **sizes[family])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("family", "neutral"), [("Bert", True), ("GPT2", False)])
def test_token_types_of_plain_text_are_served_where_they_change_nothing(family: str, neutral: bool) -> None:
    other = from_config(family)
    types = torch.zeros_like(PROMPTS)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    plug = hf_async_batching.generate
    if neutral:
        expected = other.generate(PROMPTS, token_type_ids=types, **arguments)
        assert torch.equal(other.generate(PROMPTS, token_type_ids=types, custom_generate=plug, **arguments), expected)
    for given in (types + 1,) if neutral else (types, types + 1):
        with pytest.raises(UnsupportedArgumentError, match="`token_type_ids` is not served"):
            other.generate(PROMPTS, token_type_ids=given, custom_generate=plug, **arguments)


@pytest.mark.parametrize("family", ["Mamba", "Mamba2", "FalconMamba"])
def test_models_of_states_alone_are_served_in_place(family: str) -> None:
    other = from_config(family)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    expected = other.generate(PROMPTS, **arguments)
    assert torch.equal(other.generate(PROMPTS, custom_generate=hf_async_batching.generate, **arguments), expected)
    cache = DynamicCache(config=other.config)
    with torch.no_grad():
        taken = next(name for name in ("cache", "cache_params") if name in inspect.signature(other.forward).parameters)
        other(input_ids=PROMPTS, **{taken: cache}, use_cache=True)
    with pytest.raises(UnsupportedArgumentError, match=f"`{taken}` is not served"):
        check_model_inputs({taken: cache}, PROMPTS)
