"""The arguments of `hf-async-batching dataset`; imports no torch, so that `--help` comes at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_async_batching.cli.arguments import command_parser, count

SUMMARY = "complete every row of a dataset, and lose nothing"

_EXAMPLES = """\
examples:
  every question of a CSV file, as a chat; a folder of Parquet files that load_dataset("answers") reads:
    hf-async-batching dataset questions.csv --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --prompt-column question --chat --max-new-tokens 200 --output answers

  continue a run that was interrupted or killed, or that filled the disk: the same command, and
    ... --resume

  a split of a dataset on the Hub whose column holds messages; the first 1,000 rows; one JSONL file:
    hf-async-batching dataset HuggingFaceH4/ultrachat_200k --split test_sft --limit 1000 \\
        --model Qwen/Qwen3-0.6B --messages-column messages --output out.jsonl

  four sampled answers for each prompt, with their log-probabilities, to the Hub:
    hf-async-batching dataset prompts.jsonl --model M --num-return-sequences 4 --do-sample \\
        --temperature 0.8 --seed 1 --logprobs --output samples --push-to-hub me/samples --private

  rows with their own parameters, in the columns max_new_tokens and temperature:
    hf-async-batching dataset rows.parquet --model M --row-parameters max_new_tokens temperature \\
        --output out.parquet

  an error column for rows that cannot be served (None, empty, too long), instead of the end of the run:
    hf-async-batching dataset rows.jsonl --model M --output out --on-error record

  a dataset larger than the disk, read as a stream:
    hf-async-batching dataset HuggingFaceFW/fineweb --split train --streaming --limit 100000 \\
        --prompt-column text --model M --max-new-tokens 32 --output summaries

  two GPUs, each with a copy of the model and its share of the rows:
    accelerate launch --num_processes 2 --module hf_async_batching dataset rows.jsonl --model M --output out

INPUT is a CSV, TSV, JSON, JSONL, text or Parquet file, a pattern of such files in quotes ('part-*.jsonl'), a folder
that `load_dataset` or `load_from_disk` reads, or a dataset's name on the Hub. OUT is a folder, or a .parquet, .jsonl,
.csv or .tsv file. In CSV and TSV, lists are JSON. All file types but Parquet may be compressed (.gz). The new columns
are completion, completion_ids, finish_reason, prompt_tokens and completion_tokens, and on request
completion_logprobs and error. During the run, finished rows are in OUT.unfinished (--work-dir), which is removed at
the end.
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
    add("--resume", action="store_true", help="continue a run that ended early")
    add("--work-dir", type=Path, metavar="DIR", help="folder of finished rows during the run (OUT.unfinished)")
    add("--push-to-hub", metavar="REPO", help="also upload the result to this dataset repository")
    add("--private", action="store_true", help="make that repository private")
    rows = parser.add_argument_group("which rows")
    rows.add_argument("--config", metavar="NAME", help="configuration of a dataset that has several")
    rows.add_argument("--split", metavar="NAME", help="split of the dataset (train, or the only split)")
    rows.add_argument("--limit", type=count, metavar="N", help="only the first N rows")
    rows.add_argument("--streaming", action="store_true", help="do not download or convert the dataset first")
    prompts = parser.add_argument_group("prompts")
    column = prompts.add_mutually_exclusive_group()
    column.add_argument(
        "--prompt-column",
        metavar="C",
        help="column with texts, lists of messages or lists of token ids (prompt; for a .txt file: text)",
    )
    column.add_argument("--messages-column", metavar="C", help="column with lists of messages (role and content)")
    column.add_argument("--token-ids-column", metavar="C", help="column with lists of token ids")
    prompts.add_argument("--tools-column", metavar="C", help="column with the chat template's tools, as JSON schemas")
    prompts.add_argument("--chat", action="store_true", help="make a text the user's message of a chat")
    prompts.add_argument("--system-prompt", metavar="TEXT", help="begin every chat with TEXT; implies --chat")
    making = parser.add_argument_group("completions")
    making.add_argument("--max-new-tokens", type=count, metavar="N", help="most new tokens of a completion")
    making.add_argument("--num-return-sequences", type=count, metavar="N", help="completions per row (1)")
    making.add_argument(
        "--do-sample", action=argparse.BooleanOptionalAction, help="sample, or not (as the model's own config says)"
    )
    making.add_argument("--temperature", type=float, metavar="T")
    making.add_argument("--top-k", type=int, metavar="K")
    making.add_argument("--top-p", type=float, metavar="P")
    making.add_argument("--min-p", type=float, metavar="P")
    making.add_argument("--stop", nargs="+", metavar="TEXT", help="end a completion at the first of these texts")
    making.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (0)")
    making.add_argument(
        "--row-parameters", nargs="+", default=[], metavar="C", help="columns named after the parameter that they hold"
    )
    making.add_argument("--logprobs", action="store_true", help="keep the tokens' log-probabilities")
    making.add_argument(
        "--on-error",
        choices=("raise", "record"),
        default="raise",
        help="end at a bad row, or record its error (raise)",
    )
    making.add_argument("--completion-column", metavar="C", help="name of the new text column (completion)")
    engine = parser.add_argument_group("the engine")
    engine.add_argument("--device", metavar="D", help="cuda, cuda:1, cpu, ... (cuda if available)")
    engine.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    engine.add_argument("--trust-remote-code", action="store_true", help="allow code that comes with the model to run")
    engine.add_argument("--max-rows", type=count, metavar="N", help="most rows that are computed at once")
    engine.add_argument("--window", type=count, default=8192, metavar="N", help="unfinished rows in memory (8192)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from hf_async_batching.cli.dataset import run

    return run(arguments)
