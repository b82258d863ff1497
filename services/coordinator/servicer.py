"""The gRPC service: its methods, as `proto/switokd/v1/coordinator.proto` describes them.

A refused call or stream ends with a gRPC status and one sentence, and harms no other run. If a
rank's stream breaks without a Leave message and the rank does not come back, its run fails.

Not covered: TLS, tokens (`security.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import grpc

from switokd.services.coordinator.admission import Plans
from switokd.services.coordinator.authorisation import CallerRole, check_drain, may_command
from switokd.services.coordinator.messages import status_code
from switokd.services.coordinator.outbox import Outbox, StreamEnd
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.security import OPEN, Security
from switokd.services.coordinator.session import Context, Session
from switokd.services.coordinator.text import sentence
from switokd.services.coordinator.unattached import UnattachedStreams
from switokd.services.coordinator.views import Views
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import command_from_wire

SERVICE = pb.DESCRIPTOR.services_by_name["CoordinatorService"].full_name


class CoordinatorServicer:
    """Methods of the service. Every method changes only `runs`.

    security: knows the callers' roles. stop: ends the coordinator.
    """

    def __init__(
        self,
        runs: RunRegistry,
        security: Security = OPEN,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._runs, self._security, self._stop = runs, security, stop
        self._views = Views(runs)
        self._plans = Plans(runs.limits)
        self._unattached = UnattachedStreams(runs.limits)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service for `add_generic_rpc_handlers`.

        The generated function would serialize every response of Train. Here Train sends bytes,
        which `Session` serializes once per run; so does WatchRun. Train gets bytes as well.
        """
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Join": grpc.unary_unary_rpc_method_handler(
                    self.Join, pb.JoinRequest.FromString, pb.JoinResponse.SerializeToString
                ),
                "Train": grpc.stream_stream_rpc_method_handler(self.Train),
                "GetRunStatus": grpc.unary_unary_rpc_method_handler(
                    self.GetRunStatus,
                    pb.GetRunStatusRequest.FromString,
                    pb.GetRunStatusResponse.SerializeToString,
                ),
                "ListRuns": grpc.unary_unary_rpc_method_handler(
                    self.ListRuns,
                    pb.ListRunsRequest.FromString,
                    pb.ListRunsResponse.SerializeToString,
                ),
                "WatchRun": grpc.unary_stream_rpc_method_handler(
                    self.WatchRun, pb.WatchRunRequest.FromString
                ),
                "SendCommand": grpc.unary_unary_rpc_method_handler(
                    self.SendCommand,
                    pb.SendCommandRequest.FromString,
                    pb.SendCommandResponse.SerializeToString,
                ),
                "Drain": grpc.unary_unary_rpc_method_handler(
                    self.Drain, pb.DrainRequest.FromString, pb.DrainResponse.SerializeToString
                ),
            },
        )

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        """Add a rank to its run."""
        try:
            plan = await self._plans.read(request)
            now = self._runs.now()
            run = self._runs.join(
                request.run_id, request.rank, plan, now, request.epoch, request.secret
            )
        except Refusal as refusal:
            await context.abort(status_code(refusal), sentence(str(refusal)))
        return pb.JoinResponse(joined_ranks=len(run.joined))

    async def GetRunStatus(
        self, request: pb.GetRunStatusRequest, context: Context
    ) -> pb.GetRunStatusResponse:
        """Describe a run."""
        try:
            return await self._views.status(request.run_id)
        except Refusal as refusal:
            await context.abort(status_code(refusal), sentence(str(refusal)))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """List the runs."""
        try:
            return await self._views.runs(request.finished, request.page_size)
        except Refusal as refusal:
            await context.abort(status_code(refusal), sentence(str(refusal)))

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[bytes]:
        """Describe a run again and again until it has ended."""
        try:
            async for message in self._views.watch(request.run_id, request.interval_seconds):
                yield message
        except Refusal as refusal:
            await context.abort(status_code(refusal), sentence(str(refusal)))

    async def SendCommand(
        self, request: pb.SendCommandRequest, context: Context
    ) -> pb.SendCommandResponse:
        """Give a run a command."""
        try:
            entry = self._runs.find(request.run_id)
            has_secret = entry.secret.proves(request.secret)
            asked_by = may_command(has_secret, self._is_operator(context))
            command_id = entry.command(
                replace(command_from_wire(request.command), asked_by=asked_by.value)
            )
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, sentence(str(error)))
        except Refusal as refusal:
            await context.abort(status_code(refusal), sentence(str(refusal)))
        return pb.SendCommandResponse(command_id=command_id)

    def _is_operator(self, context: Context) -> bool:
        return self._security.role_of(context) is CallerRole.OPERATOR

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Stop the coordinator."""
        try:
            check_drain(self._is_operator(context))
        except Refusal as refusal:
            await context.abort(status_code(refusal), sentence(str(refusal)))
        streams = self._runs.open_streams
        self._stop()
        return pb.DrainResponse(streams=streams)

    async def Train(self, _: object, context: Context) -> None:
        """Serve one rank's stream: its messages are read in one task, responses sent in another."""
        session = Session(self._runs)
        self._unattached.add(session)
        reading = asyncio.create_task(session.read(context))
        try:
            end = await _write(session, context)
            reading.cancel()
            session.close()  # the status waits for a rank that does not read
            if end.code is not grpc.StatusCode.OK:
                await context.abort(end.code, sentence(end.details))
        finally:  # gRPC cancels this method if the rank's connection breaks
            reading.cancel()
            self._unattached.remove(session)
            session.close()


async def _write(session: Session, context: Context) -> StreamEnd:
    """Send the session's responses; return how its stream ends."""
    writing = asyncio.create_task(_write_all(session.outbox, context))
    full = asyncio.create_task(session.is_full.wait())
    try:
        await asyncio.wait((writing, full), return_when=asyncio.FIRST_COMPLETED)
        return writing.result() if writing.done() else await _last(session.outbox)
    finally:
        writing.cancel()
        full.cancel()


async def _write_all(outbox: Outbox, context: Context) -> StreamEnd:
    while not isinstance(item := await outbox.get(), StreamEnd):
        await context.write(item)
    return item


async def _last(outbox: Outbox) -> StreamEnd:
    """Return the end of a stream whose rank gets no other response any more."""
    while not isinstance(item := await outbox.get(), StreamEnd):
        pass
    return item
