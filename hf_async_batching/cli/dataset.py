"""`hf-async-batching dataset`: its arguments, and the order of things."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_async_batching.cli.arguments import command_parser, count
from hf_async_batching.config import BatchingConfig
from hf_async_batching.dataset.generate import generate_dataset
from hf_async_batching.dataset.input_files import InputError, input_problem, read_input
from hf_async_batching.dataset.output_files import OutputError, check_columns, check_output, write_output
from hf_async_batching.dataset.store.ranks import find_ranks
from hf_async_batching.errors import HfAsyncBatchingError
from hf_async_batching.manager import GenerationManager

SUMMARY = "complete every row of a dataset, and lose nothing"

_EXAMPLES = """\
examples:
  every question of a CSV file, as a chat; a folder of Parquet files that load_dataset("answers") reads:
    hf-async-batching dataset questions.csv --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --prompt-column question --chat --max-new-tokens 200 --output answers

  it was interrupted, killed, or the disk was full: the same again, and
    ... --resume

  a split of a dataset on the Hub whose column holds messages; the first 1,000 rows; one JSONL file:
    hf-async-batching dataset HuggingFaceH4/ultrachat_200k --split test_sft --limit 1000 \\
        --model Qwen/Qwen3-0.6B --messages-column messages --output out.jsonl

  four sampled answers for each prompt, with their log-probabilities, to the Hub:
    hf-async-batching dataset prompts.jsonl --model M --num-return-sequences 4 --do-sample \\
        --temperature 0.8 --seed 1 --logprobs --output samples --push-to-hub me/samples --private

  rows that say themselves how long and how warm: columns max_new_tokens and temperature:
    hf-async-batching dataset rows.parquet --model M --row-parameters max_new_tokens temperature \\
        --output out.parquet

  rows that cannot be served (None, empty, too long) get an error in a column instead of ending the run:
    hf-async-batching dataset rows.jsonl --model M --output out --on-error record

  a dataset that does not fit the disk, read as a stream:
    hf-async-batching dataset HuggingFaceFW/fineweb --split train --streaming --limit 100000 \\
        --prompt-column text --model M --max-new-tokens 32 --output summaries

  two GPUs, each with a copy of the model and its share of the rows:
    accelerate launch --num_processes 2 --module hf_async_batching dataset rows.jsonl --model M --output out

INPUT is a CSV, TSV, JSON, JSONL, text or Parquet file (or several, with a pattern in quotes: 'part-*.jsonl'; all but
Parquet also with .gz), a folder that `load_dataset` or `save_to_disk` knows, or a dataset's name on the Hub. OUT is a
folder, or a .parquet, .jsonl, .csv or .tsv file (all but .parquet also with .gz); in CSV lists are JSON. The new
columns are completion, completion_ids, finish_reason, prompt_tokens, completion_tokens, and completion_logprobs
and error where they are asked for. While it runs, finished rows are kept in OUTPUT.unfinished (--work-dir), which goes
away at the end.
"""


def add_parser(commands: Any) -> None:
    """Add `dataset` to the sub-commands of an argument parser."""
    parser = command_parser(commands, "dataset", SUMMARY, _EXAMPLES)
    add = parser.add_argument
    add("input", metavar="INPUT", help="files, a folder, or a dataset's name on the Hub")
    add("--model", required=True, metavar="NAME", help="a model's folder or its name on the Hub")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="OUT",
        help="a folder, or a .parquet, .jsonl, .csv or .tsv file",
    )
    add("--resume", action="store_true", help="go on with a run that ended early")
    add("--work-dir", type=Path, metavar="DIR", help="where finished rows are kept meanwhile (OUT.unfinished)")
    add("--push-to-hub", metavar="REPO", help="also upload the result to this dataset repository")
    add("--private", action="store_true", help="make that repository private")
    rows = parser.add_argument_group("which rows")
    rows.add_argument("--config", metavar="NAME", help="of a dataset with several configurations")
    rows.add_argument("--split", metavar="NAME", help="train where there is one; otherwise the only one")
    rows.add_argument("--limit", type=count, metavar="N", help="the first N rows")
    rows.add_argument("--streaming", action="store_true", help="do not download or convert the dataset first")
    prompts = parser.add_argument_group("their prompts")
    column = prompts.add_mutually_exclusive_group()
    column.add_argument(
        "--prompt-column",
        metavar="C",
        help="text (or messages, or token ids); the default is prompt, of a .txt file text",
    )
    column.add_argument("--messages-column", metavar="C", help="a list of messages with role and content")
    column.add_argument("--token-ids-column", metavar="C", help="a list of token ids")
    prompts.add_argument("--chat", action="store_true", help="make a text the user's message of a chat")
    prompts.add_argument("--system-prompt", metavar="TEXT", help="begin every chat with it; implies --chat")
    making = parser.add_argument_group("their completions")
    making.add_argument("--max-new-tokens", type=count, metavar="N", help="per completion")
    making.add_argument("--num-return-sequences", type=count, metavar="N", help="completions per row (1)")
    making.add_argument(
        "--do-sample", action=argparse.BooleanOptionalAction, help="draw at random; as the model's own config says"
    )
    making.add_argument("--temperature", type=float, metavar="T")
    making.add_argument("--top-k", type=int, metavar="K")
    making.add_argument("--top-p", type=float, metavar="P")
    making.add_argument("--min-p", type=float, metavar="P")
    making.add_argument("--stop", nargs="+", metavar="TEXT", help="end a completion where one of these appears")
    making.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (0)")
    making.add_argument("--row-parameters", nargs="+", default=[], metavar="C", help="columns that rows have them in")
    making.add_argument("--logprobs", action="store_true", help="keep the tokens' log-probabilities")
    making.add_argument("--on-error", choices=("raise", "record"), default="raise", help="of a row (raise)")
    making.add_argument("--completion-column", metavar="C", help="name of the new text column (completion)")
    engine = parser.add_argument_group("the engine")
    engine.add_argument("--device", metavar="D", help="cuda, cuda:1, cpu, ... (cuda where there is one)")
    engine.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    engine.add_argument("--max-rows", type=count, metavar="N", help="rows that are computed at once")
    engine.add_argument("--window", type=count, default=8192, metavar="N", help="unfinished rows in memory (8192)")
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    # A scheduler that takes the machine away says so with SIGTERM; it gets what Ctrl-C gets.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _dataset(arguments)
    except (InputError, OutputError) as error:
        parser.error(str(error))
    except Exception as error:
        # What is wrong with a file comes to light late where it is a stream, and where its bytes are no text.
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
        print(f"finished rows are in {_work_dir(arguments)}; the same again with --resume goes on", file=sys.stderr)


def _work_dir(arguments: argparse.Namespace) -> Path:
    output: Path = arguments.output
    chosen: Path = arguments.work_dir or output.with_name(f"{output.name}.unfinished")
    return chosen


def _dataset(arguments: argparse.Namespace) -> int:
    if not sys.stderr.isatty():
        _draw_no_bars()
    # Everything that can be wrong without a model, first.
    work = _work_dir(arguments)
    ranks = find_ranks(None, None)
    check_output(arguments.output)
    # Where several processes share the run, another may have begun already.
    if work.exists() and not arguments.resume and ranks.size == 1:
        raise OutputError(f"{work} is there: --resume goes on with it; delete it to start anew")
    if arguments.private and not arguments.push_to_hub:
        raise OutputError("--private belongs to --push-to-hub")
    dataset = read_input(
        arguments.input,
        config=arguments.config,
        split=arguments.split,
        limit=arguments.limit,
        streaming=arguments.streaming,
    )
    check_columns(arguments.output, dataset.features)
    model, tokenizer = _model(arguments)
    config = BatchingConfig(max_rows=arguments.max_rows)
    prompt = arguments.prompt_column or arguments.messages_column or arguments.token_ids_column
    if prompt is None:
        prompt = "text" if list(dataset.features or ()) == ["text"] else "prompt"
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
            system_prompt=arguments.system_prompt,
            output_columns={"text": arguments.completion_column} if arguments.completion_column else None,
            window=arguments.window,
            **_generation(arguments),
        )
    if ranks.rank == 0:
        written = write_output(done, work, arguments.output, drop_errors=arguments.on_error == "raise")
        print(f"wrote {written.num_rows:,} rows to {arguments.output}", flush=True)
        if arguments.push_to_hub:
            written.push_to_hub(arguments.push_to_hub, private=arguments.private)
            print(f"uploaded them to {arguments.push_to_hub}", flush=True)
        if ranks.size == 1:
            shutil.rmtree(work)
        else:
            print(f"{work} can be deleted once all processes have ended", flush=True)
    return 0


def _draw_no_bars() -> None:
    """Those of the libraries; ours looks for itself."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with contextlib.suppress(ImportError):
        from datasets.utils import disable_progress_bars

        disable_progress_bars()


def _generation(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "num_return_sequences", "do_sample", "temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.stop:
        given["stop_strings"] = arguments.stop
    return given


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    device = arguments.device
    if device is None:
        # Under `accelerate launch` and `torchrun` each process has a GPU of its own.
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch sees no CUDA GPU here; use --device cpu")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {arguments.model}: {error}") from error
    return model.to(device).eval(), tokenizer
