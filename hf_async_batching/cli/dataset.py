"""Runs `hf-async-batching dataset`; its arguments are in `dataset_arguments`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from hf_async_batching.cli.arguments import CommandError
from hf_async_batching.cli.load_model import load_model, load_tokenizer
from hf_async_batching.config import BatchingConfig
from hf_async_batching.dataset.generate import generate_dataset
from hf_async_batching.dataset.input_files import InputError, input_problem, read_input
from hf_async_batching.dataset.output_files import OutputError, check_columns, check_output, write_output
from hf_async_batching.dataset.preview import preview
from hf_async_batching.dataset.store.ranks import find_ranks
from hf_async_batching.errors import HfAsyncBatchingError
from hf_async_batching.manager import GenerationManager


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit status.

    Raises:
        CommandError: An argument is wrong, or the input cannot be read.
    """
    # A cluster's scheduler sends SIGTERM before it takes the machine away. SIGTERM ends the run as Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _dataset(arguments)
    except (InputError, OutputError) as error:
        raise CommandError(str(error)) from error
    except CommandError:
        raise
    except Exception as error:
        # A bad file is noticed only here if it is a stream, or if its bytes are not text.
        late = isinstance(error, UnicodeDecodeError) or (
            arguments.streaming and not isinstance(error, HfAsyncBatchingError)
        )
        problem = input_problem(arguments.input) if late else None
        if problem is None and not isinstance(error, (HfAsyncBatchingError, ValueError, OSError)):
            raise
        print(f"hf-async-batching dataset: {problem or error}", file=sys.stderr)
        _say_how_to_go_on(arguments)
        return 1
    except KeyboardInterrupt:
        print("hf-async-batching dataset: interrupted", file=sys.stderr)
        _say_how_to_go_on(arguments)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _say_how_to_go_on(arguments: argparse.Namespace) -> None:
    if (_work_dir(arguments) / "manifest.json").exists():
        print(
            f"finished rows are in {_work_dir(arguments)}; the same command with --resume continues", file=sys.stderr
        )


def _work_dir(arguments: argparse.Namespace) -> Path:
    output: Path = arguments.output
    chosen: Path = arguments.work_dir or output.with_name(f"{output.name}.unfinished")
    return chosen


def _dataset(arguments: argparse.Namespace) -> int:
    if not sys.stderr.isatty():
        _draw_no_bars()
        _log_progress()
    # Errors that need no model are found first.
    work = _work_dir(arguments)
    ranks = find_ranks(None, None)
    check_output(arguments.output)
    # If several processes share the run, another one may have made the folder already.
    if work.exists() and not arguments.resume and ranks.size == 1:
        raise OutputError(f"{work} holds an earlier run: pass --resume to continue it, or delete it to start anew")
    if arguments.private and not arguments.push_to_hub:
        raise OutputError("--private needs --push-to-hub")
    dataset = read_input(
        arguments.input,
        config=arguments.config,
        split=arguments.split,
        limit=arguments.limit,
        streaming=arguments.streaming,
    )
    check_columns(arguments.output, dataset.features)
    prompt = _prompt_column(arguments, list(dataset.features or ()))
    model, tokenizer = _model(arguments)
    config = BatchingConfig(max_rows=arguments.max_rows)
    with GenerationManager(model, config) as manager:
        done = generate_dataset(
            manager,
            dataset,
            tokenizer,
            prompt=prompt,
            row_parameters=arguments.row_parameters,
            seed=arguments.seed,
            resume_dir=work,
            on_error=arguments.on_error,
            logprobs=arguments.logprobs,
            chat=arguments.chat,
            tools=arguments.tools_column,
            system_prompt=arguments.system_prompt,
            output_columns={"text": arguments.completion_column} if arguments.completion_column else None,
            window=arguments.window,
            **_generation(arguments),
        )
    if ranks.rank == 0:
        written = write_output(done, work, arguments.output, drop_errors=arguments.on_error == "raise")
        print(f"wrote {written.num_rows:,} rows to {arguments.output}", flush=True)
        print(preview(written.with_format(None), prompt, arguments.completion_column or "completion"), flush=True)
        if arguments.push_to_hub:
            written.push_to_hub(arguments.push_to_hub, private=arguments.private)
            print(f"uploaded the rows to {arguments.push_to_hub}", flush=True)
        if ranks.size == 1:
            shutil.rmtree(work)
        else:
            print(f"you can delete {work} when all processes have ended", flush=True)
    return 0


def _prompt_column(arguments: argparse.Namespace, names: list[str]) -> str:
    """Return the column of prompts. If the names of the input's columns are known, check all columns of the options.

    Raises:
        CommandError: A column does not exist; the message names it, and the columns that exist.
    """
    options = ("prompt_column", "messages_column", "token_ids_column")
    option = next((option for option in options if getattr(arguments, option) is not None), None)
    default = "text" if names == ["text"] else "prompt"
    prompt: str = default if option is None else getattr(arguments, option)
    wanted = {f"--{(option or options[0]).replace('_', '-')}": [prompt], "--row-parameters": arguments.row_parameters}
    wanted["--tools-column"] = [] if arguments.tools_column is None else [arguments.tools_column]
    for name, columns in wanted.items():
        for column in columns:
            if names and column not in names:
                raise CommandError(f"{name}: INPUT has no column {column!r}; it has {', '.join(map(repr, names))}")
    return prompt


def _draw_no_bars() -> None:
    """Turn off the progress bars of the libraries. Our own bar decides for itself."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with contextlib.suppress(ImportError):
        from datasets.utils import disable_progress_bars

        disable_progress_bars()


def _log_progress() -> None:
    """Print the lines that a run logs if it draws no bar."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("hf_async_batching.dataset.run.progress")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _generation(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "num_return_sequences", "do_sample", "temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.stop:
        given["stop_strings"] = arguments.stop
    return given


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    device = arguments.device
    if device is None:
        # Under `accelerate launch` and `torchrun` each process has its own GPU.
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"--device {device}: torch sees no CUDA GPU here; use --device cpu")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise CommandError(f"--device {device}: torch has no such device; use cuda, cuda:1 or cpu") from error
    trust = arguments.trust_remote_code
    model = load_model(arguments.model, dtype=arguments.dtype, trust_remote_code=trust)
    return model.to(device).eval(), load_tokenizer(arguments.model, trust_remote_code=trust)
