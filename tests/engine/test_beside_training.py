"""The user's own thread trains the model and calls plain `generate` on it while the engine serves 32 requests.

What is right while weights change? A request that lives between two optimizer steps, from its submission to its end,
must give what the weights of that time give: the same as plain `generate` on a copy of them. A request that lives
across a step has keys and values of both, and there is no output to compare with, unless the step leaves the weights
as they were, bit by bit; so one run has a learning rate of 0, and there every output must be right.
"""

from __future__ import annotations

import copy
import itertools
import threading
import time
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, greedy_alone, ragged_prompts, tiny_model

from hf_async_batching import BatchingConfig, GenerationHandle, GenerationManager

ROWS, CALLS, STEPS = 32, 40, 10
PROMPTS = ragged_prompts(6, 24, seed=4)
PREFIX = list(range(40, 72))  # two full pages, so that the prefix cache has something to keep too long
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


class Company:
    """Keeps `ROWS` requests in the engine; notes at which versions of the weights each began and ended.

    A version is even between two optimizer steps, odd during one.
    """

    def __init__(self, manager: GenerationManager, lengths: list[int]) -> None:
        self.version = 0
        self.ended: list[tuple[list[int], list[int], int, int]] = []
        self._manager, self._lengths = manager, lengths
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Company:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)
        assert self._error is None

    def wait_until_full(self) -> None:
        """Until many of the requests are in the engine; many end at the same time, and others take their places."""
        deadline = time.monotonic() + 200
        while self._manager.stats().rows_in_use < ROWS // 2:
            assert time.monotonic() < deadline, "there is no company"
            time.sleep(0.001)

    def wait_for_one_within(self) -> None:
        """Until a request has lived at the version of now alone."""
        deadline = time.monotonic() + 200
        while not any(b == e == self.version and len(tokens) <= 8 for _, tokens, b, e in list(self.ended)):
            assert time.monotonic() < deadline, "no request has ended"
            time.sleep(0.005)

    def _run(self) -> None:
        live: list[tuple[list[int], GenerationHandle, int]] = []
        numbers = itertools.count()
        try:
            while not self._stop.is_set() or live:
                for one in [one for one in live if one[1].done]:
                    live.remove(one)
                    self.ended.append((one[0], one[1].result().token_ids, one[2], self.version))
                while len(live) < ROWS and not self._stop.is_set():
                    number = next(numbers)
                    prompt, count = PREFIX + PROMPTS[number % 6], self._lengths[number % len(self._lengths)]
                    began = self.version
                    live.append((prompt, self._manager.submit(prompt, max_new_tokens=count, **GREEDY), began))
                time.sleep(0.002)
        except BaseException as error:
            self._error = error


def train_step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model.train()
    ids = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("lr", [0.0, 3e-3], ids=["weights stay", "weights change"])
def test_training_and_plain_generate_beside_32_requests(lr: float) -> None:
    model = tiny_model("Llama", attention_dropout=0.2)
    before = (copy.deepcopy(model.config.to_dict()), model.generation_config.to_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    versions = {0: copy.deepcopy(model)}
    called: list[tuple[list[int], torch.Tensor, int]] = []
    config = BatchingConfig(page_size=16, max_batch_tokens=128, max_rows=ROWS)
    with GenerationManager(model, config) as manager:
        manager.submit(PREFIX, max_new_tokens=1, **GREEDY).result(60)
        with Company(manager, [3, 5, 8, 60] if lr else [40, 150]) as company:
            for number in range(CALLS):
                prompt = PREFIX + PROMPTS[number % len(PROMPTS)]
                out = model.generate(torch.tensor([prompt]), max_new_tokens=6, **GREEDY, pad_token_id=0)
                called.append((prompt, out, company.version))
                if number % (CALLS // STEPS) == 0:
                    company.wait_until_full()
                    company.version += 1
                    train_step(model, optimizer, number)
                    versions[company.version + 1] = copy.deepcopy(model)
                    company.version += 1
                    if lr:
                        company.wait_for_one_within()
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    assert len(versions) == STEPS + 1

    expected: dict[Any, list[int]] = {}

    def right(prompt: list[int], count: int, version: int) -> list[int]:
        key = (tuple(prompt), 0 if lr == 0 else version)
        if len(expected.get(key, ())) < count:
            expected[key] = greedy_alone(versions[key[1]], prompt, 150 if lr == 0 else 8, eos_token_id=None)
        return expected[key][:count]

    for prompt, out, version in called:
        assert out[0, len(prompt) :].tolist() == right(prompt, 6, version), f"plain generate at version {version}"
    compared = set()
    for prompt, tokens, began, ended in company.ended:
        assert len(tokens) in (3, 5, 8, 40, 60, 150) and all(0 <= token < VOCAB for token in tokens)
        if lr == 0 or (began == ended and began % 2 == 0 and len(tokens) <= 8):
            assert tokens == right(prompt, len(tokens), began), f"request at version {began}"
            compared.add(began)
    assert lr == 0 or set(versions) - compared <= {0}, "a version at which no request was compared"
    if lr:
        different = {tuple(right(PREFIX + PROMPTS[0], 6, version)) for version in versions}
        assert len(different) > STEPS // 2, "the weights hardly changed: nothing could have gone wrong"
