"""The main job on a real chat model: 64 threads call `model.generate` at once, token for token as alone."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from support.smollm2 import chat_token_ids, load_smollm2
from transformers import AutoTokenizer, TextIteratorStreamer
from transformers.generation import StopStringCriteria

import hf_async_batching
from demo.serving.embedded_model import embedded_model_dir
from hf_async_batching import BatchingConfig, GenerationManager

CONFIGS = [(1, 256), (2, 16), (3, 16), (1, 16), (2, 256), (3, 256)]
ALONE = range(0, 64, 8)  # the prompts that plain `generate` completes in every run of the tests: it is slow
WHOLE = {43, 63}  # long prompts that stay whole: one that grows past a page of 256, and the longest


@pytest.fixture(scope="module")
def smollm2() -> Any:
    model, tokenizer = load_smollm2()
    # The middle of most long prompts is left out, for speed: what they begin with is shared, and they stay different.
    prompts = chat_token_ids(tokenizer)
    prompts = [prompt if i in WHOLE else prompt[:17] + prompt[17:][-9 - i % 8 :] for i, prompt in enumerate(prompts)]
    return model, prompts, [4 + 6 * i % 7 for i in range(len(prompts))]


@pytest.fixture(scope="module")
def expected(smollm2: Any) -> dict[int, torch.Tensor]:
    """What plain `generate` gives for some prompts, each alone."""
    model, prompts, new_tokens = smollm2
    return {i: alone(model, prompts[i], new_tokens[i]) for i in ALONE}


@pytest.fixture(scope="module")
def outputs() -> dict[tuple[int, int], list[torch.Tensor]]:
    """What the engine gave per configuration, so that the configurations can be compared."""
    return {}


def alone(model: Any, prompt: list[int], new_tokens: int) -> torch.Tensor:
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)


def argmax_after(model: Any, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The arg-max of the model's plain forward after each token; up to 16 rows of about one length in a forward."""
    found: dict[int, torch.Tensor] = {}
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    short, long = by_length[: -len(WHOLE)], by_length[-len(WHOLE) :]
    for batch in [*(short[i : i + 16] for i in range(0, len(short), 16)), *([i] for i in long)]:
        ids = torch.nn.utils.rnn.pad_sequence([rows[i] for i in batch], batch_first=True)
        with torch.no_grad():
            chosen = model(ids).logits.argmax(-1)  # what is padded stands behind, where no token sees it
        found.update((i, line[: len(rows[i])]) for i, line in zip(batch, chosen, strict=True))
    return [found[i] for i in range(len(rows))]


def call_from_64_threads(smollm2: Any, depth: int, page_size: int) -> list[torch.Tensor]:
    model, prompts, new_tokens = smollm2
    got: list[Any] = [None] * len(prompts)
    barrier = threading.Barrier(len(prompts))

    def call(i: int) -> None:
        ids = torch.tensor([prompts[i]])
        barrier.wait()
        try:
            got[i] = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens[i],
                do_sample=False,
                custom_generate=manager.bind(),
            )
        except BaseException as error:
            got[i] = error

    # What the check at the start would compare is what the tests compare.
    config = BatchingConfig(depth=depth, page_size=page_size, attach_check=False)
    with GenerationManager(model, config) as manager:
        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Behind the last end a step may still run whose rows have all ended.
        deadline = time.monotonic() + 60
        while manager.stats().rows_in_use or manager.stats().pages_in_use:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    errors = [out for out in got if isinstance(out, BaseException)]
    assert errors == []
    return got


def test_the_prompts_are_what_they_should_be(smollm2: Any) -> None:
    _, prompts, new_tokens = smollm2
    lengths = [len(prompt) for prompt in prompts]
    assert len({tuple(prompt) for prompt in prompts}) == 64
    assert min(lengths) == 1
    assert 600 < max(lengths) <= 700
    assert any(length <= 256 < length + count - 1 for length, count in zip(lengths, new_tokens, strict=True))


@pytest.mark.parametrize(("depth", "page_size"), CONFIGS[:2])
def test_64_threads(smollm2: Any, outputs: Any, depth: int, page_size: int) -> None:
    """Every token is the arg-max of the model's plain forward, and every configuration gives the same tokens."""
    model, prompts, new_tokens = smollm2
    got = outputs[depth, page_size] = call_from_64_threads(smollm2, depth, page_size)
    first = next(iter(outputs.values()))
    assert [i for i, (a, b) in enumerate(zip(got, first, strict=True)) if not torch.equal(a, b)] == []
    if got is not first:
        return
    eos = model.generation_config.eos_token_id
    chosen = argmax_after(model, [out[0] for out in got])
    for prompt, count, out, following in zip(prompts, new_tokens, got, chosen, strict=True):
        new = out[0, len(prompt) :].tolist()
        assert new == following[len(prompt) - 1 : -1].tolist()
        assert len(new) == count or (new[-1] == eos and eos not in new[:-1])
    assert len({token for out in got for token in out[0, -4:].tolist()}) > 60


def test_equal_to_generate_alone(smollm2: Any, outputs: Any, expected: dict[int, torch.Tensor]) -> None:
    got = next(iter(outputs.values()), None) or call_from_64_threads(smollm2, 2, 16)
    assert [i for i in ALONE if not torch.equal(got[i], expected[i])] == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_configuration_equal_to_generate_alone(smollm2: Any) -> None:
    model, prompts, new_tokens = smollm2
    expected = [alone(model, prompt, count) for prompt, count in zip(prompts, new_tokens, strict=True)]
    for depth, page_size in CONFIGS:
        got = call_from_64_threads(smollm2, depth, page_size)
        assert [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if not torch.equal(a, b)] == []


def test_threads_meet_in_the_shared_manager(smollm2: Any, expected: dict[int, torch.Tensor]) -> None:
    model, prompts, new_tokens = smollm2
    got: dict[int, Any] = {}

    def call(i: int) -> None:
        got[i] = hf_async_batching.generate(
            model, torch.tensor([prompts[i]]), max_new_tokens=new_tokens[i], do_sample=False
        )

    threads = [threading.Thread(target=call, args=(i,)) for i in ALONE]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manager = hf_async_batching.get_manager(model)
    rows = max(step.decode_rows for step in manager.timeline().steps)
    manager.close()
    assert [i for i in ALONE if not torch.equal(got[i], expected[i])] == []
    assert rows > 1, "the threads never shared a step"


def test_stop_strings_and_streams_of_real_text(smollm2: Any) -> None:
    """Strings that begin and end within tokens; each row stops at its own, and the text is streamed up to there."""
    model, prompts, _ = smollm2
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    tokenizer.padding_side = "left"
    chosen = [prompt for prompt in prompts if 20 < len(prompt) < 60][:3]
    inputs = tokenizer.pad({"input_ids": chosen}, return_tensors="pt")
    arguments = {**inputs, "max_new_tokens": 16, "do_sample": False}
    free = model.generate(**arguments)[:, inputs["input_ids"].shape[1] :]
    made = tokenizer.batch_decode(free, skip_special_tokens=True)
    strings = [text[len(text) // 2 :][:6] for text in made]
    assert all(strings)
    arguments |= {"stop_strings": strings, "tokenizer": tokenizer}
    expected = model.generate(**arguments)
    criterion = StopStringCriteria(tokenizer, strings)
    stopped = [
        any(criterion(row[None, :end], None)[0] for end in range(inputs["input_ids"].shape[1] + 1, len(row) + 1))
        for row in expected
    ]
    assert sum(stopped) >= 2, "nothing to see"
    with GenerationManager(model, BatchingConfig(attach_check=False)) as manager:
        assert torch.equal(model.generate(custom_generate=manager.bind(), **arguments), expected)
        handles = [
            manager.submit(
                prompt, max_new_tokens=16, do_sample=False, stop_strings=[string], tokenizer=tokenizer, max_time=600
            )
            for prompt, string in zip(chosen[:2], strings[:2], strict=True)
        ]
        for prompt, string, handle in zip(chosen[:2], strings[:2], handles, strict=True):
            ids = torch.tensor([prompt])
            one = {"max_new_tokens": 16, "do_sample": False, "stop_strings": [string], "tokenizer": tokenizer}
            one["attention_mask"] = torch.ones_like(ids)
            plain = model.generate(ids, **one)[0, len(prompt) :]
            assert handle.result(300).token_ids == plain.tolist()
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            hf_async_batching.generate(model, ids, streamer=streamer, manager=manager, **one)
            assert "".join(streamer) == tokenizer.decode(plain, skip_special_tokens=True)
