"""An operator's calls to a coordinator: what runs there are, and what they do.

Imports neither torch nor the configuration, so that a command answers at once.

Not covered: what it shows to the coordinator (`credentials.py`); how a command finds the
coordinator (`cli/finding.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import grpc

from switokd.coordination.credentials import Credentials, Metadata
from switokd.coordination.tokens import CA, CERTIFICATE, KEY, TOKEN_FILE
from switokd.distillation.overrides import Command, Stamped
from switokd.errors import CoordinatorError, SwitokdError, UsageError
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from switokd.wire import command_to_wire

CHANNEL_OPTIONS = [
    # A proxy for the web must not be used, as for a rank's connection.
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 64 * 2**20),
]
ANSWER_SECONDS = 5.0
"""How long a coordinator may take for an answer."""


VARIABLES = {
    "coordinator.tls.certificate": CERTIFICATE,
    "coordinator.tls.key": KEY,
    "coordinator.tls.ca": CA,
    "coordinator.tls": CA,
    "coordinator.token_file": TOKEN_FILE,
    "coordinator.address": "--coordinator",
}
"""What an operator has in place of a run file's settings."""


def in_variables(sentence: str) -> str:
    """Return a sentence for a rank with an operator's variables in place of settings."""
    for setting, variable in VARIABLES.items():
        sentence = sentence.replace(setting, variable)
    return sentence


class RefusedConnectionError(CoordinatorError):
    """A coordinator is there, and TLS on one side, or a certificate, keeps the caller out."""


class UnknownRunError(UsageError):
    """The coordinator has no run with this id."""


def connect(address: str) -> grpc.Channel:
    """Return a channel to the coordinator at HOST:PORT; nothing is sent yet."""
    return Credentials.of_operator(address).channel(CHANNEL_OPTIONS)


class OperatorClient:
    """Calls to the coordinator at `address`. Methods raise CoordinatorError if it does not answer.

    Token and certificates come from the environment; UsageError if these cannot be used.

    A context manager, which closes the connection.
    """

    def __init__(self, address: str) -> None:
        self.address, self._credentials = address, Credentials.of_operator(address)
        with self.explained():
            self._channel = connect(address)
        self.stub = pb_grpc.CoordinatorServiceStub(self._channel)

    def __enter__(self) -> OperatorClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        self._channel.close()

    @property
    def metadata(self) -> Metadata:
        """The operator's token, for each call; UsageError as `Credentials.metadata`."""
        return self._credentials.metadata()

    def runs(self, finished: bool = False, most: int = 0) -> pb.ListRunsResponse:
        """Return the coordinator's runs. finished: also those that only its journal has.

        most: the most runs; 0: the coordinator's limit.
        """
        request = pb.ListRunsRequest(finished=finished, page_size=most)
        with self.explained():
            return self.stub.ListRuns(request, timeout=ANSWER_SECONDS, metadata=self.metadata)

    def status(self, run_id: str) -> pb.GetRunStatusResponse:
        """Return the status of a run. UnknownRunError if there is none with this id."""
        with self.explained():
            request = pb.GetRunStatusRequest(run_id=run_id)
            return self.stub.GetRunStatus(request, timeout=ANSWER_SECONDS, metadata=self.metadata)

    def watch(self, run_id: str, seconds: float) -> Iterator[pb.GetRunStatusResponse]:
        """Yield the status of a run every so many seconds, until the run has ended.

        UnknownRunError as `status`.
        """
        request = pb.WatchRunRequest(run_id=run_id, interval_seconds=seconds)
        with self.explained():
            call = self.stub.WatchRun(request, metadata=self.metadata)
            try:
                for message in call:
                    yield message.status
            finally:
                call.cancel()

    def send(self, run_id: str, command: Command, secret: bytes = b"") -> None:
        """Give a run a command; a repetition changes nothing. secret: the run's, if it is known.

        UnknownRunError as `status`; UsageError if the coordinator refuses.
        """
        request = pb.SendCommandRequest(
            run_id=run_id, command=command_to_wire(command), secret=secret
        )
        with self.explained():
            self.stub.SendCommand(request, timeout=ANSWER_SECONDS, metadata=self.metadata)

    def answer(self, run_id: str, command: Command) -> Stamped | None:
        """Return a command with the run's answer; None if the coordinator does not know it.

        `first_step` is 0 before there is an answer. UnknownRunError as `status`.
        """
        statuses = self.status(run_id).commands
        mine = (s for s in statuses if s.command.command_id == command.id)
        return next((Stamped(command, s.first_step, failure=s.failure) for s in mine), None)

    def drain(self) -> int:
        """Stop the coordinator; return the number of its open streams. UsageError as `send`."""
        with self.explained():
            return self.stub.Drain(
                pb.DrainRequest(), timeout=ANSWER_SECONDS, metadata=self.metadata
            ).streams

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn gRPC's error in the body into one sentence."""
        try:
            yield
        except grpc.RpcError as error:
            raise self._explain(error) from None
        except UsageError as error:  # of token and certificates
            raise UsageError(in_variables(str(error))) from None

    def _explain(self, error: grpc.RpcError) -> SwitokdError:
        from switokd.coordination.diagnosis import problem_with  # imports much, for rare cases

        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.NOT_FOUND:
            return UnknownRunError(details)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return UsageError(f"the server at {self.address} is another program, or an older one")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            details = f"it does not answer within {ANSWER_SECONDS:g} s"
        elif code is not grpc.StatusCode.UNAVAILABLE:
            return UsageError(f"the coordinator at {self.address} refuses: {details} ({code.name})")
        elif problem := problem_with(self._credentials):
            return RefusedConnectionError(in_variables(str(problem)))
        elif "failed to connect" in details.lower():
            details = details.rpartition(": ")[2]
        return CoordinatorError(
            f"no coordinator at {self.address}: {details}; start one with 'switokd coordinator', "
            "or name another with --coordinator HOST:PORT"
        )
