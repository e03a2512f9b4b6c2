"""`generate` as a drop-in: the arguments, shapes, padding, types and streams of `model.generate`."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recorder import Recorder
from support.tiny_models import EOS, VOCAB, greedy_alone, ragged_prompts, tiny_model
from support.tiny_tokenizer import tiny_tokenizer
from transformers import AsyncTextIteratorStreamer, GenerationConfig, TextIteratorStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

import hf_async_batching
from hf_async_batching import BatchingConfig, GenerationManager, RequestTooLongError, UnsupportedArgumentError

ROOT = Path(__file__).parents[2]
CONFIG = BatchingConfig(page_size=16, max_batch_tokens=64, debug=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def manager(model: Any) -> Any:
    with GenerationManager(model, CONFIG) as manager:
        yield manager


@pytest.fixture(scope="module")
def plug(manager: Any) -> Any:
    return manager.bind()


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


PROMPTS = ragged_prompts(5, 30, seed=3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 12},
        {"max_length": 37},
        {"max_new_tokens": 12, "eos_token_id": [EOS, 50, 51, 52]},
        {"max_new_tokens": 12, "eos_token_id": list(range(3, 60)), "pad_token_id": 1},
        {"max_new_tokens": 12, "eos_token_id": [17, 18, 19, 20, 21, 22, 23], "min_new_tokens": 6},
        {"max_new_tokens": 12, "eos_token_id": [17, 18, 19, 20, 21, 22, 23], "min_length": 36},
        {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": None},
        {"generation_config": GenerationConfig(max_new_tokens=9, eos_token_id=EOS, pad_token_id=0)},
        {},
    ],
    ids=str,
)
def test_left_padded_greedy_equals_generate(model: Any, plug: Any, arguments: dict[str, Any]) -> None:
    inputs = padded(PROMPTS)
    expected = model.generate(**inputs, do_sample=False, **arguments) if arguments else model.generate(**inputs)
    got = model.generate(**inputs, custom_generate=plug, **({"do_sample": False, **arguments} if arguments else {}))
    assert torch.equal(got, expected)
    assert (got.dtype, got.device) == (expected.dtype, expected.device)


def test_early_ends_are_exercised(model: Any, plug: Any) -> None:
    inputs = padded(PROMPTS)
    out = model.generate(
        **inputs,
        custom_generate=plug,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=list(range(3, 60)),
        pad_token_id=1,
    )
    new = out[:, inputs["input_ids"].shape[1] :]
    assert (new[:, -1] == 1).any(), "no row was filled with the pad token"
    assert len({int((row != 1).sum()) for row in new}) > 1, "all rows ended together"


def test_padding_is_left_out(model: Any, plug: Any) -> None:
    inputs = padded(PROMPTS)
    out = model.generate(**inputs, custom_generate=plug, max_new_tokens=8, do_sample=False, eos_token_id=None)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :width], inputs["input_ids"])
    for row, prompt in zip(out[:, width:].tolist(), PROMPTS, strict=True):
        assert row == greedy_alone(model, prompt, 8, eos_token_id=None, pad_token_id=0)


def test_direct_call_takes_the_same_arguments(model: Any, manager: Any) -> None:
    inputs = padded(PROMPTS)
    expected = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    assert torch.equal(
        hf_async_batching.generate(model, **inputs, max_new_tokens=7, do_sample=False, manager=manager), expected
    )
    assert torch.equal(
        hf_async_batching.generate(
            model,
            inputs=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=GenerationConfig(max_new_tokens=7, pad_token_id=0, eos_token_id=EOS),
            manager=manager,
        ),
        expected,
    )


def test_default_manager_is_shared_and_replaced_after_close(model: Any) -> None:
    ids = torch.tensor([PROMPTS[1]])
    out = model.generate(ids, max_new_tokens=3, do_sample=False, custom_generate=hf_async_batching.generate)
    shared = hf_async_batching.get_manager(model)
    assert shared.stats().steps > 0
    assert hf_async_batching.get_manager(model) is shared
    with pytest.raises(ValueError, match="another BatchingConfig"):
        hf_async_batching.generate(model, ids, max_new_tokens=3, batching_config=BatchingConfig(depth=3))
    shared.close()
    again = hf_async_batching.generate(model, ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, again)
    hf_async_batching.get_manager(model).close()


def test_return_dict(model: Any, plug: Any) -> None:
    inputs = padded(PROMPTS)
    arguments = {**inputs, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    expected, got = model.generate(**arguments), model.generate(**arguments, custom_generate=plug)
    assert isinstance(got, GenerateDecoderOnlyOutput)
    assert torch.equal(got.sequences, expected.sequences)


def test_num_return_sequences_and_seeds(model: Any, manager: Any) -> None:
    ids = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    arguments = {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 3, "eos_token_id": None}

    def draw(seed: Any) -> torch.Tensor:
        return model.generate(ids, custom_generate=manager.bind(seed=seed), **arguments)

    out = draw(5)
    assert out.shape == (6, ids.shape[1] + 10)
    assert torch.equal(out[:, : ids.shape[1]], ids.repeat_interleave(3, 0)), "prompt-major order"
    assert len({tuple(row) for row in out[:3].tolist()}) == 3, "sequences of one prompt must differ"
    assert torch.equal(out, draw(5))
    assert not torch.equal(out, draw(6))
    assert not torch.equal(draw(None), draw(None))
    direct = hf_async_batching.generate(model, ids, seed=5, manager=manager, **arguments)
    assert torch.equal(out, direct)
    with pytest.raises(ValueError, match="`seed` has 2 entries for 6"):
        draw([1, 2])


def test_seeded_row_does_not_depend_on_company(model: Any, manager: Any) -> None:
    prompt = PROMPTS[3]
    arguments = {"max_new_tokens": 12, "do_sample": True, "top_k": 40, "temperature": 1.3, "eos_token_id": None}
    alone = manager.submit(prompt, seed=11, **arguments).result().token_ids
    crowd = [manager.submit(other, seed=i, do_sample=i % 2 == 0, max_new_tokens=20) for i, other in enumerate(PROMPTS)]
    together = manager.submit(prompt, seed=11, **arguments).result().token_ids
    for handle in crowd:
        handle.result()
    assert together == alone


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_return_sequences": 3, "do_sample": True, "top_k": 1},
        {"attention_mask": torch.ones(3, 1, dtype=torch.long)},
        {"input_ids": torch.tensor([[5, 6, 7]]), "max_length": 5.5, "max_new_tokens": None},
        {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([[1, 0, 1, 1]])},
        {"input_ids": torch.tensor([[5, 6], [0, 6]]), "attention_mask": torch.tensor([[1.0, 1], [0, 1]])},
        {"input_ids": torch.tensor([[5, 6], [0, 6]])},
        {"input_ids": torch.tensor([[5, 6, 7]]), "eos_token_id": []},
        {"input_ids": torch.tensor([[5, 6, 7]]), "min_new_tokens": 9, "eos_token_id": [3, 13, 18]},
        {"inputs": torch.tensor([[5, 6, 7]])},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints:UserWarning")
def test_odd_inputs_are_taken_as_generate_takes_them(model: Any, manager: Any, arguments: dict[str, Any]) -> None:
    arguments = {"max_new_tokens": 4, "do_sample": False, **arguments}
    expected = model.generate(**arguments)
    assert torch.equal(model.generate(custom_generate=manager.bind(), **arguments), expected)
    assert torch.equal(hf_async_batching.generate(model, manager=manager, **arguments), expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"`input_ids` of shape \(1, 0\) is empty"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, r"`input_ids` of shape \(0, 3\) is empty"),
        (
            {"input_ids": torch.tensor([[5, 6, 7]]), "max_length": 3, "max_new_tokens": None},
            "`max_length` is set to 3",
        ),
        ({"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
    ],
    ids=["no tokens", "no rows", "max_length", "max_new_tokens"],
)
def test_prompts_that_cannot_be(model: Any, manager: Any, arguments: dict[str, Any], match: str) -> None:
    arguments = {"max_new_tokens": 4, **arguments}
    with pytest.raises(ValueError, match=match):
        model.generate(custom_generate=manager.bind(), **arguments)
    with pytest.raises(ValueError, match=match):
        hf_async_batching.generate(model, manager=manager, **arguments)


def test_max_length_counts_the_padding(model: Any, plug: Any) -> None:
    inputs = padded(PROMPTS)
    out = model.generate(**inputs, custom_generate=plug, max_length=36, do_sample=False, eos_token_id=None)
    assert out.shape == (5, 36)
    for row, prompt in zip(out[:, 30:].tolist(), PROMPTS, strict=True):
        assert row == greedy_alone(model, prompt, 6, eos_token_id=None, pad_token_id=0)


def test_the_global_random_state_is_not_touched(model: Any, plug: Any) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model.generate(torch.tensor([PROMPTS[1]]), custom_generate=plug, max_new_tokens=5, do_sample=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("way", ["argument", "wrapped", "bound", "direct", "folder"])
def test_streamer_gets_what_generate_gives(model: Any, manager: Any, way: str) -> None:
    ids = torch.tensor([PROMPTS[3]])
    arguments = {"max_new_tokens": 6, "do_sample": False}
    expected, got = Recorder(), Recorder()
    model.generate(ids, streamer=expected, **arguments)
    if way == "argument":
        model.generate(ids, streamer=got, custom_generate=manager.bind(), **arguments)
    elif way == "wrapped":
        plug = manager.bind()
        model.generate(ids, streamer=got, custom_generate=lambda *args, **kwargs: plug(*args, **kwargs), **arguments)
    elif way == "bound":
        model.generate(ids, custom_generate=manager.bind(streamer=got), **arguments)
    elif way == "direct":
        hf_async_batching.generate(model, ids, streamer=got, manager=manager, **arguments)
    else:
        model.generate(ids, streamer=got, custom_generate=str(ROOT), trust_remote_code=True, **arguments)
        hf_async_batching.get_manager(model).close()
    assert got.calls == expected.calls


def test_a_stuck_streamer_holds_up_nobody(model: Any, manager: Any) -> None:
    release, stuck = threading.Event(), threading.Event()
    threads_seen = set()

    class Stuck(Recorder):
        def put(self, value: torch.Tensor) -> None:
            threads_seen.add(threading.current_thread())
            super().put(value)
            if len(self.calls) == 2:  # the first new token
                stuck.set()
                assert release.wait(60)

    streamer = Stuck()
    caller = threading.Thread(
        target=lambda: model.generate(
            torch.tensor([PROMPTS[3]]),
            streamer=streamer,
            custom_generate=manager.bind(),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
        )
    )
    caller.start()
    assert stuck.wait(60)
    other = torch.tensor([PROMPTS[2]])
    got = model.generate(other, custom_generate=manager.bind(), max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert got[0, len(PROMPTS[2]) :].tolist() == greedy_alone(model, PROMPTS[2], 30, eos_token_id=None)
    assert len(streamer.calls) == 2
    release.set()
    caller.join(60)
    assert len(streamer.calls) == 1 + 6 + 1
    assert threads_seen == {caller}


def test_streamer_ends_also_on_failure(model: Any, manager: Any) -> None:
    recorder = Recorder()
    with pytest.raises(RequestTooLongError):
        model.generate(
            torch.tensor([PROMPTS[3]]), streamer=recorder, max_new_tokens=5000, custom_generate=manager.bind()
        )
    assert recorder.calls[-1] == "end"
    assert recorder.calls.count("end") == 1


def test_text_iterator_streamer_in_another_thread(model: Any, manager: Any) -> None:
    class Tokenizer:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(f"{token} " for token in tokens)

    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True, timeout=60)  # type: ignore[arg-type]
    ids = torch.tensor([PROMPTS[3]])
    thread = threading.Thread(
        target=lambda: model.generate(
            ids, streamer=streamer, custom_generate=manager.bind(), max_new_tokens=6, do_sample=False
        )
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert [int(token) for token in text.split()] == greedy_alone(model, PROMPTS[3], 6)


def test_a_streamer_for_one_prompt_says_so_itself(model: Any, plug: Any, manager: Any) -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    for call in (
        lambda streamer: model.generate(ids, streamer=streamer, custom_generate=plug, max_new_tokens=2),
        lambda streamer: hf_async_batching.generate(model, ids, streamer=streamer, manager=manager, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="only supports batch size 1"):
            call(TextIteratorStreamer(tiny_tokenizer(), timeout=60))


@pytest.mark.parametrize("way", ["argument", "bound", "direct", "folder"])
def test_async_text_streamer(model: Any, manager: Any, way: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([PROMPTS[3]])
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}

    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)

        def run() -> None:
            if way == "argument":
                model.generate(ids, streamer=streamer, custom_generate=manager.bind(), **arguments)
            elif way == "bound":
                model.generate(ids, custom_generate=manager.bind(streamer=streamer), **arguments)
            elif way == "direct":
                hf_async_batching.generate(model, ids, streamer=streamer, manager=manager, **arguments)
            else:
                model.generate(
                    ids,
                    streamer=streamer,
                    custom_generate=str(ROOT),
                    trust_remote_code=True,
                    manager=manager,
                    **arguments,
                )

        thread = threading.Thread(target=run)
        thread.start()
        text = "".join([piece async for piece in streamer])
        thread.join()
        return text

    assert asyncio.run(read()) == tokenizer.decode(greedy_alone(model, PROMPTS[3], 12, eos_token_id=None))


def test_custom_generate_folder_takes_what_a_callable_never_sees(model: Any, manager: Any) -> None:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([PROMPTS[3]])
    string = tokenizer.decode(greedy_alone(model, PROMPTS[3], 20, eos_token_id=None))[10:13]
    arguments: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    arguments |= {"stop_strings": [string], "tokenizer": tokenizer}
    expected, got = Recorder(), Recorder()
    want = model.generate(ids, streamer=expected, **arguments)
    out = model.generate(
        ids, streamer=got, custom_generate=str(ROOT), trust_remote_code=True, manager=manager, **arguments
    )
    assert torch.equal(out, want) and out.shape[1] < ids.shape[1] + 20
    assert got.calls == expected.calls


def test_custom_generate_folder(model: Any) -> None:
    inputs = padded(PROMPTS)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    got = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, custom_generate=str(ROOT), trust_remote_code=True
    )
    hf_async_batching.get_manager(model).close()
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"position_ids": torch.tensor([[4, 5, 6]])}, "position_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_served_is_refused_by_name(model: Any, plug: Any, arguments: dict[str, Any], name: str) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UnsupportedArgumentError, match=name):
        model.generate(ids, **arguments, max_new_tokens=3, custom_generate=plug)


def test_positions_that_differ_only_under_padding_are_taken(model: Any, plug: Any) -> None:
    inputs = padded(PROMPTS)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    out = model.generate(**inputs, position_ids=positions, max_new_tokens=4, do_sample=False, custom_generate=plug)
    assert torch.equal(out, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    shifted = positions + mask
    with pytest.raises(UnsupportedArgumentError, match="position_ids"):
        model.generate(**inputs, position_ids=shifted, max_new_tokens=4, custom_generate=plug)


def test_assistant_model_is_refused(model: Any, plug: Any) -> None:
    with pytest.raises(UnsupportedArgumentError, match="assistant_model"):
        model.generate(torch.tensor([[5, 6]]), assistant_model=model, max_new_tokens=3, custom_generate=plug)


def test_unknown_arguments_are_refused_by_transformers(model: Any, plug: Any) -> None:
    with pytest.raises(ValueError, match="no_such_argument"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, no_such_argument=1, custom_generate=plug)


def test_one_bad_row_fails_the_call_and_leaves_nothing_behind(model: Any, manager: Any) -> None:
    ids = torch.tensor([[5, 6, 7], [5, VOCAB, 7]])
    with pytest.raises(ValueError, match=f"token id {VOCAB}"):
        model.generate(ids, max_new_tokens=3, custom_generate=manager.bind())
    manager.submit([5], max_new_tokens=1).result()
    assert manager.stats().running == 0
