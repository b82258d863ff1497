"""Which path of the HTTP port has which page or document.

    /, /runs/ID            pages; they hold no data, so that everyone may have them
    /static/NAME           what the pages are made of
    /api/runs              the runs                       like /metrics, with a token if that is
    /api/runs/ID           what a run does now            asked for
    /api/runs/ID/history   what it has done; ?since=CURSOR: what is new
    /api/runs/ID/events    both, as server-sent events
    /api/events            the runs, as server-sent events

Not covered: the connection (`http_server.py`), the documents (`documents.py`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, unquote_to_bytes

from switokd.services.coordinator.http_answer import Answer, HttpRequest
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.status_page.documents import Documents, encoded
from switokd.services.coordinator.status_page.guard import refusal
from switokd.services.coordinator.status_page.streams import (
    Readers,
    RunStream,
    Stream,
    cursor_of,
    stream_runs,
)

log = logging.getLogger(__name__)

STATIC = Path(__file__).with_name("static")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
JSON, EVENTS = "application/json", "text/event-stream"
ALWAYS = (
    "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
    "Cross-Origin-Resource-Policy: same-origin\r\n"
)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
PAGE = (
    f"Content-Security-Policy: {POLICY}\r\nX-Frame-Options: DENY\r\n"
    "Cross-Origin-Opener-Policy: same-origin\r\nCache-Control: no-cache\r\n"
)
DATA = "Cache-Control: no-store\r\n"
STATUS_OF = {
    Refusal.Kind.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Refusal.Kind.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
}
PROOF_IS_NEEDED = (
    "this coordinator asks for a token (Authorization: Bearer), or for a client's certificate"
)
TAKE_IN_SECONDS = 0.25
"""How often decisions are taken into the histories."""
CLOSE_SECONDS = 1.0
"""How long readers may take to read the last message, when the coordinator stops."""


def make_pages(runs: RunRegistry, is_open: bool) -> StatusPages:
    """Return the pages of the coordinator whose event loop calls this."""
    return StatusPages(runs, asyncio.get_running_loop(), is_open)


class StatusPages:
    """Answers for the pages. is_open: whether the port asks nothing of callers."""

    def __init__(self, runs: RunRegistry, loop: asyncio.AbstractEventLoop, is_open: bool) -> None:
        self._documents, self._is_open = Documents(runs, loop), is_open
        self._longest = runs.limits.max_name_length
        most = min(runs.limits.max_page_streams, runs.limits.max_http_connections // 2)
        self._readers = Readers(most)
        self._runs = runs
        threading.Thread(target=self._take_in, daemon=True, name="history").start()
        self._files = {
            file.name: (TYPES[file.suffix], file.read_bytes())
            for file in sorted(STATIC.iterdir())
            if file.suffix in TYPES
        }

    async def close(self) -> None:
        """Tell the readers of streams that the coordinator stops, and wait a moment for them."""
        self._readers.closing.set()
        deadline = asyncio.get_running_loop().time() + CLOSE_SECONDS
        while self._readers.count and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    def _take_in(self) -> None:
        """Take the decisions of all runs into their histories, so that the event loop need not."""
        while not self._readers.closing.wait(TAKE_IN_SECONDS):
            for entry in list(self._runs.entries.values()):
                with suppress(Exception):  # the other runs go on; a reader meets the fault again
                    entry.history.take_in()

    def answer(self, request: HttpRequest) -> Answer | None:
        """Return the answer to a request; None: there is no such page."""
        path, _, query = request.target.partition(b"?")
        parts = path.split(b"/")[1:]
        if not path.startswith(b"/"):
            return None
        if reason := refusal(request, self._is_open):
            return _problem(HTTPStatus.FORBIDDEN, reason)
        if parts == [b""]:
            return self._file("list.html")
        if parts[0] == b"static" and len(parts) == 2:
            return self._file(parts[1].decode("latin-1"))
        if parts[0] == b"runs" and len(parts) == 2:
            return self._file("run.html") if self._run_id(parts[1]) else None
        if parts[0] != b"api":
            return None
        if not request.may_read:
            more = "WWW-Authenticate: Bearer\r\n"
            return _problem(HTTPStatus.UNAUTHORIZED, PROOF_IS_NEEDED, more)
        try:
            return self._data(parts[1:], query, request)
        except Refusal as error:
            status = STATUS_OF.get(error.kind, HTTPStatus.SERVICE_UNAVAILABLE)
            return _problem(status, str(error))
        except Exception:
            log.exception("a document of the status page cannot be made")
            return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "see the coordinator's log")

    def _data(self, parts: list[bytes], query: bytes, request: HttpRequest) -> Answer | None:
        """Return the answer to a request for data; Refusal if there is no such run."""
        documents = self._documents
        if parts == [b"events"]:
            return self._stream(partial(stream_runs, documents, self._readers))
        if parts == [b"runs"]:
            return _document(documents.runs())
        if (
            parts[:1] != [b"runs"]
            or not 2 <= len(parts) <= 3
            or not (run_id := self._run_id(parts[1]))
        ):
            return None
        what = parts[2] if len(parts) == 3 else b""
        if not what:
            return _document(documents.status(run_id)) if len(parts) == 2 else None
        if what == b"history":
            since = cursor_of(parse_qs(query.decode("latin-1")).get("since", [""])[0])
            return _document(encoded(documents.history(run_id).document(since)))
        if what == b"events":
            documents.status(run_id)  # a run that is not here is refused before the stream begins
            since_id = request.header("last-event-id")
            return self._stream(RunStream(documents, self._readers, run_id, since_id))
        return None

    def _stream(self, stream: Stream) -> Answer:
        """Return an answer that goes on, if there is a place for one more reader."""
        if not self._readers.enter():
            reason = (
                f"{self._readers.most} readers are kept up to date already (--max-page-streams)"
            )
            more = "Retry-After: 5\r\n"
            return _problem(HTTPStatus.SERVICE_UNAVAILABLE, reason, more)
        return Answer(
            HTTPStatus.OK, EVENTS, b"retry: 2000\n\n", ALWAYS + DATA, stream, self._readers.leave
        )

    def _run_id(self, part: bytes) -> str:
        """Return the id of a run from a path; empty if it can be none."""
        try:
            name = unquote_to_bytes(part).decode("utf-8")
        except UnicodeDecodeError:
            return ""
        return name if name.isprintable() and len(name) <= self._longest else ""

    def _file(self, name: str) -> Answer | None:
        found = self._files.get(name)
        return Answer(HTTPStatus.OK, *found, ALWAYS + PAGE) if found else None


def _document(body: bytes) -> Answer:
    return Answer(HTTPStatus.OK, JSON, body, ALWAYS + DATA)


def _problem(status: HTTPStatus, reason: str, more: str = "") -> Answer:
    return Answer(status, JSON, encoded({"error": reason}), ALWAYS + DATA + more)
