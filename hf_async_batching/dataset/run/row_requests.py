"""From prepared rows to requests: the common generation config, what a row changes in it, and its seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig

from hf_async_batching.core.request import MAX_SEED, Request
from hf_async_batching.core.suggestions import did_you_mean
from hf_async_batching.dataset.rows.row import PreparedRow
from hf_async_batching.dataset.run.ordering import RowJob
from hf_async_batching.errors import UnsupportedArgumentError
from hf_async_batching.inputs.generate_arguments import RequestArguments
from hf_async_batching.inputs.generation_fields import INSTALLED
from hf_async_batching.inputs.input_processor import known_arguments
from hf_async_batching.inputs.request_builder import new_request_id, seeds_of_rows
from hf_async_batching.manager import GenerationManager

_MAX_TEMPLATES = 4096

# Fields of which nothing in a request follows from the prompt itself, other than from its length.
_PROMPTLESS = {
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_return_sequences",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
    "transformers_version",
    "_from_model_config",
}
# Fields that `GenerationManager.submit` looks after, beside the engine.
_BESIDE = {"stop_strings", "max_time"}


class RowRequests:
    """Makes the requests of rows.

    Args:
        manager: The manager that will serve the requests.
        generation_config: Common to all rows; the model's own where None.
        arguments: Fields of `GenerationConfig` over it, common to all rows.
        num_completions: Requests per row.
        seed: Seed of the whole run: with the row's index and the completion's it decides each request's own.
        tokenizer: The model's tokenizer, which stop strings need.
        scope: What tells this run's rows from others with the same indices: the name of a split.
        logprobs: Whether log-probabilities are wanted.
    """

    def __init__(
        self,
        manager: GenerationManager,
        generation_config: GenerationConfig | None,
        arguments: Mapping[str, Any],
        *,
        tokenizer: Any = None,
        num_completions: int = 1,
        seed: int = 0,
        scope: str = "",
        logprobs: bool = False,
    ) -> None:
        self._manager = manager
        self._generation_config = generation_config
        self._arguments = {**arguments, "num_return_sequences": 1}
        self._tokenizer = tokenizer
        self._num_completions = num_completions
        self._seed = seed
        self._scope = scope
        self._logprobs = logprobs
        self._templates: dict[str, Request] = {}
        config = generation_config if generation_config is not None else manager.model.generation_config
        self._common = {**config.to_diff_dict(), **arguments}
        self._given = {name for name, value in self._common.items() if value is not None}

    def check(self) -> None:
        """Refuse common arguments that no row could be served with.

        Raises:
            ValueError: An argument is out of range.
            UnsupportedArgumentError: An argument that is not served.
            TypeError: An argument that `GenerationConfig` does not have.
        """
        if "stop_strings" in self._given and self._tokenizer is None:
            raise ValueError("`stop_strings` need a `tokenizer`")
        # Lengths that a prompt's own length decides are each row's.
        request = self._make([0], {"max_new_tokens": 1, "min_new_tokens": 0, "min_length": 0})
        if self._num_completions > 1 and not request.sampling.do_sample:
            raise ValueError(
                f"`num_return_sequences={self._num_completions}` without sampling would give equal completions; "
                "pass do_sample=True"
            )

    def jobs(self, row: PreparedRow) -> list[RowJob]:
        """The completions of a row.

        Raises:
            Exception: What is wrong with the row's parameters, as `GenerationManager.submit` says it.
        """
        template = self._template(row)
        seed = row_seed(self._seed, self._scope, row.index) if row.seed is None else row.seed
        arguments = None
        if _BESIDE & (self._given | row.parameters.keys()):
            arguments = {**self._arguments, **row.parameters, "generation_config": self._generation_config}
            arguments |= {"tokenizer": self._tokenizer, "logprobs": self._logprobs}
        prompt, jobs = tuple(row.prompt), []
        for completion, own in enumerate(seeds_of_rows(seed, self._num_completions)):
            sampling = template.sampling
            if sampling.do_sample:
                sampling = replace(sampling, seed=own)
            request = replace(template, request_id=new_request_id(), prompt=prompt, sampling=sampling)
            jobs.append(RowJob(row, completion, request, None if arguments is None else {**arguments, "seed": own}))
        return jobs

    @staticmethod
    def again(request: Request) -> Request:
        """The same request under another id."""
        return replace(request, request_id=new_request_id())

    def _template(self, row: PreparedRow) -> Request:
        """A request whose prompt and seed need not be this row's: preparing a config costs more than all the rest."""
        if (self._given | row.parameters.keys()) - _PROMPTLESS:
            return self._make(row.prompt, row.parameters)
        fields = {**self._common, **row.parameters}
        by_length = fields.get("max_new_tokens") is None or fields.get("min_length")
        key = f"{len(row.prompt) if by_length else ''} {sorted(row.parameters.items())!r}"
        template = self._templates.get(key)
        if template is None:
            template = self._make(row.prompt, row.parameters)
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            self._templates[key] = template
        return template

    def _make(self, prompt: Any, parameters: Mapping[str, Any]) -> Request:
        without = dict.fromkeys(_BESIDE & (self._given | parameters.keys()))
        return self._manager.make_request(
            list(prompt),
            self._generation_config,
            seed=0,
            logprobs=self._logprobs,
            **{**self._arguments, **parameters, **without},
        )


def row_seed(seed: int, scope: str, index: int) -> int:
    """The seed of a row: a function of the run's seed, the split and the row's index, and of nothing else."""
    digest = hashlib.blake2b(f"{seed} {index} {scope}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % MAX_SEED


def split_arguments(
    generation_config: GenerationConfig | None, arguments: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Completions per row, and the arguments without their number.

    Raises:
        UnsupportedArgumentError: An argument that a batch over a dataset gives in another way.
    """
    rest = dict(arguments)
    for name, remedy in (("streamer", "use `callback`"), ("input_ids", "name the column with `prompt`")):
        if rest.pop(name, None) is not None:
            raise UnsupportedArgumentError(f"`{name}` does not belong to generate_dataset; {remedy}")
    count = rest.pop("num_return_sequences", None)
    if count is None and generation_config is not None:
        count = generation_config.num_return_sequences
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ValueError(f"`num_return_sequences` must be an integer of at least 1, got {count!r}")
    return count or 1, rest


def check_names(arguments: Iterable[str], config: GenerationConfig | None, own: Iterable[str]) -> None:
    """Refuse arguments that neither `submit` nor a generation config has.

    Args:
        arguments: Their names.
        config: May have fields of its own.
        own: The names that `generate_dataset` itself has.

    Raises:
        TypeError: Names them, and what was probably meant.
    """
    fields = {*INSTALLED, *(vars(config) if config is not None else ())}
    unknown = sorted(set(arguments) - fields - set(known_arguments()))
    if unknown:
        raise TypeError(
            f"generate_dataset() got arguments that neither it nor GenerationConfig has: {unknown}"
            + did_you_mean(unknown, [*RequestArguments.__annotations__, *own])
        )
