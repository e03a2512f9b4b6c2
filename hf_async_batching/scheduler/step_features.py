"""What the device must do for the sequences of a step, beyond arg-max."""

from __future__ import annotations

from functools import reduce
from operator import or_

from hf_async_batching.core.plan import Bounds, Features, Offer, Run
from hf_async_batching.core.request import Request
from hf_async_batching.scheduler.sequence import Sequence


def features_of(sampled: list[Sequence], prefilled: list[Sequence]) -> Features:
    """Features of a step that samples for some sequences and computes prompts of others."""
    candidates = {sequence.candidates for sequence in sampled if sequence.candidates is not None}
    needs = [sequence.needs for sequence in sampled if sequence.needs is not None]
    # Tokens that a row has seen are recorded from its first token on, also by steps that sample nothing for it.
    kept = needs + [sequence.needs for sequence in prefilled if sequence.needs is not None]
    return Features(
        sampling=bool(candidates),
        candidates=_largest(candidates),
        min_length=any([sequence.num_computed - len(sequence.draft) < sequence.min_length for sequence in sampled]),
        logprobs=any([sequence.logprobs for sequence in sampled]),
        top_k=_largest({need.top_k for need in needs}),
        seen=any([need.seen for need in kept]),
        penalty=any([need.penalty for need in needs]),
        stages=reduce(or_, [need.stages for need in needs], 0),
        memory=any([need.memory for need in kept]),
        offers=any([need.offers for need in needs]),
        scores=any([need.scores for need in needs]),
        logits=any([need.logits for need in needs]),
    )


def _largest(sizes: set[int]) -> int:
    """The largest of some sizes; 0 for none. A size of -1 means everything, so it is the largest."""
    return -1 if -1 in sizes else max(sizes, default=0)


def features_of_request(request: Request) -> Features:
    """Features of a decode step of one request."""
    sequence = Sequence(request, 0)
    sequence.num_computed = len(sequence.tokens)
    return features_of([sequence], [])


def rare_needs(sampled: list[Sequence]) -> tuple[tuple[Offer, ...], tuple[Run, ...], Bounds]:
    """Rare needs of a step besides its features. The sequences of the step are already planned."""
    offers: list[Offer] = []
    wanted: list[Run] = []
    history = rules = ngram = 0
    for index, sequence in enumerate(sampled):
        needs, request = sequence.needs, sequence.request
        if needs is None:
            continue
        if needs.scores or needs.logits:
            start = index
            names: tuple[str, ...] = (sequence.request_id,)
            if wanted and wanted[-1].stop == index:
                before = wanted.pop()
                start, names = before.start, before.request_ids + names
            wanted.append(Run(start, index + 1, names))
        if needs.offers:
            offers.append(Offer(index, sequence.request_id))
        elif needs.memory:
            history = max(history, len(request.padding) + sequence.num_computed)
            rules = max(rules, len(request.logits.rules))
            ngram = max(ngram, request.logits.ngram)
    return tuple(offers), tuple(wanted), Bounds(history, rules, ngram)
