"""A request of HTTP as it has come, and the answer to it.

Not covered: reading and sending them (`http_server.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple, Protocol

TEXT = "text/plain; charset=utf-8"

Send = Callable[[bytes], None]
"""Sends bytes to a caller. OSError if the caller has gone, or does not read."""


class Answer(NamedTuple):
    """An answer. headers: further lines, each with its line end."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: str = ""
    stream: Callable[[Send], None] | None = None
    """Sends what follows the body until it returns; then the length is not known before."""
    done: Callable[[], None] = lambda: None
    """Called in any case, once nothing more is sent."""


class HttpRequest(NamedTuple):
    """What a caller asks for. may_read: whether it may read what runs do."""

    target: bytes
    head: bytes
    may_read: bool

    def header(self, name: str) -> str:
        """Return a header's value; empty if the request does not have it."""
        return header(self.head, name)


class Pages(Protocol):
    """Answers what is not /metrics or /healthz."""

    def answer(self, request: HttpRequest) -> Answer | None:
        """Return the answer; None: there is no such page."""


def header(head: bytes, name: str) -> str:
    """Return a header's value from the bytes of a request; empty if there is none."""
    for line in head.split(b"\n")[1:]:
        found, _, value = line.decode("latin-1").partition(":")
        if found.strip().lower() == name:
            return value.strip()
    return ""
