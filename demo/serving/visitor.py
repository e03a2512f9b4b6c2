"""Names the visitor that an event comes from."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable

import gradio as gr


def visitor_of(request: gr.Request) -> str:
    """Return the name of the tab that an event comes from."""
    return str(request.session_hash or "")


def owner_of(request: gr.Request) -> str:
    """Return the address that an event comes from: a client can invent any number of tabs, but has one address.

    Empty without a request, as in tests.
    """
    client = getattr(request, "client", None)
    if client is None:
        return ""
    headers = getattr(request, "headers", {})
    return address_of(str(client.host), [str(headers.get("x-forwarded-for") or "")])


def address_of(host: str, forwarded: Iterable[str]) -> str:
    """Return the address that limits count by.

    Args:
        host: The client's end of the connection, as the server sees it.
        forwarded: The X-Forwarded-For headers. On a Space every connection comes from a proxy, which appends the
            address that it sees; earlier entries are the client's own claim. Elsewhere the server has already read
            the headers of senders that it trusts.
    """
    if not os.environ.get("SPACE_ID"):
        return host
    for claim in reversed(",".join(forwarded).split(",")):
        try:
            if ipaddress.ip_address(claim.strip()).is_global:
                return claim.strip()
        except ValueError:
            continue
    return host
