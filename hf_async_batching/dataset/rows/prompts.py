"""Turns rows into token ids."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from hf_async_batching.dataset.rows.row import PreparedRow, RowBlock

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
PromptFunction = Callable[[dict[str, Any]], Prompt]


class PromptMaker:
    """Makes the prompts and the parameters of rows; called from several threads at once.

    The column or the function gives the prompt. A text is tokenized with the tokenizer's default arguments. A list of
    messages goes through the chat template. A list of token ids is used directly. If the last message is the
    assistant's, the completion continues it (as in transformers' text-generation pipeline).

    Args:
        tokenizer: May be None if all prompts are token ids.
        prompt: A column, or a function of the row.
        row_parameters: From generation parameters to the columns that hold them.
        chat: Make a text the user's message of a chat.
        system_prompt: Begins every chat that has no system message.
        tools: The column with the tools for the chat template; makes a text a chat.
        chat_template_arguments: Further arguments of `apply_chat_template`.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: str | PromptFunction,
        row_parameters: Mapping[str, str],
        *,
        chat: bool = False,
        system_prompt: str | None = None,
        tools: str | None = None,
        chat_template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._row_parameters = dict(row_parameters)
        self._chat = chat
        self._system_prompt = system_prompt
        self._tools = tools
        self._template_arguments = dict(chat_template_arguments or {})
        self._local = threading.local()
        self._copying = threading.Lock()
        self._what = f"column {prompt!r}" if isinstance(prompt, str) else "`prompt` function"

    def __call__(self, chunk: RowBlock, wanted: Sequence[int]) -> list[PreparedRow]:
        """Prepare the rows of a chunk whose indices are `wanted`; an error in a row becomes its `error`."""
        prepared: list[PreparedRow] = []
        texts: list[tuple[PreparedRow, str]] = []
        for index in wanted:
            row = PreparedRow(index)
            prepared.append(row)
            data = chunk.rows[index - chunk.start]
            try:
                self._read_parameters(row, data)
                value = self._value(data)
                if isinstance(value, str) and not self._as_chat:
                    texts.append((row, value))
                else:
                    row.prompt = self._tokens(value, data)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # functions, templates and native tokenizers can raise anything
                row.error = _describe(error)
        self._tokenize(texts)
        for row in prepared:
            if row.error is None and not len(row.prompt):
                row.error = f"the prompt is empty ({self._what}): it needs at least one token"
        return prepared

    @property
    def _as_chat(self) -> bool:
        return self._chat or self._system_prompt is not None or self._tools is not None

    def _read_parameters(self, row: PreparedRow, data: Mapping[str, Any]) -> None:
        for name, column in self._row_parameters.items():
            value = data[column]
            tolist = getattr(value, "tolist", None)
            value = tolist() if tolist is not None else value
            if value is None:
                continue
            if name == "seed":
                row.seed = int(value)
            else:
                row.parameters[name] = value

    def _value(self, data: Mapping[str, Any]) -> Prompt:
        value: Any = data[self._prompt] if isinstance(self._prompt, str) else self._prompt(dict(data))
        if value is None:
            raise ValueError(f"the prompt is None ({self._what})")
        # `datasets` keeps a list of structures as a structure of lists.
        if isinstance(value, Mapping) and _is_structure_of_lists(value):
            value = [dict(zip(value, fields)) for fields in zip(*value.values())]
        tolist = getattr(value, "tolist", None)
        prompt: Prompt = tolist() if tolist is not None else value
        return prompt

    def _tokens(self, value: Prompt, data: Mapping[str, Any]) -> Sequence[int]:
        if isinstance(value, str):
            value = [{"role": "user", "content": value}]
        if isinstance(value, Sequence) and all(isinstance(item, Integral) for item in value):
            tokens: Any = value
            return [int(token) for token in tokens]
        if isinstance(value, Sequence) and all(isinstance(item, Mapping) and "role" in item for item in value):
            # All structures of a column have the same fields; a field that a message lacks is None.
            return self._chat_tokens([{k: v for k, v in m.items() if v is not None} for m in value], data)  # type: ignore[union-attr]
        raise TypeError(
            f"the prompt ({self._what}) is {type(value).__name__}; it must be a text, a list of messages with 'role' "
            "and 'content', or a list of token ids"
        )

    def _chat_tokens(self, messages: list[dict[str, Any]], data: Mapping[str, Any]) -> list[int]:
        if self._system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system_prompt}, *messages]
        goes_on = messages[-1]["role"] == "assistant"
        arguments: dict[str, Any] = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        if self._tools is not None and (tools := _read_tools(data[self._tools])):
            arguments["tools"] = tools
        encoded = self._own_tokenizer().apply_chat_template(
            messages, **{**arguments, **self._template_arguments}, tokenize=True, return_dict=True
        )
        tokens: list[int] = encoded["input_ids"]
        return tokens

    def _tokenize(self, texts: list[tuple[PreparedRow, str]]) -> None:
        if not texts:
            return
        try:
            tokenizer = self._own_tokenizer()
            # In one call a fast tokenizer tokenizes all texts in parallel, without the interpreter's lock.
            encoded = tokenizer([text for _, text in texts], return_attention_mask=False)["input_ids"]
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if len(texts) == 1:
                texts[0][0].error = _describe(error)
                return
            for text in texts:
                self._tokenize([text])
            return
        for (row, _), tokens in zip(texts, encoded, strict=True):
            row.prompt = tokens

    def _own_tokenizer(self) -> Any:
        """Return this thread's copy, because a call of a fast tokenizer sets padding and truncation on it."""
        if self._tokenizer is None:
            raise ValueError("`tokenizer` is None and the prompt is not a list of token ids; pass the tokenizer")
        own = getattr(self._local, "tokenizer", None)
        if own is None:
            with self._copying:
                own = self._local.tokenizer = copy.deepcopy(self._tokenizer)
        return own


def _read_tools(value: Any) -> list[Any] | None:
    """Read the tools of a row from a list or its JSON text, without fields that only other rows' tools have.

    Raises:
        ValueError: The tools are not a list.
    """
    tools = getattr(value, "tolist", lambda: value)()
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip() else None
    if isinstance(tools, Mapping) and all(
        isinstance(fields, list) for fields in tools.values()
    ):  # `datasets` keeps a list of structures as a structure of lists
        tools = [dict(zip(tools, fields)) for fields in zip(*tools.values())]
    if tools is not None and not isinstance(tools, list):
        raise ValueError(
            f"the tools are {type(tools).__name__}; they must be a list of JSON schemas, or its JSON text"
        )
    return None if tools is None else [_without_none(tool) for tool in tools]


def _without_none(value: Any) -> Any:
    """Remove the fields that Arrow adds to a structure because another row has them."""
    if isinstance(value, Mapping):
        return {name: _without_none(field) for name, field in value.items() if field is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _is_structure_of_lists(value: Mapping[str, Any]) -> bool:
    return {"role", "content"} <= value.keys() and not isinstance(value["role"], str)


def _describe(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"there is no {error} in the row"
    return str(error) or type(error).__name__
