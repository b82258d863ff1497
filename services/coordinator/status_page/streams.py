"""Server-sent events: what is new of a run, or of the list of runs, until the reader goes.

Each message has an id, from which a reader that comes back goes on. A reader that does not read is
cut off by the server's time limit for sending.

Not covered: what a browser does with them (`static/`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from switokd.services.coordinator.history import RunHistory
from switokd.services.coordinator.http_answer import Send
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.status_page.documents import Documents, encoded

TICK_SECONDS = 0.1
"""How soon a reader hears of a run's end."""
UPDATE_SECONDS, LIST_SECONDS = 0.5, 1.0
"""Time between two updates of a run, and of the list."""
HEARTBEAT_SECONDS = 5.0
"""A comment is sent if nothing else was: the reader knows that the coordinator lives."""
LARGE_BYTES = 20_000
"""For each so many bytes of a status, updates come a second later."""
LONGEST_SECONDS = 900.0
"""Then a reader must come again, and show its token again."""
HEARTBEAT = b": alive\n\n"


def message(event: str, data: bytes, number: str = "") -> bytes:
    """Return one server-sent event. data: JSON, which has no line breaks."""
    head = f"event: {event}\n" + (f"id: {number}\n" if number else "")
    return head.encode() + b"data: " + data + b"\n\n"


class Readers:
    """Counts the readers of streams. most: at once."""

    def __init__(self, most: int) -> None:
        self.most = max(most, 1)
        self.count = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Take a place; False: there is none."""
        with self._lock:
            is_free = self.count < self.most and not self.closing.is_set()
            self.count += is_free
            return is_free

    def leave(self) -> None:
        """Give a place back."""
        with self._lock:
            self.count -= 1

    def ticks(self) -> Iterator[bool]:
        """Yield until the reader must go; True: the coordinator stops, which comes once."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while time.monotonic() < deadline:
            if self.closing.wait(TICK_SECONDS):
                yield True
                return
            yield False


class RunStream:
    """What one reader hears of one run. since: the id of its last message, or empty."""

    def __init__(self, documents: Documents, readers: Readers, run_id: str, since: str) -> None:
        self._documents, self._readers, self._run_id = documents, readers, run_id
        self._cursor = cursor_of(since)
        self._status = b""

    def __call__(self, send: Send) -> None:
        """Send what the run does until it has ended, or the reader has gone."""
        history = self._documents.history(self._run_id)
        self._send_history(history, send)
        sent_at, due = time.monotonic(), 0.0
        for is_closing in self._readers.ticks():
            now = time.monotonic()
            is_over = self._documents.has_ended(self._run_id)
            if not (is_over or is_closing or now >= due):
                continue
            try:
                current = self._documents.history(self._run_id)
                news = self._documents.status(self._run_id, is_over)
            except Refusal:  # the coordinator stops, or has forgotten the run
                current, news = history, b""
            due = now + UPDATE_SECONDS + len(news) / LARGE_BYTES
            if current is not history:  # the run was started again with other networks
                history, self._cursor = current, ()
            history.take_in()
            if history.version != self._cursor or is_over or is_closing:
                self._send_history(history, send)
                sent_at = now
            if news and news != self._status:
                self._status, sent_at = news, now
                send(message("status", news))
            if is_over or is_closing:
                send(message("end" if is_over else "stopping", b"{}"))
                return
            if now - sent_at >= HEARTBEAT_SECONDS:
                send(HEARTBEAT)
                sent_at = now

    def _send_history(self, history: RunHistory, send: Send) -> None:
        part = history.document(self._cursor)
        number = str(part["cursor"])
        send(message("history", encoded(part), number))
        self._cursor = cursor_of(number)


def stream_runs(documents: Documents, readers: Readers, send: Send) -> None:
    """Send the list of runs whenever it changes."""
    sent, sent_at, due = b"", time.monotonic(), 0.0
    for is_closing in readers.ticks():
        now = time.monotonic()
        if is_closing:
            send(message("stopping", b"{}"))
        elif now >= due:
            due = now + LIST_SECONDS
            if (news := documents.runs()) != sent:
                sent, sent_at = news, now
                send(message("runs", news))
            elif now - sent_at >= HEARTBEAT_SECONDS:
                send(HEARTBEAT)
                sent_at = now


def cursor_of(text: str) -> tuple[int, ...]:
    """Return the numbers of a message's id; empty if it is none."""
    parts = text.split(".")
    if len(parts) != 5 or not all(p.isascii() and p.isdigit() and len(p) < 19 for p in parts):
        return ()
    return tuple(map(int, parts))


Stream = Callable[[Send], None]
