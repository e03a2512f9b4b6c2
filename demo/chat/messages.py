"""A conversation: the messages that a browser keeps, and the part of them that the model gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from ..serving.settings import LONGEST_TEXT

_MOST_MESSAGES = 200
# The model gets the last so many characters of a conversation.
LONGEST_HISTORY = 100_000


class Message(TypedDict):
    """One message of a conversation, as it was written.

    A failed answer is shown and never sent to the model. A cut answer was incomplete when the browser saved it.
    """

    role: str
    content: str
    failed: NotRequired[bool]
    cut: NotRequired[bool]


def sendable(messages: list[Message]) -> list[Message]:
    """Leave out failed answers together with their questions: chat templates insist on alternating roles."""
    kept: list[Message] = []
    for message in messages:
        if message.get("failed") or (message.get("cut") and not message["content"].strip()):
            if kept and kept[-1]["role"] == "user":
                kept.pop()
        else:
            kept.append(message)
    return kept


def read_messages(value: Any) -> list[Message]:
    """Read a conversation that a browser or a client sent. Skip items that are not messages in alternating roles.

    The user speaks first. If the conversation is too long, its oldest questions and answers are left out.
    """
    messages: list[Message] = []
    for item in value[-_MOST_MESSAGES:] if isinstance(value, Sequence) and not isinstance(value, str) else ():
        role = "assistant" if len(messages) % 2 else "user"
        if isinstance(item, Mapping) and item.get("role") == role and isinstance(item.get("content"), str):
            message = Message(role=role, content=item["content"][:LONGEST_TEXT])
            if item.get("failed"):
                message["failed"] = True
            if item.get("cut") and role == "assistant":
                message["cut"] = True
            messages.append(message)
    if len(messages) % 2:
        messages.pop()
    length, first = 0, len(messages)
    while first:
        length += sum(len(message["content"]) for message in messages[first - 2 : first])
        if length > LONGEST_HISTORY:
            break
        first -= 2
    return messages[first:]
