"""What transformers prepares for a custom generate passes; what a caller has put into it is refused by name."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from support.tiny_models import EOS, VOCAB, tiny_model
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation import (
    LogitsProcessorList,
    StoppingCriteriaList,
)

from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.prepared_checks import check_model_inputs

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
