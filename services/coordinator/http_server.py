"""The HTTP server of /metrics and /healthz.

Not covered: TLS and authentication.
"""

from __future__ import annotations

import threading
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer


class _QuietHandler(WSGIRequestHandler):
    """Writes no log line per request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve_http(
    registry: CollectorRegistry, host: str, port: int
) -> tuple[int, ThreadingWSGIServer]:
    """Serve /metrics and /healthz on daemon threads; return the port and the server.

    port: 0 chooses a free one. OSError if the port is in use.
    """
    metrics = make_wsgi_app(registry)

    def app(environ, start_response):  # type: ignore[no-untyped-def]
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        status, body = (
            ("200 OK", b"ok\n")
            if path == "/healthz"
            else ("404 Not Found", b"see /metrics, /healthz\n")
        )
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [body]

    server = make_server(host, port, app, ThreadingWSGIServer, handler_class=_QuietHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port, server
