"""Which requests of browsers are answered: none that another site's page has made.

A page of another site can let its name point to 127.0.0.1 ("DNS rebinding"); the browser then takes
both for one site. Such a request names the other site as its host. Where a token or a certificate
is asked for, it gets nothing anyhow.

Not covered: who may read (`http_server.py`).
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from switokd.services.coordinator.http_answer import HttpRequest

INSIDE = (".localhost", ".svc", ".cluster.local")
"""Ends of names that belong to no site of the internet."""


def refusal(request: HttpRequest, is_open: bool) -> str:
    """Say why a request is not answered; empty if it is.

    is_open: whether everyone may read, in plain text.
    """
    site = request.header("sec-fetch-site")
    if site not in ("", "same-origin", "none"):
        return "a page of another site has asked: this coordinator answers only its own page"
    host, origin = request.header("host").lower(), request.header("origin").lower()
    if origin and origin.partition("://")[2] != host:
        return "a page of another site has asked: this coordinator answers only its own page"
    if is_open and not _is_own(host):
        return (
            f"this coordinator does not answer as {host[:99]!r}: open it by its address or as "
            "localhost, or let it ask for a token (--metrics-token-file)"
        )
    return ""


def _is_own(host: str) -> bool:
    """Whether a name can only be that of this machine, or of a private network."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        own = socket.gethostname().lower()
        return "." not in name or name.endswith(INSIDE) or name == own
    return True
