"""Who may call which method: bearer tokens, checked once per call or stream.

A caller sends its token as gRPC metadata, `authorization: Bearer TOKEN`. There are two roles. A
worker trains. An operator may train too, and may tell runs and the coordinator what to do:

    without any token       every method is free, except Drain
    with a worker's token   Join and Train need a worker's token or an operator's
    with any token          to read what runs do needs one of them
    SendCommand             decides by itself (`Security.role_of`)
    health checks           are always free

Not covered: whether a caller belongs to a run (`identity.py`); TLS (`tls.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from switokd.errors import UsageError
from switokd.services.coordinator.authorisation import CallerRole
from switokd.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["CoordinatorService"].full_name
HEALTH = "/grpc.health.v1.Health/"
LEAST_LETTERS = 16
MOST_BYTES = 4096
"""Length of a token file; it may hold several tokens, one a line, while they are replaced."""
TOKEN = re.compile(rb"[\x21-\x7e]{16,512}")
"""What a token is made of; the same as in an HTTP header, without spaces."""

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
Metadata = Iterable[tuple[str, Any]]


class Tokens:
    """The tokens of one role: from a file, which is read again when it changes, or from a text.

    what: names their source in messages. UsageError if there is none that can be used.
    """

    def __init__(self, what: str, path: Path | None = None, text: str = "") -> None:
        self._what, self._path = what, path
        self._digests: tuple[bytes, ...] = ()
        self._seen: object = None
        if path is None:
            self._digests = self._parse(text.encode(errors="replace"))
            return
        try:
            self._read(path)
        except OSError as error:
            raise UsageError(f"{what} {path}: {error.strerror}") from None

    def has(self, token: bytes) -> bool:
        """Return whether a token is one of these, in a time that does not depend on which."""
        if self._path is not None:
            self._read_again(self._path)
        digest = hashlib.sha256(token).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(found)

    def _read_again(self, path: Path) -> None:
        """Read the file if it has changed; the tokens stay if it cannot be read."""
        try:
            self._read(path)
        except (OSError, UsageError) as error:
            log.error("%s %s: %s; its old tokens stay valid", self._what, path, error)

    def _read(self, path: Path) -> None:
        found = os.stat(path)
        seen = (found.st_mtime_ns, found.st_ino, found.st_size)
        if seen == self._seen:
            return
        self._seen = seen
        if found.st_size > MOST_BYTES:
            raise UsageError(
                f"{self._what} {path}: a file of tokens has {MOST_BYTES} bytes at most"
            )
        warn_of_readers(path, found, self._what)
        self._digests = self._parse(path.read_bytes(), str(path))

    def _parse(self, text: bytes, where: str = "") -> tuple[bytes, ...]:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines or not all(TOKEN.fullmatch(line) for line in lines):
            raise UsageError(
                f"{self._what}{' ' * bool(where)}{where}: a token has {LEAST_LETTERS} to 512 "
                "printable characters without spaces, one token a line; make one with: "
                "openssl rand -hex 32"
            )
        return tuple(hashlib.sha256(line).digest() for line in lines)


def warn_of_readers(path: Path, found: os.stat_result, what: str) -> None:
    """Log a warning if other users may read a file with a secret."""
    if stat.S_ISREG(found.st_mode) and found.st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("%s %s: other users may read it; chmod 600 %s", what, path, path)


class Security(grpc.aio.ServerInterceptor):
    """Refuses calls whose token does not allow the method. None: nobody has this role."""

    def __init__(self, worker: Tokens | None = None, operator: Tokens | None = None) -> None:
        self._tokens = {CallerRole.OPERATOR: operator, CallerRole.WORKER: worker}
        self.has_tokens = bool(worker or operator)
        """Whether this coordinator knows a token."""

    def role_of(self, context: Any) -> CallerRole | None:
        """Return the role of a call's token; None if it has no token, or a wrong one."""
        token = _token(context.invocation_metadata() or ())
        return self._role(token) if token else None

    def _role(self, token: bytes) -> CallerRole | None:
        for role, tokens in self._tokens.items():
            if tokens and tokens.has(token):
                return role
        return None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the method's handler, or one that refuses the call and says why."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        refusal = self.refusal(method, handler_call_details.invocation_metadata or ())
        if refusal is None or handler is None:
            return handler
        return _refusing(handler, method, *refusal)

    def refusal(self, method: str, metadata: Metadata) -> tuple[grpc.StatusCode, str] | None:
        """Return the status and the sentence that refuse a call; None allows it."""
        if method.startswith(HEALTH):
            return None
        name = method.removeprefix(f"/{SERVICE}/")
        token = _token(metadata)
        role = self._role(token) if token and self.has_tokens else None
        unauthenticated, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
        if token and role is None and self.has_tokens:
            return unauthenticated, "the token is not one of this coordinator's; was it replaced?"
        if name == "Drain" and role is not CallerRole.OPERATOR:
            if self._tokens[CallerRole.OPERATOR] is None:
                return denied, (
                    "only an operator may do this, and this coordinator knows none: start it with "
                    "--operator-token-file, or send it SIGTERM"
                )
            return (denied if role else unauthenticated), "this needs an operator's token"
        if role is not None or not self.has_tokens or name == "SendCommand":
            return None
        if name in ("Join", "Train") and self._tokens[CallerRole.WORKER] is None:
            return None
        return unauthenticated, "this coordinator asks for a token, and the call has none"


def _token(metadata: Metadata) -> bytes:
    """Return the bearer token of a call; empty if it has none."""
    for key, value in metadata:
        if key == "authorization":
            return bearer(value if isinstance(value, str) else "")
    return b""


def bearer(header: str) -> bytes:
    """Return the token of an authorization header; empty if it has none."""
    kind, _, token = header.partition(" ")
    return token.strip().encode(errors="replace") if kind.lower() == "bearer" else b""


def _refusing(handler: Handler, method: str, code: grpc.StatusCode, reason: str) -> Handler:
    """Return a handler of the same kind that ends every call with a status."""

    async def refuse(_: object, context: Any) -> None:
        log.warning("refused %s from %s: %s", method, context.peer(), reason)
        await context.abort(code, reason)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(refuse)


OPEN = Security()
"""Knows no token."""
