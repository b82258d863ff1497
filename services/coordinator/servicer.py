"""The gRPC service: its three methods, as `proto/switokd/v1/coordinator.proto` describes them.

A refused call or stream ends with a gRPC status and one sentence, and harms no other run. If a
rank's stream breaks without a Leave message and the rank does not come back, its run fails.

Not covered: TLS, authentication, commands of an operator.
"""

from __future__ import annotations

import asyncio

import grpc

from switokd.services.coordinator.messages import plan_from_wire, status_code, status_to_wire
from switokd.services.coordinator.outbox import StreamEnd
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.session import Context, Session
from switokd.v1 import coordinator_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["CoordinatorService"].full_name


class CoordinatorServicer:
    """Methods of the service. Every method changes only `runs`."""

    def __init__(self, runs: RunRegistry) -> None:
        self._runs = runs

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service for `add_generic_rpc_handlers`.

        The generated function would serialize every response of Train. Here Train sends bytes,
        which `Session` serializes once per run.
        """
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Join": grpc.unary_unary_rpc_method_handler(
                    self.Join, pb.JoinRequest.FromString, pb.JoinResponse.SerializeToString
                ),
                "Train": grpc.stream_stream_rpc_method_handler(
                    self.Train, pb.TrainRequest.FromString
                ),
                "GetRunStatus": grpc.unary_unary_rpc_method_handler(
                    self.GetRunStatus,
                    pb.GetRunStatusRequest.FromString,
                    pb.GetRunStatusResponse.SerializeToString,
                ),
            },
        )

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        """Add a rank to its run."""
        try:
            plan = plan_from_wire(request.plan)
            now = self._runs.now()
            run = self._runs.join(request.run_id, request.rank, plan, now, request.epoch)
        except Refusal as refusal:
            await context.abort(status_code(refusal), str(refusal))
        return pb.JoinResponse(joined_ranks=len(run.joined))

    async def GetRunStatus(
        self, request: pb.GetRunStatusRequest, context: Context
    ) -> pb.GetRunStatusResponse:
        """Describe a run."""
        try:
            entry = self._runs.find(request.run_id)
        except Refusal as refusal:
            await context.abort(status_code(refusal), str(refusal))
        return status_to_wire(entry.run, self._runs.recorded(entry.run))

    async def Train(self, _: object, context: Context) -> None:
        """Serve one rank's stream: its messages are read in one task, responses sent in another."""
        session = Session(self._runs)
        reader = asyncio.create_task(session.read(context))
        try:
            while not isinstance(item := await session.outbox.get(), StreamEnd):
                await context.write(item)
            reader.cancel()
            if item.code is not grpc.StatusCode.OK:
                await context.abort(item.code, item.details)
        finally:  # gRPC cancels this method if the rank's connection breaks
            reader.cancel()
            session.close()
