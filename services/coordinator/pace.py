"""Before any call: how fast its connection may make calls, how many may be open, its request.

A connection that makes calls too fast gets its answers late, and is refused if it goes on. Its
first calls are answered at once; further ones wait in line while many come (`line.py`).

Not covered: messages within a stream (`bucket.py`), streams of ranks (`unattached.py`).
"""

from __future__ import annotations

import asyncio
import inspect
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc

from switokd.services.coordinator.bucket import TokenBucket
from switokd.services.coordinator.limits import Limits, exceeded
from switokd.services.coordinator.line import Line
from switokd.services.coordinator.messages import status_code
from switokd.services.coordinator.refusal import Refusal

MOST_CONNECTIONS = 20_000
"""Connections whose calls are counted; more than may be open."""
MOST_SECONDS = 2.0
"""A call that would have to wait for longer is refused."""
FREE_CALLS, FREE_RATE = 5, 1.0
"""Calls of a connection that need not wait in line: at once, and per second. A rank makes two."""

INVALID = Refusal.Kind.INVALID_ARGUMENT
Handler = Any
"""A method of gRPC: `grpc.RpcMethodHandler`."""
Context = grpc.aio.ServicerContext[Any, Any]


class _Connection(NamedTuple):
    """Tokens of a connection's calls."""

    calls: TokenBucket
    free: TokenBucket


class PaceInterceptor(grpc.aio.ServerInterceptor):
    """Holds back calls of every service, and counts those that are refused.

    own: the service whose streams are limited elsewhere. count: called with the status of each call
    that ends with one.
    """

    def __init__(
        self,
        limits: Limits,
        own: str,
        count: Callable[[grpc.StatusCode | None], None] = lambda code: None,
    ) -> None:
        self._limits, self._own, self._count = limits, f"/{own}/", count
        self._connections: OrderedDict[str, _Connection] = OrderedDict()
        self._line = Line()
        self._open = self._others = 0
        """Open calls, and streams of other services among them."""

    async def intercept_service(
        self,
        continuation: Any,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the method of a call, which waits first if the connection is too fast."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None
        is_own = handler_call_details.method.startswith(self._own)
        if not handler.response_streaming:
            wrapped = self._unary(handler.unary_unary or handler.stream_unary)
        else:
            behavior = handler.unary_stream or handler.stream_stream
            wrapped = self._stream(behavior, is_own)
        make = getattr(grpc, f"{_kind(handler)}_rpc_method_handler")
        read = handler.request_deserializer
        if not handler.request_streaming:
            read = self._reader(read)
        return make(wrapped, read, handler.response_serializer)

    def _reader(self, deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
        """Return a function that reads a request, and returns a refusal instead of an error.

        gRPC writes a traceback for every error of a deserializer, and tells the caller nothing.
        """
        most = self._limits.max_message_bytes

        def read(data: bytes) -> Any:
            if len(data) > most:
                what = f"a message of {len(data)} bytes"
                return exceeded(what, "max_message_bytes", most, INVALID)
            try:
                return deserialize(data) if deserialize else data
            except Exception:  # of whichever version of protobuf
                return Refusal(INVALID, f"{len(data)} bytes that are no message of this method")

        return read

    def _unary(self, behavior: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with self._counted(context), self._admitted(request, context):
                return await behavior(request, context)

        return call

    def _stream(self, behavior: Any, is_own: bool) -> Any:
        async def call(request: Any, context: Context) -> Any:
            admitted = self._admitted(request, context, is_other=not is_own)
            async with self._counted(context), admitted:
                return await behavior(request, context)

        async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
            admitted = self._admitted(request, context, is_other=not is_own)
            async with self._counted(context), admitted:
                async for response in behavior(request, context):
                    yield response

        return generate if inspect.isasyncgenfunction(behavior) else call

    @asynccontextmanager
    async def _counted(self, context: Context) -> AsyncIterator[None]:
        """Count a call that ends with a status, wherever it is refused."""
        try:
            yield
        except grpc.aio.AbortError:
            self._count(context.code())
            raise

    @asynccontextmanager
    async def _admitted(
        self, request: Any, context: Context, is_other: bool = False
    ) -> AsyncIterator[None]:
        """Count a call while it is open, once its connection may make it; abort if there are many.

        request: aborts as well if it could not be read. is_other: whether it is a stream of another
        service.
        """
        await self._pace(context)
        if isinstance(request, Refusal):
            await context.abort(status_code(request), str(request))
        if self._open >= (most := self._limits.max_streams):
            await _abort(context, f"{most} calls are open", "max_streams", most)
        if is_other and self._others >= (most := self._limits.max_unattached_streams):
            what = f"{most} streams of health and reflection are open"
            await _abort(context, what, "max_unattached_streams", most)
        self._open += 1
        self._others += is_other
        try:
            yield
        finally:
            self._open -= 1
            self._others -= is_other

    async def _pace(self, context: Context) -> None:
        """Wait for the call's turn and the connection's rate; abort if that takes too long."""
        peer = context.peer()
        connection = self._connection(peer)
        is_free = not connection.free.take(0)
        if not is_free:
            connection.free.give_back()
        await self._line.enter(peer, is_free)
        if seconds := connection.calls.take(0):
            if seconds > MOST_SECONDS:
                connection.calls.give_back()
                await _abort(context, "calls come too fast", "call_rate", self._limits.call_rate)
            await asyncio.sleep(seconds)

    def _connection(self, peer: str) -> _Connection:
        connection = self._connections.get(peer)
        if connection is None:
            limits = self._limits
            connection = _Connection(
                TokenBucket(limits.call_rate, limits.call_burst), TokenBucket(FREE_RATE, FREE_CALLS)
            )
            self._connections[peer] = connection
            if len(self._connections) > MOST_CONNECTIONS:
                self._connections.popitem(last=False)
        return connection


async def _abort(context: Context, what: str, name: str, limit: float) -> None:
    refusal = exceeded(what, name, limit)
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(refusal))


def _kind(handler: Handler) -> str:
    """Return a method's kind as gRPC writes it: "unary_stream"."""
    ends = handler.request_streaming, handler.response_streaming
    return "_".join("stream" if end else "unary" for end in ends)
