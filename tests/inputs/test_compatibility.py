"""Each honoured field against plain `generate`: float32, greedy, alone and in the company of seven others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pace import held
from support.tiny_models import EOS, VOCAB, tiny_model
from transformers import PreTrainedModel
from transformers.generation import LogitsProcessor, LogitsProcessorList

from hf_async_batching import BatchingConfig, GenerationManager
from hf_async_batching.inputs.compatibility import ARGUMENTS, FIELDS

NEW = 10
PROMPT = [74, 8, 37, 54, 74, 8]
# The first row of a call; its padding stands on the left.
IDS = torch.tensor([[0, 0, 9, 10, 9, 11], PROMPT])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])

Arguments = dict[str, Any]


class Favour(LogitsProcessor):
    """Adds to the token that follows the last one, and to the first token of the history."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[torch.arange(len(scores)), (input_ids[:, -1] + 1) % VOCAB] += 6.0
        scores[torch.arange(len(scores)), input_ids[:, 0]] += 3.0
        return scores


# Arguments that change what the model says: `usual` are its tokens without any, of the prompt `PROMPT`.
EXAMPLES: dict[str, Callable[[list[int]], Arguments]] = {
    "min_length": lambda usual: {"eos_token_id": usual[2], "min_length": 11},
    "min_new_tokens": lambda usual: {"eos_token_id": usual[2], "min_new_tokens": 5},
    "eos_token_id": lambda usual: {"eos_token_id": [usual[4], *range(90, 96)]},
    "forced_bos_token_id": lambda usual: {"forced_bos_token_id": 17, "begin_suppress_tokens": [usual[0], 18]},
    "forced_eos_token_id": lambda usual: {"forced_eos_token_id": [EOS, 30]},
    "exponential_decay_length_penalty": lambda usual: {"exponential_decay_length_penalty": (2, 1.9)},
    "repetition_penalty": lambda usual: {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": lambda usual: {"encoder_repetition_penalty": 5.0},
    "no_repeat_ngram_size": lambda usual: {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": lambda usual: {"encoder_no_repeat_ngram_size": 1, "sequence_bias": {(74,): 9.0}},
    "sequence_bias": lambda usual: {"sequence_bias": {(usual[0],): -3.0, (usual[1], 40): 30.0, (41,): 2.0}},
    "bad_words_ids": lambda usual: {"bad_words_ids": [[usual[0]], [usual[2], usual[3]], [EOS]]},
    "suppress_tokens": lambda usual: {"suppress_tokens": usual[1:4]},
    "begin_suppress_tokens": lambda usual: {"begin_suppress_tokens": [usual[0], EOS]},
    "remove_invalid_values": lambda usual: {"remove_invalid_values": True, "suppress_tokens": usual[:2]},
    "renormalize_logits": lambda usual: {"renormalize_logits": True, "suppress_tokens": usual[:3]},
    "guidance_scale": lambda usual: {"guidance_scale": 2.5},
    "watermarking_config": lambda usual: {"watermarking_config": {"bias": 9.0, "seeding_scheme": "lefthash"}},
    "prefix_allowed_tokens_fn": lambda usual: {"prefix_allowed_tokens_fn": _allowed},
    "negative_prompt_ids": lambda usual: {"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([[9, 12]])},
    "negative_prompt_attention_mask": lambda usual: {
        "guidance_scale": 3.0,
        "negative_prompt_ids": torch.tensor([[9, 12, 13]]),
        "negative_prompt_attention_mask": torch.tensor([[0, 1, 1]]),
    },
    "logits_processor": lambda usual: {"logits_processor": LogitsProcessorList([Favour()]), "suppress_tokens": [7]},
    "max_length": lambda usual: {"max_length": len(PROMPT) + 4, "max_new_tokens": None},
    "max_new_tokens": lambda usual: {"max_new_tokens": 3},
}

# Honoured, and seen to be elsewhere.
ELSEWHERE = {
    "tests/sampling": {
        "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    },
    "tests/scheduler/test_speculation.py": {"prompt_lookup_num_tokens", "max_matching_ngram_size"},
    "tests/drop_in/test_outputs.py": {"return_dict_in_generate", "output_scores", "output_logits"},
    "tests/drop_in/test_drop_in.py": {
        "num_return_sequences", "pad_token_id", "bos_token_id",
        "inputs", "generation_config", "streamer", "custom_generate", "kwargs",
    },
}  # fmt: skip


def _allowed(row: int, tokens: torch.Tensor) -> list[int]:
    return [3 + int(tokens[-1]) * 7 % 40, 50 + len(tokens), 70 + row]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def manager(model: PreTrainedModel) -> Any:
    with GenerationManager(model, BatchingConfig(page_size=16, depth=2, debug=True)) as manager:
        yield manager


@pytest.fixture(scope="module")
def usual(model: Any) -> list[int]:
    tokens: list[int] = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(PROMPT) :].tolist()
    assert len(set(tokens[:5])) == 5, "the examples rely on different tokens"
    return tokens


@pytest.fixture(scope="module")
def expected(model: Any, usual: list[int]) -> Callable[[str], list[int]]:
    """Tokens of plain `generate` for one prompt with the arguments of an example."""
    known: dict[str, list[int]] = {}

    def tokens(name: str) -> list[int]:
        if name not in known:
            out = model.generate(torch.tensor([PROMPT]), **arguments_of(name, usual), pad_token_id=0)
            known[name] = out[0, len(PROMPT) :].tolist()
        return known[name]

    return tokens


def arguments_of(name: str, usual: list[int]) -> Arguments:
    return {"max_new_tokens": NEW, "do_sample": False, **EXAMPLES[name](usual)}


def test_every_honoured_line_has_an_example() -> None:
    honoured = {name for table in (FIELDS, ARGUMENTS) for name, entry in table.items() if entry.status == "honoured"}
    elsewhere = set().union(*ELSEWHERE.values())
    assert not elsewhere & EXAMPLES.keys()
    assert honoured - elsewhere - EXAMPLES.keys() <= OF_THE_HOST
    assert EXAMPLES.keys() <= honoured


# Honoured by what happens after tokens have arrived.
OF_THE_HOST = {"max_time", "stop_strings", "stopping_criteria", "tokenizer", "assistant_model", "synced_gpus"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_alone(model: Any, manager: Any, usual: list[int], name: str) -> None:
    """A call of two rows, one of them padded: the same tokens, and the same scores until a row ends."""
    arguments = arguments_of(name, usual)
    for field in ("negative_prompt_ids", "negative_prompt_attention_mask"):
        if field in arguments:
            arguments[field] = arguments[field].expand(2, -1)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "pad_token_id": 0}
    outputs = {"return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(**inputs, **arguments, **outputs)
    got = model.generate(**inputs, **arguments, **outputs, custom_generate=manager.bind())
    assert torch.equal(got.sequences, plain.sequences)
    other = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    if name != "renormalize_logits":
        assert got.sequences.shape != other.shape or not torch.equal(got.sequences, other), (
            "the example changes nothing"
        )
    live = torch.ones(2, dtype=torch.bool)
    ends = torch.tensor(arguments.get("eos_token_id") or EOS)
    assert len(got.scores) == len(plain.scores)
    for step, (ours, theirs) in enumerate(zip(got.scores, plain.scores, strict=True)):
        torch.testing.assert_close(ours[live], theirs[live], rtol=1e-4, atol=1e-4)
        assert not ours[~live].any()
        live &= ~torch.isin(got.sequences[:, IDS.shape[1] + step], ends)


@pytest.mark.parametrize("name", EXAMPLES)
def test_in_company(manager: Any, usual: list[int], expected: Callable[[str], list[int]], name: str) -> None:
    names = list(EXAMPLES)
    company = [names[(names.index(name) + 3 * i) % len(names)] for i in range(8)]
    assert len(set(company)) == 8
    handles = {one: manager.submit(PROMPT, **arguments_of(one, usual)) for one in company}
    for one, handle in handles.items():
        assert handle.result(60).token_ids == expected(one), f"{one} in the company of {company}"


def test_a_prompt_of_one_token_begins_as_it_is_forced_to(model: Any, manager: Any) -> None:
    arguments = {"max_new_tokens": 5, "do_sample": False, "forced_bos_token_id": 17, "begin_suppress_tokens": [20, 41]}
    plain = model.generate(torch.tensor([[9]]), **arguments)
    assert plain[0, 1] == 17
    assert torch.equal(model.generate(torch.tensor([[9]]), **arguments, custom_generate=manager.bind()), plain)
    longer = {"max_length": 2, "do_sample": False, "forced_bos_token_id": 17, "forced_eos_token_id": 30}
    plain = model.generate(torch.tensor([[9]]), **longer)
    assert plain[0, 1] == 30, "the end is forced after the beginning"
    assert torch.equal(model.generate(torch.tensor([[9]]), **longer, custom_generate=manager.bind()), plain)


@pytest.mark.parametrize(
    "arguments",
    [
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.5, "bad_words_ids": [[0, 0, 0, 0, 9]], "no_repeat_ngram_size": 3},
        {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 2.0},
        {"sequence_bias": {(0, 9, 10, 9, 11, 40): 50.0, (0, 0, 0, 0, 0, 0, 0, 9, 10, 9, 11, 41): 60.0}},
        {"suppress_tokens": list(range(3, 60)) * 6},
    ],
    ids=str,
)
def test_padding_counts_as_it_does_in_generate(model: Any, manager: Any, arguments: Arguments) -> None:
    prompt = [9, 10, 9, 11]
    for width in (5, 12, 90):
        ids = torch.tensor([[0] * (width - 4) + prompt, [0] * (width - 4) + prompt[::-1], list(range(5, width + 5))])
        inputs = {"input_ids": ids % VOCAB, "attention_mask": (ids != 0).long(), "pad_token_id": 0}
        inputs |= {"max_new_tokens": 12, "do_sample": False, **arguments}
        plain = model.generate(**inputs)
        assert torch.equal(model.generate(**inputs, custom_generate=manager.bind()), plain), width


def test_rows_of_one_prompt_and_their_encoder(model: Any, manager: Any) -> None:
    """`num_return_sequences`: what holds one line per prompt serves each of its rows."""
    inputs = {"input_ids": IDS, "attention_mask": MASK, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    inputs |= {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0, "max_new_tokens": 8}
    got = model.generate(**inputs, custom_generate=manager.bind())
    one = model.generate(**{**inputs, "num_return_sequences": 1}, custom_generate=manager.bind())
    assert torch.equal(got, one.repeat_interleave(3, 0))
    assert torch.equal(one, model.generate(**{**inputs, "num_return_sequences": 1}))


@pytest.mark.parametrize("depth", [1, 3])
def test_histories_survive_preemption_and_found_pages(model: Any, depth: int) -> None:
    shared = [(7 * i + 3) % VOCAB for i in range(40)]
    prompts = [[*shared, 5 + i, 9] for i in range(6)]
    kinds: list[Arguments] = [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
        {"bad_words_ids": [[shared[3], shared[4]], [30]], "encoder_repetition_penalty": 1.7},
        {"logits_processor": [Favour()]},
        {},
    ]
    config = BatchingConfig(page_size=16, num_pages=14, max_rows=5, max_batch_tokens=48, depth=depth, debug=True)
    with GenerationManager(model, config) as manager:
        for _ in range(2):
            with held(manager):
                handles = [
                    manager.submit(prompt, max_new_tokens=40, do_sample=False, **kind)
                    for prompt, kind in zip(prompts, kinds, strict=True)
                ]
            for prompt, kind, handle in zip(prompts, kinds, handles, strict=True):
                plain = model.generate(
                    torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0, **kind
                )
                assert handle.result(120).token_ids == plain[0, len(prompt) :].tolist(), kind
        assert manager.stats().preemptions > 0
        assert handles[0].result().metrics.cached_prompt_tokens > 0


def test_tokens_outside_of_the_vocabulary_are_refused(manager: Any) -> None:
    for arguments in ({"sequence_bias": {(VOCAB,): 1.0}}, {"bad_words_ids": [[5, VOCAB + 3]]}):
        with pytest.raises(ValueError, match="outside of the model's vocabulary"):
            manager.submit(PROMPT, max_new_tokens=3, **arguments)
    beyond = manager.submit(PROMPT, max_new_tokens=3, do_sample=False, suppress_tokens=[VOCAB, -1, 10**6])
    plain = manager.submit(PROMPT, max_new_tokens=3, do_sample=False)
    assert beyond.result(60).token_ids == plain.result(60).token_ids
