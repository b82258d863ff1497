"""The HTTP server of /metrics, /healthz and the status page.

A request must arrive within a time and a size. If there are too many connections, the one ends that
has sent no whole request for longest. Many scrapes take no more than a fifth of a processor.

With a certificate it speaks HTTPS. If callers must prove who they are, /metrics asks for it, and
/healthz answers everyone.

Not covered: what counts as a proof (`tls.py`, `security.py`); the pages (`status_page/`).
"""

from __future__ import annotations

import gzip
import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from socketserver import ThreadingTCPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from switokd.services.coordinator.http_answer import TEXT, Answer, HttpRequest, Pages, header
from switokd.services.coordinator.limits import DEFAULTS, Limits
from switokd.services.coordinator.security import Tokens, bearer
from switokd.services.coordinator.tls import Certificates

SHARE = 0.2
"""Share of the time that may be spent on making metrics; scrapes in between get the last ones."""
SEND_SECONDS = 10.0
"""A client that reads more slowly loses its answer."""
METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"

PROOF_IS_NEEDED = b"/metrics asks for a token (Authorization: Bearer), or a client's certificate\n"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HttpAccess:
    """What a caller must show."""

    certificates: Certificates | None = None
    """None: the port speaks plain text."""
    tokens: Tokens | None = None
    """One of them, or a client's certificate if that is asked for, opens /metrics."""

    def may_read(self, connection: socket.socket, head: bytes) -> bool:
        """Return whether a request may read the metrics."""
        asks = self.certificates is not None and self.certificates.asks_for_one
        if asks and Certificates.has_proof(connection):
            return True
        if self.tokens is None:
            return not asks
        return self.tokens.has(bearer(header(head, "authorization")))


EVERYONE = HttpAccess()


class HttpServer(ThreadingTCPServer):
    """Serves one request per connection, on a thread each."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self,
        registry: CollectorRegistry,
        address: tuple[str, int],
        limits: Limits,
        access: HttpAccess = EVERYONE,
        pages: Pages | None = None,
    ) -> None:
        self._registry, self._limits, self._access = registry, limits, access
        self._pages = pages
        self._lock = threading.Lock()
        self._waiting: dict[socket.socket, None] = {}
        """Connections that have sent no whole request, the oldest first."""
        self._open = 0
        self._metrics, self._fresh_until = b"", 0.0
        self._metrics_lock = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, None)  # type: ignore[arg-type]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection on a thread; end the oldest one if there are too many."""
        with self._lock:
            if self._open >= self._limits.max_http_connections:
                if not self._waiting:  # all others are being answered
                    self.shutdown_request(request)
                    return
                oldest = next(iter(self._waiting))
                del self._waiting[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open += 1
            self._waiting[request] = None
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, then forget it."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open -= 1
                self._waiting.pop(request, None)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Read a request and answer it; a client that goes away is no error."""
        with suppress(OSError):
            connection = self._secured(request)
            try:
                head = self._read(connection)
                with self._lock:
                    if request not in self._waiting:
                        return
                    del self._waiting[request]
                answer = self._answer(head, self._access.may_read(connection, head))
                connection.settimeout(SEND_SECONDS)
                try:
                    connection.sendall(_encoded(answer, head))
                    if answer.stream and not head.lower().startswith(b"head "):
                        answer.stream(connection.sendall)
                finally:
                    answer.done()
            finally:
                if connection is not request:
                    connection.close()

    def _secured(self, request: socket.socket) -> socket.socket:
        """Agree on TLS, here in the connection's thread, so that nobody holds up another caller.

        OSError for a caller that speaks no TLS, or has gone.
        """
        if (certificates := self._access.certificates) is None:
            return request
        request.settimeout(self._limits.http_header_seconds)
        return certificates.context().wrap_socket(request, server_side=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error that was not expected."""
        log.exception("an HTTP request failed")

    def _read(self, connection: socket.socket) -> bytes:
        """Return a request up to its empty line, or what has come within the limits."""
        deadline = time.monotonic() + self._limits.http_header_seconds
        head = b""
        while b"\r\n\r\n" not in head and b"\n\n" not in head:
            left = deadline - time.monotonic()
            if left <= 0 or len(head) > self._limits.max_http_header_bytes:
                break
            connection.settimeout(left)
            try:
                received = connection.recv(4096)
            except TimeoutError:
                break
            if not received:
                raise ConnectionError
            head += received
        return head

    def _answer(self, head: bytes, may_read: bool) -> Answer:
        """Answer a request. may_read: whether it may read the metrics."""
        if len(head) > self._limits.max_http_header_bytes:
            text = f"the request is larger than {self._limits.max_http_header_bytes} bytes "
            text += "(--max-http-header-bytes)\n"
            return Answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, TEXT, text.encode())
        if b"\r\n\r\n" not in head and b"\n\n" not in head:
            text = f"no whole request within {self._limits.http_header_seconds:g} s "
            text += "(--http-header-seconds)\n"
            return Answer(HTTPStatus.REQUEST_TIMEOUT, TEXT, text.encode())
        method, target, version = (*head.split(b"\n", 1)[0].split(), b"", b"", b"")[:3]
        if not version.startswith(b"HTTP/1."):
            return Answer(HTTPStatus.BAD_REQUEST, TEXT, b"not a request of HTTP/1.0 or 1.1\n")
        if method not in (b"GET", b"HEAD"):
            return Answer(HTTPStatus.METHOD_NOT_ALLOWED, TEXT, b"only GET\n")
        path = target.partition(b"?")[0]
        if path == b"/metrics":
            if not may_read:
                return Answer(HTTPStatus.UNAUTHORIZED, TEXT, PROOF_IS_NEEDED)
            return Answer(HTTPStatus.OK, METRICS_TEXT, self._fresh_metrics())
        if path == b"/healthz":
            return Answer(HTTPStatus.OK, TEXT, b"ok\n")
        page = self._pages.answer(HttpRequest(target, head, may_read)) if self._pages else None
        return page or Answer(HTTPStatus.NOT_FOUND, TEXT, b"see /, /metrics, /healthz\n")

    def _fresh_metrics(self) -> bytes:
        """Return the metrics; one thread at a time makes them, for `SHARE` of the time."""
        with self._metrics_lock:
            if (began := time.monotonic()) >= self._fresh_until:
                self._metrics = generate_latest(self._registry)
                ended = time.monotonic()
                self._fresh_until = ended + (ended - began) * (1 / SHARE - 1)
            return self._metrics


def _encoded(answer: Answer, head: bytes) -> bytes:
    status, body = answer.status, answer.body
    lower = head.lower()
    encoding = ""
    if len(body) > 1024 and b"\naccept-encoding:" in lower and b"gzip" in lower:
        body, encoding = gzip.compress(body, 1), "Content-Encoding: gzip\r\n"
    length = "" if answer.stream else f"Content-Length: {len(body)}\r\n"
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {answer.content_type}\r\n"
        f"{encoding}{length}{answer.headers}Connection: close\r\n\r\n"
    )
    return lines.encode() + (b"" if lower.startswith(b"head ") else body)


def serve_http(
    registry: CollectorRegistry,
    host: str,
    port: int,
    limits: Limits = DEFAULTS,
    access: HttpAccess = EVERYONE,
    pages: Pages | None = None,
) -> tuple[int, HttpServer]:
    """Serve /metrics, /healthz and pages on daemon threads; return the port and the server.

    port: 0 chooses a free one. pages: answers all other paths. OSError if the port is in use.
    """
    server = HttpServer(registry, (host, port), limits, access, pages)
    threading.Thread(target=server.serve_forever, daemon=True, name="http").start()
    return int(server.server_address[1]), server
