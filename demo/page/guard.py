"""Bounds the requests of one address before they reach Gradio.

Gradio bounds only the size of an uploaded file and the length of its queue. Without further bounds, one client could
send endless bodies, open thousands of sessions, start hundreds of runs without reading them, and fill the disk.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..serving.visitor import address_of
from .sweeper import lifespan, queue_of

# Bounds for one address: events that run or wait, open requests, calls and new files over time.
MOST_EVENTS = 64
_MOST_OPEN = 512
_CALLS_PER_SECOND, _MOST_CALLS_AT_ONCE = 10.0, 64.0
# For each new session and each page Gradio copies its config, which takes some milliseconds.
_SESSIONS_PER_SECOND, _MOST_SESSIONS_AT_ONCE = 5.0, 64.0
_PAGES_PER_SECOND, _MOST_PAGES_AT_ONCE = 10.0, 100.0
_REQUESTS_PER_SECOND, _MOST_REQUESTS_AT_ONCE = 400.0, 2000.0
_UPLOAD_SECONDS, _MOST_UPLOADED = 600.0, 200 << 20
_MOST_ADDRESSES = 10_000

MOST_BODY = 4 << 20
_MOST_SMALL_BODY = 64 << 10
_BODY_SECONDS = 60.0
_PREFIX = "/gradio_api"
_SERVER_FUNCTIONS = f"{_PREFIX}/component_server"
_PAGES = frozenset(("/", "/config", "/config/", f"{_PREFIX}/info", f"{_PREFIX}/info/", f"{_PREFIX}/openapi.json"))
_JOINS = (f"{_PREFIX}/queue/join", f"{_PREFIX}/call/", f"{_PREFIX}/run/", f"{_PREFIX}/api/")
# Routes of Gradio that this page does not use: they write files, or fetch addresses that a visitor names.
_UNUSED = ("deep_link", "process_recording", "run-history", "runs", "proxy=", "file=http", "stream/")
_CLOSED = (*(f"{_PREFIX}/{name}" for name in _UNUSED), "/monitoring")


class _Refusal(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class _Buckets:
    """A bound for each address: `most` at once, and `rate` more every second."""

    def __init__(self, rate: float, most: float) -> None:
        self._rate, self._most = rate, most
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, address: str, amount: float = 1.0) -> bool:
        now = time.monotonic()
        left, then = self._left.pop(address, (self._most, now))
        left = min(self._most, left + (now - then) * self._rate)
        taken = left >= amount
        self._left[address] = (left - amount if taken else left, now)
        if len(self._left) > _MOST_ADDRESSES:
            del self._left[next(iter(self._left))]
        return taken


class RequestGuard:
    """An ASGI middleware that refuses requests beyond a bound, with a text that says so."""

    def __init__(self, app: ASGIApp, most_upload: int) -> None:
        self._app = app
        self._most_upload = most_upload
        self._open = Counter[str]()
        self._calls = _Buckets(_CALLS_PER_SECOND, _MOST_CALLS_AT_ONCE)
        self._sessions = _Buckets(_SESSIONS_PER_SECOND, _MOST_SESSIONS_AT_ONCE)
        self._pages = _Buckets(_PAGES_PER_SECOND, _MOST_PAGES_AT_ONCE)
        self._requests = _Buckets(_REQUESTS_PER_SECOND, _MOST_REQUESTS_AT_ONCE)
        self._uploads = _Buckets(_MOST_UPLOADED / _UPLOAD_SECONDS, _MOST_UPLOADED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        forwarded = [value for name, value in headers if name == b"x-forwarded-for"]
        address = address_of(str((scope.get("client") or ("",))[0]), forwarded)
        began = False

        async def sent(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        self._open[address] += 1
        try:
            most = self._check(scope, address)
            length = next((value for name, value in headers if name == b"content-length"), "0")
            if not length.isdecimal() or int(length[:20]) > most:
                raise _Refusal(413, f"This is too large: the page takes up to {most >> 10} kB.")
            bounded = self._bounded(receive, address, most, scope)
            if scope["path"].startswith(_SERVER_FUNCTIONS):
                bounded = await self._known(bounded, address, scope)
            await self._app(scope, bounded, sent)
        except _Refusal as refusal:
            if not began:
                await _answer(send, refusal)
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]

    def _check(self, scope: Scope, address: str) -> int:
        """Return the most bytes that the body may have."""
        path, posts = scope["path"], scope["method"] == "POST"
        if path.startswith(_CLOSED):
            raise _Refusal(404, "This page does not have that.")
        if self._open[address] > _MOST_OPEN or not self._requests.take(address):
            raise _Refusal(429, "Too many requests come from your address. Please try again in a moment.")
        if not posts:
            if path in _PAGES and not self._pages.take(address):
                raise _Refusal(429, "Too many pages are opened from your address. Please try again in a moment.")
            return MOST_BODY
        if path.startswith(_SERVER_FUNCTIONS):
            return _MOST_SMALL_BODY
        if path.startswith(_JOINS):
            events = queue_of(scope["app"]).event_ids_to_events.values()
            if sum(_address_of_event(event) == address for event in events) >= MOST_EVENTS:
                raise _Refusal(429, f"{MOST_EVENTS} runs from your address are active already: let some of them end.")
            if not self._calls.take(address):
                raise _Refusal(429, "Too many calls come from your address. Please try again in a moment.")
        return self._most_upload if path.startswith(f"{_PREFIX}/upload") else MOST_BODY

    async def _known(self, receive: Receive, address: str, scope: Scope) -> Receive:
        """Read a small body, and refuse it if it opens one session too many; return a `receive` that replays it."""
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                break
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        body = b"".join(parts)
        try:
            session = json.loads(body)["session_hash"]
            known = isinstance(session, str) and session in scope["app"].state_holder
        except Exception:  # a form, or not JSON: this page sends neither
            raise _Refusal(400, "JSON with a `session_hash` is needed.") from None
        if not known and not self._sessions.take(address):
            raise _Refusal(429, "Too many sessions are opened from your address. Please try again in a moment.")
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    def _bounded(self, receive: Receive, address: str, most: int, scope: Scope) -> Receive:
        """Receive at most `most` bytes, within `_BODY_SECONDS`."""
        taken, whole = 0, False
        until = time.monotonic() + _BODY_SECONDS
        uploads = scope["path"].startswith(f"{_PREFIX}/upload")

        async def bounded() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                raise _Refusal(408, "The request took too long to arrive.") from None
            size = len(message.get("body", b""))
            taken += size
            whole = message["type"] != "http.request" or not message.get("more_body")
            if taken > most:
                raise _Refusal(413, f"This is too large: the page takes up to {most >> 10} kB.")
            if uploads and not self._uploads.take(address, size):
                raise _Refusal(429, "Many files came from your address. Please try again in some minutes.")
            return message

        return bounded


async def _answer(send: Send, refusal: _Refusal) -> None:
    body = json.dumps({"detail": refusal.text, "error": refusal.text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # The rest of the body is not read: the connection ends.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def app_options(most_upload: int) -> dict[str, Any]:
    """Return the `app_kwargs` of `Blocks.launch`."""
    return {"middleware": [Middleware(RequestGuard, most_upload=most_upload)], "lifespan": lifespan}


def _address_of_event(event: Any) -> str:
    client, headers = event.request.client, event.request.headers
    return address_of(str(client.host) if client else "", headers.getlist("x-forwarded-for"))
