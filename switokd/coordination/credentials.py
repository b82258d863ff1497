"""What a client shows to its coordinator, and what it expects of it: certificates and a token.

Files are read again for a new connection and for every call, so that they can be replaced while a
run goes on.

Not covered: the run's secret, which is part of the messages.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from switokd.coordination.membership import Endpoint
from switokd.coordination.tokens import (
    CA,
    CERTIFICATE,
    KEY,
    TOKEN,
    TOKEN_FILE,
    token_of_environment,
)
from switokd.errors import UsageError
from switokd.services.coordinator.addresses import host_of, is_loopback

if TYPE_CHECKING:  # a command of an operator does without the configuration
    from switokd.config.sections import Coordinator

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Credentials:
    """What a client shows, and whom it trusts. The paths are files in PEM format."""

    address: str
    """HOST:PORT of the coordinator."""
    ca: str = ""
    """CA of the coordinator's certificate; empty: no TLS."""
    certificate: str = ""
    """The client's certificate; empty: none."""
    key: str = ""
    token_file: str = ""
    """File with the client's token; empty: SWITOKD_TOKEN, if it is set."""
    ca_text: str = field(default="", repr=False)
    """The CA itself instead of its file; of a coordinator that rank 0 has started."""
    token: str = field(default="", repr=False)
    """The token itself, likewise."""

    @classmethod
    def of(cls, endpoint: Endpoint, settings: Coordinator) -> Credentials:
        """Return what the run file says, or what rank 0 has made for its own coordinator."""
        if settings.address == "auto":
            return cls(endpoint.grpc, ca_text=endpoint.ca, token=endpoint.token)
        tls = settings.tls
        return cls(
            endpoint.grpc,
            tls.ca or "",
            tls.certificate or "",
            tls.key or "",
            settings.token_file or "",
        )

    @classmethod
    def of_operator(cls, address: str) -> Credentials:
        """Return what the environment says of the one who gives a command."""
        files = (os.environ.get(name, "") for name in (CA, CERTIFICATE, KEY, TOKEN_FILE))
        return cls(address, *files)

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted, and the coordinator proves who it is."""
        return bool(self.ca or self.ca_text)

    def seen(self) -> Sequence[object]:
        """Return what changes when a file of the connection is replaced."""
        stamps: list[object] = []
        for path in filter(None, (self.ca, self.certificate, self.key)):
            try:
                status = os.stat(path)
            except OSError:
                return ()
            stamps.append((path, status.st_mtime_ns, status.st_ino))
        return stamps

    def channel(self, options: Sequence[tuple[str, int]]) -> grpc.Channel:
        """Return a channel to the coordinator; UsageError if a file cannot be read."""
        if not self.uses_tls:
            return grpc.insecure_channel(self.address, options=options)
        secured = grpc.ssl_channel_credentials(self.roots(), *self.identity())
        return grpc.secure_channel(self.address, secured, options=options)

    def roots(self) -> bytes:
        """Return the certificates of the CA; UsageError as `channel`."""
        return self.ca_text.encode() or _read("coordinator.tls.ca", self.ca)

    def identity(self) -> tuple[bytes, bytes] | tuple[None, None]:
        """Return the client's private key and certificate, if it has one; UsageError likewise."""
        if not self.certificate:
            return None, None
        return (
            _read("coordinator.tls.key", self.key),
            _read("coordinator.tls.certificate", self.certificate),
        )

    def metadata(self) -> Metadata:
        """Return the token as metadata of a call; UsageError if it would not be safe there."""
        token, where = self.token, ""
        if not token and self.token_file:
            where = f"coordinator.token_file {self.token_file}"
            lines = _read("coordinator.token_file", self.token_file).split()
            token = lines[0].decode(errors="replace") if lines else ""
        elif not token:
            where = f"environment variable {TOKEN}"
            token = token_of_environment()
            if not token:
                return ()
        if not token or not token.isascii() or not token.isprintable():
            raise UsageError(
                f"{where}: this is no token: it has printable characters without spaces",
                every_rank=False,
            )
        if not self.uses_tls and not is_loopback(host_of(self.address)):
            raise UsageError(
                f"{where}: the token would go to {self.address} in plain text; set "
                "coordinator.tls.ca to the file with the coordinator's CA"
            )
        return (("authorization", f"Bearer {token}"),)


def _read(setting: str, path: str) -> bytes:
    """Return a file's content; UsageError if it cannot be read. Other ranks may have the file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = f"{setting}: {path} cannot be read: {error.strerror}"
        raise UsageError(reason, every_rank=False) from None
