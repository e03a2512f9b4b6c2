"""A model over a table, with a folder in which nothing that is done is lost."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from .chat import Message
from .problems import explain
from .serving import Serving
from .settings import Settings, ends_of
from .text import build_prompt

if TYPE_CHECKING:
    from hf_async_batching import GenerationHandle

_DONE = "done.jsonl"
# More than are computed at once, so that the batch stays full; the others come when these are done.
_IN_FLIGHT = 96
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class RowProgress:
    """How far a run is.

    Attributes:
        rows: Rows that are done, those of an earlier run included.
        total: All rows.
        resumed: Rows that an earlier run had done.
        failed: Rows without a completion, which say why.
        tokens: New tokens of this run.
        seconds: Since this run began.
    """

    rows: int
    total: int
    resumed: int
    failed: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the time of this run."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def remaining_seconds(self) -> float | None:
        """At the pace of this run; None before its first row is done."""
        done = self.rows - self.resumed
        return self.seconds / done * (self.total - self.rows) if done else None


def complete_table(
    serving: Serving,
    table: Dataset,
    column: str,
    settings: Settings,
    folder: Path,
    wanted: Callable[[RowProgress], bool],
) -> Dataset | None:
    """Answer every row of a table as a chat message; blocks, and looks at the engine ten times a second.

    Args:
        serving: The engine.
        table: The rows.
        column: Which column holds the prompts.
        settings: System prompt and sampling.
        folder: Keeps what is done; a run that was stopped goes on from there.
        wanted: Is told how far the run is, and says whether to go on.

    Returns:
        The table with the columns `completion`, `finish_reason` and `error`; None where the run was stopped.
    """
    tokenizer, ends = serving.chat_model.tokenizer, ends_of(serving.chat_model)
    done = _read(folder / _DONE)
    resumed, tokens, began = len(done), 0, time.perf_counter()
    left = deque(index for index in range(len(table)) if index not in done)
    prompts = table[column]
    live: dict[int, GenerationHandle] = {}
    try:
        with (folder / _DONE).open("a", encoding="utf-8") as file:

            def keep(index: int, row: dict[str, Any]) -> None:
                done[index] = row
                file.write(json.dumps({"index": index, **row}, ensure_ascii=False) + "\n")

            while left or live:
                while left and len(live) < _IN_FLIGHT:
                    index = left.popleft()
                    try:
                        asked = Message(role="user", content=str(prompts[index] or ""))
                        request = settings.request(build_prompt(tokenizer, [asked], settings.system), ends)
                        live[index] = serving.manager.submit_request(request)
                        serving.roster.add(live[index])
                    except Exception as error:  # the row says so; the others go on
                        keep(index, _failed(error))
                for index in [index for index, handle in live.items() if handle.done]:
                    row, count = _finished(live.pop(index), tokenizer)
                    tokens += count
                    keep(index, row)
                file.flush()
                failed = sum(bool(row["error"]) for row in done.values())
                seconds = time.perf_counter() - began
                if not wanted(RowProgress(len(done), len(table), resumed, failed, tokens, seconds)):
                    return None
                if live:
                    time.sleep(_LOOK_SECONDS)
    finally:
        for handle in live.values():
            handle.cancel()
    for name in ("completion", "finish_reason", "error"):
        values = [done[index][name] for index in range(len(table))]
        table = table.remove_columns(name) if name in table.column_names else table
        table = table.add_column(name, values)
    return table


def _finished(handle: GenerationHandle, tokenizer: Any) -> tuple[dict[str, Any], int]:
    try:
        result = handle.result()
    except Exception as error:  # the row says so; the others go on
        return _failed(error), 0
    text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
    return {"completion": text, "finish_reason": result.finish_reason, "error": ""}, len(result.token_ids)


def _failed(error: Exception) -> dict[str, Any]:
    return {"completion": "", "finish_reason": "", "error": explain(error).plain()}


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """What is done, but for a last line that was cut off."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows[row.pop("index")] = row
        except (json.JSONDecodeError, KeyError):
            continue
    return rows
