"""The option `--sampling`, such as `temperature=0.8,top_k=50`: requests then sample their tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_async_batching.bench.workloads import Workload
from hf_async_batching.core.logits_params import LogitsParams
from hf_async_batching.core.request import SamplingParams

_DRAWING = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "top_h": float,
    "typical_p": float,
    "epsilon_cutoff": float,
    "eta_cutoff": float,
    "seed": int,
}
_LOGITS = {"repetition_penalty": float, "no_repeat_ngram_size": int}


@dataclass(frozen=True, slots=True)
class SamplingOption:
    """How every request of a workload is sampled."""

    sampling: SamplingParams
    logits: LogitsParams

    @classmethod
    def parse(cls, text: str) -> SamplingOption:
        """Parse the option's text.

        Raises:
            ValueError: A name does not exist, or a value is out of range.
        """
        drawing: dict[str, float] = {}
        logits: dict[str, float] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            known = _DRAWING if name in _DRAWING else _LOGITS
            if not equals or name not in known:
                raise ValueError(f"{part!r} is not NAME=VALUE with one of {', '.join((*_DRAWING, *_LOGITS))}")
            (drawing if known is _DRAWING else logits)[name] = known[name](value)
        if not drawing and not logits:
            raise ValueError("the option is empty; write NAME=VALUE, such as temperature=0.8")
        return cls(
            SamplingParams(do_sample=bool(drawing), **drawing),  # type: ignore[arg-type]
            LogitsParams(**logits),  # type: ignore[arg-type]
        )

    def of(self, workload: Workload) -> Workload:
        """Apply this sampling to a workload. Each request has its own seed, which is the same in every run."""
        first = [
            replace(request, sampling=replace(self.sampling, seed=self.sampling.seed + index), logits=self.logits)
            for index, request in enumerate(workload.first)
        ]
        return replace(workload, first=tuple(first))
