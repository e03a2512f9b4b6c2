"""The page's API: every action as a named endpoint with types and a docstring, for `gradio_client` and MCP.

Gradio shows the docstrings to callers, and takes the types from the signatures.
"""

from __future__ import annotations

import inspect
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, get_args, get_origin

import gradio as gr

from ..chat.messages import Message, read_messages
from ..chat.service import ChatService
from ..compare.handlers import CompareRuns
from ..dataset.handlers import DatasetRuns, TableJob
from ..dataset.table import TableError, table_of, text_columns
from ..serving.backend import Backend
from ..serving.pools import TABLES, TRACES
from ..serving.problems import explain
from ..serving.pulse import Pulse
from ..serving.settings import LONGEST_TEXT, Settings, number, shown, whole_number
from ..serving.visitor import owner_of
from ..wall.handlers import WallRuns
from ..wall.prompts import read_prompts
from ..wall.wall import MOST_CHATS, MOST_STAGGER, MOST_TURNS, WALL

# Gradio walks through every part of a result in the event loop. The page's own download has many more steps.
_TRACED_STEPS = 200
_DEFAULT = Settings()


def add_endpoints(
    backend: Backend,
    service: ChatService,
    walls: WallRuns,
    comparisons: CompareRuns,
    datasets: DatasetRuns,
    pulse: Pulse,
    default_prompts: list[str],
) -> None:
    """Add the endpoints to the page that is being built."""

    async def chat(
        request: gr.Request,
        message: str,
        history: list[dict[str, str]] | None = None,
        system: str = "",
        max_new_tokens: int = _DEFAULT.max_new_tokens,
        temperature: float = _DEFAULT.temperature,
        top_p: float = _DEFAULT.top_p,
        top_k: int = _DEFAULT.top_k,
        greedy: bool = _DEFAULT.greedy,
        seed: int | None = None,
    ) -> AsyncIterator[str]:
        """Answer a message; streams the answer as it grows. Cancel the job to free its place in the batch.

        Args:
            message: What the user says.
            history: Earlier messages, alternating {"role": "user" or "assistant", "content": text}.
            system: System prompt; empty for none.
            max_new_tokens: Longest answer, 1 to 1024.
            temperature: Divides the logits, 0.1 to 2.
            top_p: Keep the likeliest tokens up to this probability; 1 switches it off.
            top_k: Keep this many of the likeliest tokens; 0 switches it off.
            greedy: Always take the likeliest token; the other sampling settings are then ignored.
            seed: Makes a sampled answer reproducible.
        """
        _check(isinstance(message, str) and message.strip(), "`message` is empty: say something.")
        _check(history is None or isinstance(history, list), "`history` must be a list of messages")
        with _told():
            settings = Settings.checked(
                system=system,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                greedy=greedy,
                seed=seed,
            )
        asked = [*read_messages(history), Message(role="user", content=message.strip()[:LONGEST_TEXT])]
        # Each call counts as a visitor of its own, so a client may run many at once.
        async for reply in service.reply(f"api-{secrets.token_hex(8)}", asked, settings, owner_of(request)):
            if reply.error is not None:
                raise gr.Error(explain(reply.error).plain(), print_exception=False)
            if reply.text:
                yield reply.text

    async def wall(
        request: gr.Request,
        chats: int = WALL.chats,
        prompts: list[str] | None = None,
        turns: int = WALL.turns,
        max_new_tokens: int = WALL.max_new_tokens,
        stagger: float = WALL.stagger,
        greedy: bool = WALL.greedy,
    ) -> AsyncIterator[dict[str, Any]]:
        """Run many conversations at once in one batch; streams figures of the whole wall, and finally every text.

        Args:
            chats: Conversations, 1 to 64.
            prompts: First questions, repeated if there are too few; None for the page's own.
            turns: Questions per conversation, 1 to 4; the later ones are follow-ups.
            max_new_tokens: Longest answer, 1 to 1024.
            stagger: Seconds between two starts, 0 to 5.
            greedy: Always the likeliest token.
        """
        with _told():
            chats = whole_number("chats", chats, 1, MOST_CHATS)
            turns = whole_number("turns", turns, 1, MOST_TURNS)
            stagger = number("stagger", stagger, 0.0, MOST_STAGGER)
            settings = Settings.checked(max_new_tokens=max_new_tokens, greedy=greedy)
        visitor = f"api-{secrets.token_hex(8)}"
        questions = _prompts(prompts, default_prompts)
        last: dict[str, Any] = {}
        tiles: list[dict[str, Any]] = []
        try:
            async for text in walls.frames(
                visitor, questions, settings, chats=chats, turns=turns, stagger=stagger, owner=owner_of(request)
            ):
                frame = json.loads(text)
                if frame.get("place"):
                    yield {"place": frame["place"]}
                    continue
                last = frame["sum"]
                if frame["over"]:
                    tiles = walls.whole(frame["run"])["tiles"]
                yield last
        except Exception as error:
            raise _as_error(error) from error
        yield last | {"conversations": [tile["turns"] for tile in tiles]}

    async def compare(
        request: gr.Request,
        chats: int = 16,
        max_new_tokens: int = 128,
        prompts: list[str] | None = None,
        depths: list[int] | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Run the same prompts synchronously (depth 1) and asynchronously (depth 2); streams progress, then outcomes.

        Args:
            chats: Conversations, 1 to 64; all of them arrive together, and answers are greedy.
            max_new_tokens: Longest answer, 1 to 1024.
            prompts: First questions; None for the page's own.
            depths: The depths to run, in this order: 1, 2 or both; None for both.
        """
        with _told():
            chats = whole_number("chats", chats, 1, MOST_CHATS)
            max_new_tokens = Settings.checked(max_new_tokens=max_new_tokens).max_new_tokens
        wanted = depths or [1, 2]
        _check(wanted in ([1], [2], [1, 2], [2, 1]), "`depths` must be of 1 and 2, each once")
        questions = _prompts(prompts, default_prompts)
        try:
            async for state in comparisons.states(
                f"api-{secrets.token_hex(8)}",
                questions,
                chats=chats,
                max_new_tokens=max_new_tokens,
                ways=wanted,
                owner=owner_of(request),
            ):
                yield state
        except Exception as error:
            raise _as_error(error) from error

    async def dataset(
        request: gr.Request,
        rows: list[dict[str, Any]],
        column: str,
        system: str = "",
        max_new_tokens: int = 64,
        greedy: bool = True,
    ) -> AsyncIterator[dict[str, Any]]:
        """Answer every row of a small dataset; streams progress, and finally the rows with their completions.

        Args:
            rows: Up to 2000 objects with the same keys.
            column: The key that holds the prompt.
            system: System prompt for every row.
            max_new_tokens: Longest answer, 1 to 1024.
            greedy: Always take the likeliest token; otherwise the page's usual sampling is used.
        """
        with _told():
            settings = Settings.checked(system=system, max_new_tokens=max_new_tokens, greedy=greedy)
        _check(isinstance(rows, list), "`rows` must be a list of objects")
        try:
            table = await TABLES.run_for(owner_of(request), table_of, rows)
        except Exception as error:
            raise _as_error(error) from error
        if column not in text_columns(table):
            raise gr.Error(f"`column` must name a key that holds text, got {shown(column)}", print_exception=False)
        job = TableJob(table, column, settings, "jsonl")
        try:
            async for _ in datasets.run(job, f"api-{secrets.token_hex(8)}", owner_of(request)):
                if job.place:
                    yield {"place": job.place}
                elif job.progress is not None:
                    yield asdict(job.progress)
        except Exception as error:
            raise _as_error(error) from error
        if job.result is None:
            raise gr.Error(job.error or "The run was stopped.", print_exception=False)
        assert job.progress is not None
        yield asdict(job.progress) | {"completed": await TABLES.run(job.result.to_list)}

    async def stats() -> dict[str, Any]:
        """Return the engine's live figures (tokens/s, running, waiting, KV pages, MBU, …) and the loading stage."""
        state = pulse.read()
        return {key: state[key] for key in ("stage", "facts", "figures")}

    async def trace() -> dict[str, Any]:
        """Return the last steps, timed by the device's events, in the Trace Event Format that Perfetto opens."""
        try:
            return await TRACES.run(_trace, backend)
        except Exception as error:
            raise _as_error(error) from error

    add_endpoint: Any = gr.api  # type: ignore[attr-defined]
    unlimited: dict[str, Any] = {"concurrency_limit": None}
    for endpoint in (chat, wall, compare, dataset, stats, trace):
        add_endpoint(_documented(endpoint), api_name=endpoint.__name__, **unlimited)


def _trace(backend: Backend) -> dict[str, Any]:
    timeline = backend.require().manager.timeline()
    return replace(timeline, steps=timeline.steps[-_TRACED_STEPS:]).to_chrome_trace()


def _documented(function: Callable[..., Any]) -> Callable[..., Any]:
    """Resolve postponed annotations, since Gradio reads types at run time; for a stream it wants the items' type."""
    types = inspect.get_annotations(function, eval_str=True)
    returned: Any = get_origin(types["return"])
    if returned is AsyncIterator:
        (types["return"],) = get_args(types["return"])
    function.__annotations__ = types
    function.__doc__ = inspect.getdoc(function)
    return function


def _prompts(prompts: Any, default: list[str]) -> list[str]:
    if prompts is None:
        return default
    texts = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    _check(texts, "`prompts` must be a list of texts")
    return read_prompts(prompts)


def _check(good: object, otherwise: str) -> None:
    if not good:
        raise gr.Error(otherwise, print_exception=False)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _as_error(error: Exception) -> Exception:
    if isinstance(error, gr.Error):
        return error
    text = str(error) if type(error) in (ValueError, TableError) else explain(error).plain()
    return gr.Error(text, print_exception=False)
