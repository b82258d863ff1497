"""A client written from `proto/` alone: it imports nothing that is generated, and not the package.

It joins, reports, is decided, lists, asks, watches and leaves at a real coordinator.

Not covered: credentials.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tests.services.test_coordinator import Server
from tests.services.test_views import coordinator
from tests.support import BIN, REPOSITORY

SERVICE = "switokd.v1.CoordinatorService"


class Contract:
    """Messages and methods of a compiled .proto file, by name."""

    def __init__(self, compiled: bytes, channel: grpc.Channel) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
            self._pool.Add(file)
        self._methods = self._pool.FindServiceByName(SERVICE).methods_by_name
        self._channel = channel

    def new(self, name: str, /, **fields: Any) -> Any:
        """A message with these fields."""
        descriptor = self._pool.FindMessageTypeByName(f"switokd.v1.{name}")
        return message_factory.GetMessageClass(descriptor)(**fields)

    def call(self, name: str, argument: Any, seconds: float = 20) -> Any:
        """Call a method with a message, or with an iterator of messages."""
        method = self._methods[name]
        answer = message_factory.GetMessageClass(method.output_type)
        kinds = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, True): self._channel.stream_stream,
        }
        prepared: Any = kinds[method.client_streaming, method.server_streaming](
            f"/{SERVICE}/{name}",
            request_serializer=_serialized,
            response_deserializer=answer.FromString,
        )
        return prepared(argument, timeout=seconds)


def _serialized(message: Any) -> bytes:
    serialized: bytes = message.SerializeToString()
    return serialized


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with coordinator(tmp_path_factory.mktemp("stranger")) as started:
        yield started


@pytest.fixture
def contract(server: Server, tmp_path: Path) -> Iterator[Contract]:
    image = tmp_path / "contract.binpb"
    subprocess.run([BIN / "buf", "build", REPOSITORY / "proto", "-o", image], check=True)
    with grpc.insecure_channel(server.address) as channel:
        yield Contract(image.read_bytes(), channel)


def test_a_client_of_the_proto_file_alone_takes_part(contract: Contract) -> None:
    new, call = contract.new, contract.call
    networks = [
        new("Network", name="big", role="ROLE_TEACHER", ranks=[0]),
        new("Network", name="small", role="ROLE_STUDENT", ranks=[0]),
    ]
    plan = new(
        "RunPlan",
        networks=networks,
        strategy="switokd",
        config_digest="0" * 64,
        round_timeout_seconds=60.0,
    )
    joined = call("Join", new("JoinRequest", run_id="foreign", rank=0, plan=plan, epoch=1))
    assert joined.joined_ranks == 1

    outgoing: SimpleQueue[Any] = SimpleQueue()
    stream = call("Train", iter(outgoing.get, None))
    attach = new("Attach", run_id="foreign", rank=0, epoch=1, client="mine", attempt=1)
    outgoing.put(new("TrainRequest", attach=attach))
    assert next(stream).attached.next_step == 1
    pair = {"teacher": "big", "student": "small"}
    sums = [(2.0, 1.0, 0.1), (0.1, 1.0, 0.9)]
    decisions = []
    for step, (gap, e_s, e_t) in enumerate(sums, 1):
        of_pair = new("PairSums", **pair, gap=gap, e_s=e_s, e_t=e_t, n=1)
        report = new("Report", step=step, pairs=[of_pair], received_step=step - 1)
        outgoing.put(new("TrainRequest", report=report))
        decisions.append(next(stream).decision)
    assert [list(decision.paused) for decision in decisions] == [["big"], []]
    heartbeat = new("Heartbeat", phase="PHASE_BACKWARD", step=2)
    outgoing.put(new("TrainRequest", heartbeat=heartbeat))

    listed = call("ListRuns", new("ListRunsRequest"))
    assert [run.run_id for run in listed.runs] == ["foreign"]
    status = call("GetRunStatus", new("GetRunStatusRequest", run_id="foreign"))
    assert status.last_decision == decisions[-1]
    assert (status.pairs[0].expert_ratio, status.pairs[0].switches) == (0.5, 1)

    watched = call("WatchRun", new("WatchRunRequest", run_id="foreign", interval_seconds=0.1))
    state = status.DESCRIPTOR.fields_by_name["state"].enum_type.values_by_name
    assert next(watched).status.state == state["RUN_STATE_TRAINING"].number
    outgoing.put(new("TrainRequest", leave=new("Leave")))
    assert list(stream) == []
    outgoing.put(None)
    *_, last = watched
    assert last.status.state == state["RUN_STATE_FINISHED"].number


def test_a_refusal_is_a_status_with_a_sentence(contract: Contract) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        contract.call("GetRunStatus", contract.new("GetRunStatusRequest", run_id="nobody"))
    assert caught.value.code().name == "NOT_FOUND"
    assert "nobody" in (caught.value.details() or "")
