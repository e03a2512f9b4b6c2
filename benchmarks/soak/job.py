"""A request or call of a soak: its random prompt, its model, and the check of its outcome."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.soak.subjects import Subject
from benchmarks.soak.tally import Tally
from hf_async_batching.bench.accuracy import teacher_forced
from hf_async_batching.core.request import Request

SECONDS = 180.0
"""Seconds after which a request that has not ended counts as stuck."""
EOS = 2

# A gap of scores up to this share of the largest score is rounding, because another batch sums in another order.
_TIE = {torch.float32: 2e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


class SoakJob:
    """The tools of a load.

    Args:
        subject: The model.
        rng: Makes the random choices.
        tally: Counts the outcomes.
        checks: Share of requests that are compared with plain `generate`.
        tokenizer: The model's tokenizer.

    Attributes:
        load: Name of the running load.
        checked: Whether the request is compared. The weights do not change meanwhile.
    """

    def __init__(self, subject: Subject, rng: random.Random, tally: Tally, checks: float, tokenizer: Any) -> None:
        self.subject = subject
        self.rng = rng
        self.tally = tally
        self.tokenizer = tokenizer
        self.load = ""
        self._checks = checks
        self.checked = False

    @contextmanager
    def maybe_checked(self) -> Iterator[bool]:
        """Decide whether the outcome is compared, and if so, keep the weights unchanged meanwhile."""
        if self.rng.random() >= self._checks:
            yield False
            return
        with self.subject.lock.steady():
            self.checked = True
            try:
                yield True
            finally:
                self.checked = False

    def prompt(self, longest: int = 70) -> list[int]:
        """Make a prompt of random tokens; every other prompt begins like many earlier ones."""
        length = self.rng.randint(1, longest)
        tokens = [self.rng.randrange(3, self.subject.vocab_size) for _ in range(length)]
        if self.rng.random() < 0.5:
            shared = random.Random(self.rng.randrange(4))
            tokens[: length - 1] = [shared.randrange(3, self.subject.vocab_size) for _ in range(length - 1)]
        return tokens

    def new_tokens(self, most: int = 48) -> int:
        """Choose the number of new tokens."""
        return self.rng.randint(1, most)

    def submit(self, prompt: Any, **arguments: Any) -> Any:
        """Submit a request to the present manager, and return its handle."""
        return self.subject.manager.submit(prompt, **arguments)

    def done(self, tokens: int) -> None:
        """Count a served request."""
        self.tally.add(self.load, "done", tokens)

    def wrong(self, detail: str) -> None:
        """Count a wrong result."""
        self.tally.add(self.load, "wrong", 0, f"{self.subject.name}: {detail}")

    def compare(self, prompt: list[int], got: list[int], **arguments: Any) -> None:
        """Compare a completion with plain `generate` on the prompt alone, and count the outcome.

        Args:
            prompt: Token ids.
            got: New tokens.
            arguments: Arguments of `generate`, without sampling.
        """
        plain = self.plain(prompt, **arguments)
        want = plain.sequences[0, len(prompt) :].tolist()
        self.tally.note("compared")
        at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        if at is None:
            if len(got) != len(want):
                self.wrong(f"{len(got)} tokens, not {len(want)}, for {arguments}, prompt {prompt}")
                return
        elif self.is_tie(plain.scores[at][0], want[at], got[at]):
            self.tally.note("ties")
        else:
            self.wrong(f"token {at} is {got[at]}, not {want[at]}, for {arguments}, prompt {prompt}")
            return
        self.done(len(got))

    def plain(self, prompt: list[int], **arguments: Any) -> Any:
        """Return the result of plain `generate` for a prompt alone, with scores."""
        ids = torch.tensor([prompt], device=self.subject.device)
        with self.subject.plain:
            return self.subject.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
                **{"eos_token_id": None, **arguments},
            )

    def is_tie(self, scores: torch.Tensor, one: int, other: int) -> bool:
        """Whether rounding decides between two tokens."""
        finite = scores[torch.isfinite(scores)].abs().max()
        gap = (scores[one] - scores[other]).abs()
        return bool(gap <= _TIE[self.subject.dtype] * finite)

    def compare_greedy(self, prompt: list[int], got: list[int], count: int) -> None:
        """Check and count a greedy completion: equal to `generate` in float32, else near the plain arg-max."""
        if self.subject.dtype == torch.float32:
            self.compare(prompt, got, max_new_tokens=count)
            return
        self.tally.note("compared")
        request = Request("soak", tuple(prompt), count)
        with self.subject.plain:
            accuracy = teacher_forced(self.subject.model, [request], {"soak": got})
        if accuracy.holds and len(got) == count:
            self.done(len(got))
        else:
            self.wrong(f"{len(got)} of {count} tokens: {accuracy}; prompt {prompt}")
