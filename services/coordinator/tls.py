"""The certificate of the coordinator's two ports. It is read again when its files change.

The files are looked at before every handshake. Connections that are open stay as they are. A pair
of files that cannot be used, such as a new certificate with the old key, is reported once, and the
one before stays in use.

Not covered: making certificates (`switokd certificates`); lists of revoked certificates.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import grpc

from switokd.errors import UsageError
from switokd.services.coordinator.security import warn_of_readers

log = logging.getLogger(__name__)

SOON = timedelta(days=14)
"""A certificate that expires sooner than this is mentioned in the log."""


@dataclass(frozen=True)
class TlsFiles:
    """Files in PEM format."""

    certificate: Path
    """The certificate, and those of the authorities between it and the root."""
    key: Path
    client_ca: Path | None = None
    """Authorities whose certificates callers must have; None: callers need no certificate."""


@dataclass(frozen=True)
class _Loaded:
    """What was read from the files together."""

    credentials: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext
    expires: datetime


class Certificates:
    """The certificate in use. UsageError if the files cannot be used."""

    def __init__(self, files: TlsFiles, clock: Callable[[], datetime] | None = None) -> None:
        self._files = files
        self._clock = clock or (lambda: datetime.now(timezone.utc))
        self._lock = threading.Lock()  # gRPC asks on threads of its own
        self._problem = ""
        self._seen = self._look()
        self._loaded = self._load()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return what a gRPC server needs; it asks for a newer certificate by itself."""
        served = self._loaded

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            current = self._current()
            if current is served:
                return None
            served = current
            return current.credentials

        return grpc.dynamic_ssl_server_credentials(
            served.credentials,
            newer,  # type: ignore[arg-type]  # None is allowed, and means no change
            self._files.client_ca is not None,
        )

    def context(self) -> ssl.SSLContext:
        """Return what one more connection over HTTP needs.

        A caller without a certificate gets through the handshake: `has_proof` tells.
        """
        return self._current().context

    @property
    def expires(self) -> datetime:
        """When the certificate in use expires."""
        return self._current().expires

    @property
    def asks_for_one(self) -> bool:
        """Whether callers must have a certificate."""
        return self._files.client_ca is not None

    @staticmethod
    def has_proof(connection: object) -> bool:
        """Return whether the caller of a connection over HTTP has shown a valid certificate."""
        return isinstance(connection, ssl.SSLSocket) and bool(connection.getpeercert())

    def _current(self) -> _Loaded:
        """Return what is in the files; what was there before if they cannot be used now."""
        with self._lock:
            try:
                seen = self._look()
                if seen != self._seen:
                    self._seen = seen
                    self._loaded = self._load()
                    self._problem = ""
                    log.info("--tls-certificate %s: read again", self._files.certificate)
            except UsageError as error:
                if str(error) != self._problem:  # once, not for every connection
                    self._problem = str(error)
                    log.error("%s; the certificate before stays in use", error)
            return self._loaded

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        """Return what changes when a file is replaced."""
        found = []
        for option, path in self._paths():
            try:
                status = os.stat(path)
            except OSError as error:
                raise UsageError(f"{option} {path}: {error.strerror}") from None
            found.append((status.st_mtime_ns, status.st_ino, status.st_size))
        return tuple(found)

    def _paths(self) -> list[tuple[str, Path]]:
        paths = [("--tls-certificate", self._files.certificate), ("--tls-key", self._files.key)]
        client_ca = self._files.client_ca
        return [*paths, ("--tls-client-ca", client_ca)] if client_ca else paths

    def _load(self) -> _Loaded:
        texts = [_read(option, path) for option, path in self._paths()]
        warn_of_readers(self._files.key, os.stat(self._files.key), "--tls-key")
        certificate, key, client_ca = texts[0], texts[1], texts[2] if len(texts) > 2 else None
        context = self._context()
        expires = self._expires(certificate)
        credentials = grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)
        return _Loaded(credentials, context, expires)

    def _context(self) -> ssl.SSLContext:
        """Return the context for HTTP; it also shows whether the files fit together."""
        files = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # Without a password, OpenSSL would ask for one on the terminal.
            context.load_cert_chain(files.certificate, files.key, password=lambda: b"")
        except (ssl.SSLError, ValueError, OSError) as error:
            reason = getattr(error, "reason", None) or str(error)
            raise UsageError(
                f"--tls-certificate {files.certificate}, --tls-key {files.key}: these are not a "
                f"certificate and its key in PEM format, without a password ({_words(reason)})"
            ) from None
        if files.client_ca:
            try:
                context.load_verify_locations(files.client_ca)
            except (ssl.SSLError, OSError) as error:
                reason = getattr(error, "reason", None) or str(error)
                raise UsageError(
                    f"--tls-client-ca {files.client_ca}: this holds no certificate in PEM format "
                    f"({_words(reason)})"
                ) from None
            context.verify_mode = ssl.CERT_OPTIONAL  # /healthz is for everyone
        return context

    def _expires(self, certificate: bytes) -> datetime:
        """Return when a certificate expires; log if that is soon, or past."""
        from cryptography import x509  # takes a tenth of a second, which only TLS costs

        found = x509.load_pem_x509_certificate(certificate)
        begins, ends, now = found.not_valid_before_utc, found.not_valid_after_utc, self._clock()
        where = f"--tls-certificate {self._files.certificate}"
        if now > ends:  # it may be replaced while the coordinator runs
            log.error("%s: it expired on %s, and every caller will refuse it", where, _day(ends))
        elif now < begins:
            log.error("%s: it is not valid before %s; is the clock right?", where, _day(begins))
        elif ends - now < SOON:
            log.warning("%s: it expires on %s", where, _day(ends))
        return ends


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from None


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _words(reason: str) -> str:
    """Return OpenSSL's reason as words: KEY_VALUES_MISMATCH is "key values mismatch"."""
    return reason.replace("_", " ").lower() if reason.isupper() else reason
