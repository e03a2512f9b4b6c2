"""What `model.generate` keeps from a callable is found again, or missed aloud."""

from __future__ import annotations

import inspect
import threading
from functools import wraps
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model
from transformers import GenerationMixin
from transformers.generation.streamers import BaseStreamer

from hf_async_batching.drop_in.caller_frame import CallerArguments, read_caller_frame
from hf_async_batching.errors import UnsupportedArgumentError


class Silent(BaseStreamer):
    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


IDS = torch.tensor([[5, 6, 7]])


def look(model: Any, *args: Any, plug: Any = None, **arguments: Any) -> CallerArguments:
    found: CallerArguments = model.generate(
        *args, custom_generate=plug or (lambda *_, **__: read_caller_frame()), **arguments
    )
    return found


def test_all_of_the_call_is_found(model: Any) -> None:
    streamer, tokenizer, assistant_tokenizer = Silent(), object(), object()
    found = look(
        model,
        IDS,
        streamer=streamer,
        tokenizer=tokenizer,
        assistant_tokenizer=assistant_tokenizer,
        assistant_model=model,
        synced_gpus=False,
        max_new_tokens=3,
    )
    assert found.streamer is streamer
    assert found.tokenizer is tokenizer
    assert found.assistant_tokenizer is assistant_tokenizer
    assert found.assistant_model is model
    assert found.synced_gpus is False
    assert found.original is not None
    assert found.original["inputs"] is IDS, "a positional argument, by its name"
    assert found.original["max_new_tokens"] == 3


def test_nothing_given_is_nothing_lost(model: Any) -> None:
    found = look(model, input_ids=IDS, max_new_tokens=3)
    assert (found.streamer, found.assistant_model, found.synced_gpus, found.tokenizer) == (None, None, None, None)


def test_the_nearest_call_counts(model: Any) -> None:
    inner, outer = Silent(), Silent()

    def within(*_: Any, **__: Any) -> Any:
        return look(model, input_ids=IDS, streamer=inner, max_new_tokens=3), read_caller_frame()

    first, second = model.generate(IDS, streamer=outer, custom_generate=within, max_new_tokens=3)
    assert first.streamer is inner
    assert second.streamer is outer


def test_wrappers_of_other_libraries_do_not_hide_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some replace `GenerationMixin.generate`, with and without saying what they wrap."""
    plain = GenerationMixin.generate
    streamer = Silent()

    @wraps(plain)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    def hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    # Without torch's wrapper the tokenizer is out of sight, and nothing else.
    bare = inspect.unwrap(plain)

    for replacement, sees_all in ((wrapped, True), (hidden, True), (bare, False)):
        monkeypatch.setattr(GenerationMixin, "generate", replacement)
        found = look(model, input_ids=IDS, streamer=streamer, tokenizer=model, max_new_tokens=3)
        assert found.streamer is streamer
        assert (found.tokenizer is model, found.original is not None) == (sees_all, sees_all)


def test_a_call_that_cannot_be_seen_is_an_error(model: Any) -> None:
    with pytest.raises(UnsupportedArgumentError, match=r"`streamer`, `tokenizer`.*would be lost"):
        read_caller_frame()
    errors: list[Any] = []

    def elsewhere(*_: Any, **__: Any) -> torch.Tensor:
        def run() -> None:
            try:
                read_caller_frame()
            except UnsupportedArgumentError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return IDS

    look(model, input_ids=IDS, plug=elsewhere, max_new_tokens=3)
    assert len(errors) == 1
