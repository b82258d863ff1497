"""How the coordinator's two ports are protected: TLS, tokens, and where plain text is allowed.

Not covered: the run's secret (`identity.py`), which every run has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from switokd.errors import UsageError
from switokd.services.coordinator.addresses import is_loopback
from switokd.services.coordinator.security import OPEN, Security, Tokens
from switokd.services.coordinator.tls import Certificates


@dataclass(frozen=True)
class Access:
    """What callers must show at each port. The default asks for nothing."""

    security: Security = OPEN
    certificates: Certificates | None = None
    """None: plain text."""
    metrics: Tokens | None = None
    """Tokens that may read /metrics; None: everyone may, unless client certificates are asked for.
    """
    http_host: str = ""
    """Address of the HTTP port; empty: that of the gRPC port."""
    allow_plaintext: bool = False
    """Whether other machines may reach the ports in plain text."""
    reflection: bool = False
    """Whether anyone may ask for the contract by gRPC reflection."""

    def http_at(self, host: str) -> tuple[str, Certificates | None]:
        """Return address and certificate of the HTTP port; host: address of the gRPC port.

        If the HTTP port alone is on loopback, it needs no certificate.
        """
        if self.http_host and is_loopback(self.http_host):
            return self.http_host, None
        return self.http_host or host, self.certificates

    def is_open_at(self, host: str) -> bool:
        """Whether the HTTP port asks nothing of callers. host: address of the gRPC port."""
        return self.metrics is None and self.http_at(host)[1] is None

    def page_at(self, host: str, http_port: int) -> str:
        """Return the address of the status page. host: address of the gRPC port."""
        name, certificates = self.http_at(host)
        if name in ("0.0.0.0", "::"):
            name = "localhost"
        name = f"[{name}]" if ":" in name else name
        return f"{'https' if certificates else 'http'}://{name}:{http_port}/"

    def check(self, host: str) -> None:
        """UsageError if other machines would see plain text that is not allowed, or tokens."""
        hosts = {"--host": host, "--http-host": self.http_host}
        option = next((o for o, h in hosts.items() if h and not is_loopback(h)), None)
        if option is None or self.certificates:
            return
        remedy = "give it --tls-certificate and --tls-key ('switokd certificates' makes them)"
        where = f"{option} {hosts[option]}"
        if self.security.has_tokens or self.metrics:
            raise UsageError(
                f"{where}: tokens would cross the network in plain text; {remedy}, or listen on "
                "127.0.0.1"
            )
        if not self.allow_plaintext:
            raise UsageError(
                f"{where}: other machines would reach this coordinator in plain text; {remedy}, or "
                "--allow-plaintext on a network where everyone is trusted"
            )


FREE = Access()
"""Asks for nothing."""


def tokens_of(option: str, path: Path | None, variable: str = "") -> Tokens | None:
    """Return the tokens of a file, else of an environment variable; None if there are none.

    The variable is removed, so that no child process has it. UsageError as `Tokens`.
    """
    text = os.environ.pop(variable, "") if variable else ""
    if path is not None:
        return Tokens(option, path)
    return Tokens(variable, text=text) if text else None
