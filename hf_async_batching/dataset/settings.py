"""The checked arguments of `generate_dataset`, with their defaults filled in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from hf_async_batching.dataset.rows.output_columns import OutputColumns
from hf_async_batching.dataset.rows.prompts import PromptFunction
from hf_async_batching.dataset.rows.row import OnError
from hf_async_batching.dataset.run.progress import DatasetProgress
from hf_async_batching.dataset.store.fingerprint import (
    Fingerprint,
    fingerprint_of_config,
    fingerprint_of_function,
    fingerprint_of_model,
    fingerprint_of_tokenizer,
)
from hf_async_batching.dataset.store.ranks import Ranks
from hf_async_batching.inputs.generation_fields import INSTALLED
from hf_async_batching.manager import GenerationManager

_ALIASES = {"stop": "stop_strings"}


@dataclass(frozen=True, slots=True)
class DatasetSettings:
    """The checked arguments of one call; `generate_dataset` describes each of them."""

    manager: GenerationManager
    tokenizer: Any
    prompt: str | PromptFunction
    generation_config: GenerationConfig | None
    arguments: Mapping[str, Any]
    row_parameters: Mapping[str, str]
    num_completions: int
    seed: int
    logprobs: bool
    chat: bool
    system_prompt: str | None
    tools: str | None
    chat_template_arguments: Mapping[str, Any]
    skip_special_tokens: bool
    columns: OutputColumns
    on_error: OnError
    resume_dir: Path | None
    shard_rows: int | None
    ranks: Ranks
    features: Any
    window: int
    tokenize_threads: int | None
    progress: bool | None
    callback: Callable[[DatasetProgress], object] | None

    @property
    def needed_columns(self) -> list[str] | None:
        """Columns from which prompts and parameters are made; None for whole rows."""
        if not isinstance(self.prompt, str):
            return None
        columns = [self.prompt, *self.row_parameters.values(), *([] if self.tools is None else [self.tools])]
        return list(dict.fromkeys(columns))

    def folder(self, split: str) -> Path:
        """Return the folder to which a split's rows are written."""
        assert self.resume_dir is not None
        return self.resume_dir / split if split else self.resume_dir

    def check_columns(self, column_names: list[str]) -> None:
        """Refuse columns that do not exist, and names of new columns that exist.

        Raises:
            ValueError: A column is refused; the message names it.
        """
        wanted = [("prompt", self.prompt)] if isinstance(self.prompt, str) else []
        wanted += [("tools", self.tools)] if self.tools is not None else []
        wanted += [(f"row_parameters[{name!r}]", column) for name, column in self.row_parameters.items()]
        for argument, column in wanted:
            if column not in column_names:
                raise ValueError(
                    f"`{argument}`: the dataset has no column {column!r}; it has {', '.join(map(repr, column_names))}"
                )
        self.columns.check(column_names)

    def fingerprint(
        self, split: str, num_rows: int | None, transform: Callable[..., Any] | None = None
    ) -> Fingerprint:
        """Return the fingerprint of all settings that decide the outputs; `transform` is the dataset's own."""
        prompt = self.prompt if isinstance(self.prompt, str) else f"function {fingerprint_of_function(self.prompt)}"
        return {
            "model": fingerprint_of_model(self.manager.model),
            "tokenizer": fingerprint_of_tokenizer(self.tokenizer),
            "generation": fingerprint_of_config(self.manager.model, self.generation_config, self.arguments),
            "prompt": prompt,
            "row_parameters": dict(self.row_parameters),
            "num_return_sequences": self.num_completions,
            "seed": self.seed,
            "logprobs": self.logprobs,
            "chat": self.chat,
            "system_prompt": self.system_prompt,
            "chat_template_arguments": {k: repr(v) for k, v in self.chat_template_arguments.items()},
            "skip_special_tokens": self.skip_special_tokens,
            "output_columns": dict(self.columns.names),
            "split": split,
            "rows": num_rows,
            **({} if self.tools is None else {"tools": self.tools}),
            **({} if transform is None else {"transform": fingerprint_of_function(transform)}),
        }


def row_parameter_columns(given: Mapping[str, str] | list[str] | None) -> dict[str, str]:
    """Map generation parameters to columns, from a mapping, or from a list of names that are both.

    Raises:
        ValueError: Rows cannot have such a parameter.
    """
    mapping = dict(given) if isinstance(given, Mapping) else {name: name for name in given or ()}
    columns = {_ALIASES.get(name, name): column for name, column in mapping.items()}
    for name in columns:
        if name == "num_return_sequences":
            raise ValueError(
                "`row_parameters`: `num_return_sequences` is the same for all rows; pass it as an argument"
            )
        if name != "seed" and name not in INSTALLED:
            raise ValueError(
                f"`row_parameters`: GenerationConfig has no {name!r}; rows can have its fields, 'seed' and 'stop'"
            )
    return columns
