"""Turns prepared rows into requests, from the common generation config, the row's changes, and the row's seeds."""

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

# Fields that read nothing of a prompt but its length. Rows with only these fields can share a template.
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
# Fields that `GenerationManager.submit` handles outside of the engine.
_BESIDE = {"stop_strings", "max_time"}


class RowRequests:
    """Makes the requests of rows.

    Args:
        manager: The manager that will serve the requests.
        generation_config: The generation config of all rows; None for the model's own.
        arguments: Fields of `GenerationConfig` that replace the config's, for all rows.
        num_completions: Number of requests per row.
        seed: Seed of the run. A request's seed follows from it, the row's index and the completion's index.
        tokenizer: The model's tokenizer, which stop strings need.
        scope: Name of the split. Rows of two splits with the same index get different seeds.
        logprobs: Whether completions have log-probabilities.
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
        """Refuse common arguments with which no row can be served.

        Raises:
            ValueError: An argument is out of range.
            UnsupportedArgumentError: An argument is not served.
            TypeError: `GenerationConfig` does not have an argument.
        """
        if "stop_strings" in self._given and self._tokenizer is None:
            raise ValueError("`stop_strings` need a `tokenizer`")
        # Limits that depend on a prompt's length are checked for each row.
        request = self._make([0], {"max_new_tokens": 1, "min_new_tokens": 0, "min_length": 0})
        if self._num_completions > 1 and not request.sampling.do_sample:
            raise ValueError(
                f"`num_return_sequences={self._num_completions}` without sampling would give equal completions; "
                "pass do_sample=True"
            )

    def jobs(self, row: PreparedRow) -> list[RowJob]:
        """Make the completions of a row.

        Raises:
            Exception: The row's parameters are wrong; the error is that of `GenerationManager.submit`.
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
        """Copy a request, with another id."""
        return replace(request, request_id=new_request_id())

    def _template(self, row: PreparedRow) -> Request:
        """Return a request that fits the row except for prompt and seed. Preparing a config is slow."""
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
    """Return the seed of a row. It depends only on the run's seed, the split and the row's index."""
    digest = hashlib.blake2b(f"{seed} {index} {scope}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % MAX_SEED


def split_arguments(
    generation_config: GenerationConfig | None, arguments: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Return the number of completions per row, and the arguments without that number.

    Raises:
        UnsupportedArgumentError: `generate_dataset` has another argument for this purpose.
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
        arguments: Names of the arguments.
        config: A generation config, which may have more fields.
        own: Names of `generate_dataset`'s own parameters.

    Raises:
        TypeError: Some arguments are unknown; the message names them, and the probable names.
    """
    fields = {*INSTALLED, *(vars(config) if config is not None else ())}
    unknown = sorted(set(arguments) - fields - set(known_arguments()))
    if unknown:
        raise TypeError(
            f"generate_dataset() got arguments that neither it nor GenerationConfig has: {unknown}"
            + did_you_mean(unknown, [*RequestArguments.__annotations__, *own])
        )
