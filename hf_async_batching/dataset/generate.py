"""`generate_dataset`: check its arguments, and choose how to serve a dataset."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from transformers import GenerationConfig, PreTrainedModel

from hf_async_batching.config import BatchingConfig
from hf_async_batching.core.request import MAX_SEED
from hf_async_batching.dataset.build import make_requests, without_unused
from hf_async_batching.dataset.rows.output_columns import OutputColumns
from hf_async_batching.dataset.rows.prompts import PromptFunction
from hf_async_batching.dataset.rows.row import OnError
from hf_async_batching.dataset.rows.source import DatasetSource, PlainSource, StreamSource
from hf_async_batching.dataset.rows.tables import check_no_table, is_data_frame, rows_of_data_frame
from hf_async_batching.dataset.run.progress import DatasetProgress
from hf_async_batching.dataset.run.row_requests import check_names, split_arguments
from hf_async_batching.dataset.settings import DatasetSettings, row_parameter_columns
from hf_async_batching.dataset.store.ranks import Ranks, find_ranks
from hf_async_batching.dataset.to_folder import load_folder, through_folder
from hf_async_batching.dataset.to_memory import completed_dataset, completed_rows, completed_stream
from hf_async_batching.errors import ReentrantCallError, UnsupportedArgumentError
from hf_async_batching.inputs.generate_arguments import DatasetArguments
from hf_async_batching.manager import GenerationManager
from hf_async_batching.registry import get_manager


def generate_dataset(
    model: PreTrainedModel | GenerationManager,
    dataset: Any,
    tokenizer: Any = None,
    *,
    prompt: str | PromptFunction = "prompt",
    generation_config: GenerationConfig | None = None,
    row_parameters: Mapping[str, str] | list[str] | None = None,
    seed: int = 0,
    resume_dir: str | Path | None = None,
    on_error: OnError = "raise",
    logprobs: bool = False,
    chat: bool = False,
    system_prompt: str | None = None,
    tools: str | None = None,
    chat_template_arguments: Mapping[str, Any] | None = None,
    skip_special_tokens: bool = True,
    output_columns: Mapping[str, str | None] | None = None,
    progress: bool | None = None,
    callback: Callable[[DatasetProgress], object] | None = None,
    window: int = 8192,
    shard_rows: int | None = None,
    tokenize_threads: int | None = None,
    features: Any = None,
    rank: int | None = None,
    world_size: int | None = None,
    batching_config: BatchingConfig | None = None,
    **generate_arguments: Unpack[DatasetArguments],
) -> Any:
    """Complete every row of a dataset, and return it with the completions as new columns.

    >>> dataset = generate_dataset(model, dataset, tokenizer, prompt="question", max_new_tokens=40)  # doctest: +SKIP

    Args:
        model: A causal language model, or a manager that serves one.
        dataset: A `datasets` `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`, a pandas DataFrame,
            or any iterable of dictionaries or of prompts. If a dataset has a transform (`set_transform`), the
            transformed rows are served.
        tokenizer: The model's tokenizer; None if prompts are token ids, and then there is no text.
        prompt: A column, or a function of the row (a dictionary, as `dataset[i]` gives it; called in several threads
            at once). A text is tokenized, a list of messages goes through the chat template, a list of token ids is
            used directly.
        generation_config: As for `model.generate`, for all rows; None for the model's own.
        row_parameters: Generation parameters that differ between rows: `{"max_new_tokens": "budget"}` maps a parameter
            to a column; a list holds names that are both. Parameters are fields of `GenerationConfig`, "seed" and
            "stop". A row with None uses the value common to all rows.
        seed: Seed of the run. The seed of a request follows from it, the row's index and the completion's index. A
            seed in a row is used as `submit(seed=...)` would use it.
        resume_dir: A folder to which finished rows are written as they come. A run that ended early continues from
            there when it is called again with the same arguments, and ends with the same dataset.
        on_error: A row that cannot be served (None, an empty prompt, one that is too long, ...) raises
            `DatasetRowError`, or "record" keeps the error in a column and continues.
        logprobs: Also keep the log-probabilities of the chosen tokens.
        chat: Make a text the user's message of a chat.
        system_prompt: Begins every chat that has no system message; implies `chat`.
        tools: A column with the tools that a row's chat template is shown: a list of JSON schemas, or that list as
            JSON text; None in a row for no tools. Implies `chat`.
        chat_template_arguments: Arguments of the chat template, such as `{"enable_thinking": False}`.
        skip_special_tokens: Whether special tokens are left out of the text.
        output_columns: Names of the new columns in place of `text`: "completion", `token_ids`: "completion_ids",
            `finish_reason`, `prompt_tokens`, `completion_tokens`, `logprobs`: "completion_logprobs", `error`; None
            leaves one out. With several completions per row (`num_return_sequences`), all but `prompt_tokens` and
            `error` hold lists.
        progress: Whether to draw a bar; None for a bar if standard error is a terminal or this is a notebook, and
            otherwise a logged line each 30 seconds (INFO).
        callback: Gets a `DatasetProgress` about twice a second, in the calling thread.
        window: Number of rows that may be unfinished at once. It bounds memory; longest-first chooses among these
            rows.
        shard_rows: Rows per Parquet file in `resume_dir`; None to choose automatically.
        tokenize_threads: Threads that tokenize; at most four by default.
        features: Features of a stream whose first rows do not show them.
        rank: Number of this process among those that share the dataset, each with a copy of the model, all with one
            `resume_dir`. Found automatically under `accelerate launch` and `torchrun`.
        world_size: Number of these processes.
        batching_config: Settings of the model's shared manager, if this call makes it.
        generate_arguments: Fields of `GenerationConfig`, as for `model.generate`.

    Returns:
        The dataset with the new columns, in the same order and format: a `Dataset` for a `Dataset`, and so on; a
        list of dictionaries for a list. For streams without `resume_dir`, and for other iterables, a stream: its rows
        are completed while it is read. If transformers' tensor parallelism shards the model over ranks, all ranks must
        call this function; without `resume_dir`, ranks other than 0 get None.

    Raises:
        DatasetRowError: A row cannot be served, and `on_error` is "raise".
        ResumeMismatchError: `resume_dir` holds a run with other arguments or data; the message names each difference.
        ValueError: An argument is out of range, or a column does not exist.
        UnsupportedArgumentError: An argument is not served.
        OSError: `resume_dir` cannot be written. What was written before is kept.
        KeyboardInterrupt: The run was interrupted; finished rows have been written to `resume_dir`.
    """
    if on_error not in ("record", "raise"):
        raise ValueError(f"`on_error` must be 'record' or 'raise', got {on_error!r}")
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"`seed` must be in [0, 2**63), got {seed}")
    for name, value in (("window", window), ("shard_rows", shard_rows), ("tokenize_threads", tokenize_threads)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if tokenizer is None and (chat or system_prompt is not None or tools is not None):
        raise ValueError("`chat`, `system_prompt` and `tools` need a `tokenizer`")
    count, arguments = split_arguments(generation_config, generate_arguments)
    check_names(arguments, generation_config, inspect.signature(generate_dataset).parameters)
    with _managed(model, batching_config) as manager:
        if manager.is_here:
            raise ReentrantCallError(
                "generate_dataset was called in the engine's own thread (by a logits processor or a done-callback), "
                "where it would wait for itself: call it in another thread"
            )
        ranks = find_ranks(rank, world_size)
        if manager.spread:
            # All processes are ranks of one model, and together they serve all rows.
            ranks = Ranks()
        elif ranks.size > 1 and resume_dir is None:
            raise ValueError(
                f"{ranks.size} processes share this dataset (WORLD_SIZE): pass `resume_dir`, a folder that all of "
                "them can reach, to collect their rows; or pass world_size=1, rank=0 to complete all rows in each"
            )
        settings = DatasetSettings(
            manager=manager,
            tokenizer=tokenizer,
            prompt=prompt,
            generation_config=generation_config,
            arguments=arguments,
            row_parameters=row_parameter_columns(row_parameters),
            num_completions=count,
            seed=seed,
            logprobs=logprobs,
            chat=chat,
            system_prompt=system_prompt,
            tools=tools,
            chat_template_arguments=dict(chat_template_arguments or {}),
            skip_special_tokens=skip_special_tokens,
            columns=OutputColumns(output_columns, several=count > 1, text=tokenizer is not None, logprobs=logprobs),
            on_error=on_error,
            resume_dir=Path(resume_dir) if resume_dir is not None else None,
            shard_rows=shard_rows,
            ranks=ranks,
            features=features,
            window=window,
            tokenize_threads=tokenize_threads,
            progress=progress,
            callback=callback,
        )
        if not manager.leads:
            manager.follow()
            return _of_each_split(dataset, partial(_followed, settings))
        make_requests(settings, "").check()
        return _of_each_split(dataset, partial(_generate, settings))


@contextmanager
def _managed(model: Any, config: BatchingConfig | None) -> Iterator[GenerationManager]:
    if isinstance(model, GenerationManager):
        if config is not None and config != model.config:
            raise UnsupportedArgumentError(
                "`batching_config` has no effect on an existing manager; pass it to GenerationManager"
            )
        if model.spread:
            raise UnsupportedArgumentError(
                "pass a model that is spread over ranks to generate_dataset on every rank, not its manager"
            )
        yield model
    elif (getattr(model, "_tp_size", None) or 1) > 1:
        # The manager is closed at the end. Until then, the other ranks follow this one.
        with GenerationManager(model, config) as manager:
            yield manager
    else:
        yield get_manager(model, config)


def _of_each_split(dataset: Any, complete: Callable[[Any, str], Any]) -> Any:
    if _kind(dataset) in ("DatasetDict", "IterableDatasetDict"):
        return type(dataset)({name: complete(split, str(name)) for name, split in dataset.items()})
    return complete(dataset, "")


def _followed(settings: DatasetSettings, dataset: Any, split: str) -> Any:
    """Load what the leading rank has written; for the other ranks of a model that is spread over ranks."""
    kind = _kind(dataset)
    if settings.resume_dir is None or kind not in ("Dataset", "IterableDataset"):
        return None
    source = DatasetSource(dataset, []) if kind == "Dataset" else StreamSource(dataset, [], settings.features)
    return load_folder(settings, dataset, source, split, kind)


def _kind(dataset: Any) -> str:
    """Return the name of the dataset's class in `datasets`. Plain rows do not need that package."""
    names = ("DatasetDict", "IterableDatasetDict", "Dataset", "IterableDataset")
    for base in type(dataset).__mro__:
        if base.__name__ in names and base.__module__.partition(".")[0] == "datasets":
            return base.__name__
    return ""


def _generate(settings: DatasetSettings, dataset: Any, split: str) -> Any:
    kind = _kind(dataset)
    if is_data_frame(dataset):
        return _completed_data_frame(settings, dataset, split)
    check_no_table(dataset)
    source: DatasetSource | StreamSource | PlainSource
    if kind == "Dataset":
        source = DatasetSource(dataset, settings.needed_columns)
    elif kind == "IterableDataset":
        source = StreamSource(dataset, settings.needed_columns, settings.features)
    elif isinstance(dataset, Iterable) and not isinstance(dataset, (str, bytes, Mapping)):
        source = PlainSource(dataset, settings.prompt if isinstance(settings.prompt, str) else "prompt")
    else:
        raise ValueError(
            "`dataset` must be a dataset of `datasets`, a pandas DataFrame, or an iterable of dictionaries or "
            f"prompts, got {type(dataset).__name__}"
        )
    if source.column_names is not None:
        settings.check_columns(source.column_names)
    if kind == "Dataset":
        settings.columns.check(dataset.column_names)
    if isinstance(source, PlainSource):
        if settings.manager.spread and source.num_rows is None:
            raise ValueError("`dataset`: a model that is spread over ranks needs a list, or a `datasets` dataset")
        if settings.resume_dir is not None:
            raise ValueError("`resume_dir` needs a `datasets` dataset; for a list: datasets.Dataset.from_list(rows)")
        rows = completed_rows(settings, source, split)
        return list(rows) if source.num_rows is not None else rows
    if settings.resume_dir is not None:
        return through_folder(settings, dataset, source, split, kind)
    if isinstance(source, DatasetSource):
        return completed_dataset(settings, dataset, source, split)
    if settings.manager.spread:
        raise ValueError("a stream on a model that is spread over ranks needs `resume_dir`: all ranks read it there")
    return completed_stream(settings, dataset, source, split)


def _completed_data_frame(settings: DatasetSettings, frame: Any, split: str) -> Any:
    if settings.resume_dir is not None:
        raise ValueError("`resume_dir` needs a `datasets` dataset; for a DataFrame: datasets.Dataset.from_pandas(...)")
    source = PlainSource(rows_of_data_frame(frame))
    settings.check_columns(list(map(str, frame.columns)))
    rows = list(completed_rows(settings, source, split))
    added = without_unused(settings, dict.fromkeys(settings.columns.names.values()))
    return frame.assign(**{name: [row[name] for row in rows] for name in added})
