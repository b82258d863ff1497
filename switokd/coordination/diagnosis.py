"""Says why a coordinator that is there cannot be used: TLS on one side only, a wrong certificate.

gRPC tries again and again, and says little. So the client looks for itself, with one connection
beside it.

Not covered: what the coordinator answers to a call (`connection.py`).
"""

from __future__ import annotations

import socket
import ssl
from contextlib import ExitStack, suppress
from datetime import datetime, timezone

from cryptography import x509

from switokd.coordination.credentials import Credentials
from switokd.errors import UsageError
from switokd.services.coordinator.addresses import host_of

SECONDS = 2.0
"""Longest wait for each step of the connection."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of gRPC begins: HTTP/2 with empty settings."""

ALERT = b"\x15"
"""How an answer begins with which a server of TLS refuses a connection."""


def problem_with(credentials: Credentials) -> UsageError | None:
    """Return why the coordinator cannot be used although it listens; None: not known.

    Takes a few seconds at most. A coordinator that does not listen yet is no problem.
    """
    try:
        connection = socket.create_connection(_host_and_port(credentials.address), SECONDS)
    except OSError:
        return None
    with connection:
        found = (
            _of_tls(credentials, connection)
            if credentials.uses_tls
            else _of_text(credentials, connection)
        )
    if not found:
        return None
    where = f"the coordinator at {credentials.address}"
    return UsageError(f"{where} {found}", every_rank=False)


def _host_and_port(address: str) -> tuple[str, int]:
    return host_of(address), int(address.rpartition(":")[2])


def _of_text(credentials: Credentials, connection: socket.socket) -> str:
    """Say that the coordinator speaks TLS, if it does not answer in plain text."""
    with suppress(OSError):
        connection.settimeout(SECONDS)
        connection.sendall(PREFACE)
        if connection.recv(9)[:1] not in (b"", ALERT):  # the settings of HTTP/2
            return ""
    if _certificate(credentials) is None:
        return ""
    return "asks for TLS: set coordinator.tls.ca to the file with its CA"


def _of_tls(credentials: Credentials, connection: socket.socket) -> str:
    """Say what is wrong with the coordinator's certificate, or with the client's."""
    try:
        context = ssl.create_default_context(cadata=credentials.roots().decode())
        context.set_alpn_protocols(["h2"])
        _add_identity(context, credentials)
    except (ssl.SSLError, ValueError) as error:
        return f"cannot be reached: {_of_files(credentials, error)}"
    host, _ = _host_and_port(credentials.address)
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            # In TLS 1.3 a coordinator refuses a client after the handshake; gRPC does it without a
            # word. It sends the settings of HTTP/2 if it accepts the client.
            return "" if secured.recv(9) else _of_client(credentials)
    except ssl.SSLCertVerificationError as error:
        return _of_certificate(credentials, error)
    except ssl.SSLError as error:
        return _of_handshake(credentials, error)
    except OSError:
        return ""


def _add_identity(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Let a context show the client's certificate."""
    key, certificate = credentials.identity()
    if key is None or certificate is None:
        return
    context.load_cert_chain(credentials.certificate, credentials.key, password=lambda: b"")


def _of_files(credentials: Credentials, error: Exception) -> str:
    """Say which of the client's own files is wrong."""
    reason = getattr(error, "reason", None) or str(error)
    text = credentials.roots()
    if b"BEGIN CERTIFICATE" not in text:
        return f"coordinator.tls.ca: {credentials.ca} holds no certificate in PEM format"
    return (
        f"coordinator.tls.certificate: {credentials.certificate} and {credentials.key} are not a "
        f"certificate and its key ({reason})"
    )


def _of_certificate(credentials: Credentials, error: ssl.SSLCertVerificationError) -> str:
    """Say why the coordinator's certificate is not accepted."""
    found = error.verify_message.lower()
    ca = f"coordinator.tls.ca ({credentials.ca or 'made by rank 0'})"
    if "expired" in found:
        return (
            f"has a certificate that expired{_end_of(credentials)}: issue a new one; the "
            "coordinator reads it without a restart"
        )
    if "not yet valid" in found:
        return "has a certificate that is not valid yet: are the clocks right?"
    if "mismatch" in found or "not valid for" in found:
        host, _ = _host_and_port(credentials.address)
        return (
            f"has a certificate for other names than {host}: use one of its names in "
            f"coordinator.address, or issue one for {host} ('switokd certificates' with --host)"
        )
    return (
        f"has a certificate that was not issued by {ca}: name the CA of this coordinator "
        f"({error.verify_message})"
    )


def _of_handshake(credentials: Credentials, error: ssl.SSLError) -> str:
    """Say why the handshake failed."""
    reason = (error.reason or "").upper()
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
        return (
            "speaks no TLS: leave coordinator.tls out, or give the coordinator a certificate "
            "(--tls-certificate, --tls-key)"
        )
    if "ALERT" in reason and "INTERNAL" not in reason:
        return _of_client(credentials)
    return ""


def _of_client(credentials: Credentials) -> str:
    """Say why the coordinator refuses the client after it has proved who it is itself."""
    _, certificate = credentials.identity()
    if certificate is None:
        return (
            "asks for a certificate of the ranks: set coordinator.tls.certificate and "
            "coordinator.tls.key"
        )
    with suppress(ValueError):
        end = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
        if end < datetime.now(timezone.utc):
            return (
                f"refuses coordinator.tls.certificate ({credentials.certificate}), which expired "
                f"on {end:%Y-%m-%d}: issue a new one"
            )
    return (
        f"refuses coordinator.tls.certificate ({credentials.certificate}): it must be issued by "
        "the CA that the coordinator was given with --tls-client-ca"
    )


def _end_of(credentials: Credentials) -> str:
    """Return when the coordinator's certificate expired, as " on DAY"; empty if unknown."""
    with suppress(ValueError):
        if found := _certificate(credentials):
            end = x509.load_der_x509_certificate(found).not_valid_after_utc
            return f" on {end:%Y-%m-%d}"
    return ""


def _certificate(credentials: Credentials) -> bytes | None:
    """Return the coordinator's certificate, which may be anyone's; None if it shows none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # only to look: nothing is sent
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with suppress(OSError), ExitStack() as stack:
        address = _host_and_port(credentials.address)
        plain = stack.enter_context(socket.create_connection(address, SECONDS))
        secured = stack.enter_context(context.wrap_socket(plain))
        return secured.getpeercert(binary_form=True)
    return None
