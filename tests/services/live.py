"""A live coordinator process under attack, and an honest run on it that must not notice.

The honest run is driven by hand-made streams: each step is reported, and its decision compared with
the one that a run without any attack gets.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import psutil

from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.support import process, wait_until

names = count()
TEACHER, STUDENT = "t", "s"
DISTANCES = [(2.0, 1.0, 0.1), (0.1, 1.0, 0.9), (0.3, 0.25, 0.2)]
MODES = [pb.MODE_EXPERT, pb.MODE_LEARNING, pb.MODE_EXPERT]


def sums(gap: float, e_s: float, e_t: float) -> pb.PairSums:
    return pb.PairSums(teacher=TEACHER, student=STUDENT, gap=gap, e_s=e_s, e_t=e_t, n=1)


def plan(networks: int = 2, teachers: int = 1, ranks: int = 0, **more: object) -> pb.RunPlan:
    """A plan; without `ranks`, network i is on rank i, else all networks are on all ranks."""
    made = [
        pb.Network(
            name=TEACHER if i == 0 else STUDENT if i == networks - 1 else f"n{i}",
            role=pb.ROLE_TEACHER if i < teachers else pb.ROLE_STUDENT,
            ranks=range(ranks) if ranks else [i],
        )
        for i in range(networks)
    ]
    values = {"strategy": "switokd", "config_digest": "d", "round_timeout_seconds": 60.0, **more}
    return pb.RunPlan(networks=made, **values)  # type: ignore[arg-type]


class Stream:
    """One rank's stream over a connection of its own, or over a given one."""

    def __init__(self, address: str, channel: grpc.Channel | None = None) -> None:
        own = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = channel or grpc.insecure_channel(address, options=own)
        self.outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        train: Any = self.channel.stream_stream(
            "/switokd.v1.CoordinatorService/Train",
            response_deserializer=pb.TrainResponse.FromString,
        )
        self.call = train(iter(self.outgoing.get, None), timeout=600)

    def send(self, **event: object) -> None:
        self.outgoing.put(pb.TrainRequest(**event).SerializeToString())  # type: ignore[arg-type]

    def attach(self, run_id: str, rank: int = 0, **more: object) -> Stream:
        self.send(attach=pb.Attach(run_id=run_id, rank=rank, **more))  # type: ignore[arg-type]
        assert next(self.call).WhichOneof("event") == "attached"
        return self

    def end(self) -> tuple[str, str]:
        """Wait for the stream's end; return its status code and details."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
        finally:
            self.outgoing.put(None)
        return "OK", ""

    def close(self) -> None:
        self.outgoing.put(None)
        self.channel.close()


@dataclass
class Coordinator:
    """A coordinator under attack."""

    address: str
    http: str
    pid: int
    log: Path

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.address)
        self.stub = pb_grpc.CoordinatorServiceStub(self.channel)

    def new_run(self, run_plan: pb.RunPlan | None = None, ranks: int = 2) -> str:
        """Create a run whose ranks have joined."""
        run_id = f"run{next(names)}"
        for rank in range(ranks):
            self.join(run_id, rank, run_plan or plan())
        return run_id

    def join(self, run_id: str, rank: int = 0, run_plan: pb.RunPlan | None = None) -> None:
        request = pb.JoinRequest(run_id=run_id, rank=rank, plan=run_plan or plan())
        self.stub.Join(request, timeout=20)

    def refused(self, run_id: str, run_plan: pb.RunPlan | None = None) -> tuple[str, str]:
        """Status of a Join that is refused."""
        try:
            self.join(run_id, 0, run_plan)
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
        return "OK", ""

    def connect(self, port: str = "") -> socket.socket:
        host, _, number = (port or self.address).rpartition(":")
        return socket.create_connection((host, int(number)), timeout=5)

    def files(self) -> int:
        return psutil.Process(self.pid).num_fds()


@contextmanager
def coordinator(
    folder: Path, *options: str, journal: bool = False, may_end: bool = False
) -> Iterator[Coordinator]:
    """Start a coordinator with these options; its standard error goes to a file.

    may_end: whether the test ends it. It has ended when this returns.
    """
    command = [sys.executable, "-m", "switokd", "coordinator", "--port", "0", "--http-port", "0"]
    command += ["--journal", "journal.db"] if journal else []
    log = folder / "log"
    shell = ["sh", "-c", 'exec "$@" 2>log', "sh", *command, *options]
    with process(shell, folder) as child:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        under_test = Coordinator(ready["grpc"], ready["http"], ready["pid"], log)
        yield under_test
        under_test.channel.close()
        if may_end:
            child.wait(30)
        else:
            assert child.poll() is None, "the coordinator has died"


class HonestRun:
    """A run of one teacher and one student that goes on in the background until it is ended.

    pause: seconds between two steps.
    """

    def __init__(self, under_test: Coordinator, pause: float = 0.001) -> None:
        self._pause = pause
        self.slowest, self.steps, self._goal = 0.0, 0, 0
        self._is_ending, self._error = False, ""
        self.run_id = under_test.new_run()
        streams = [Stream(under_test.address).attach(self.run_id, rank) for rank in (0, 1)]
        self._teacher, self._student = streams
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def _train(self) -> None:
        try:
            while not self._is_ending:
                self._step()
        except Exception as error:
            self._error = f"step {self.steps + 1}: {error!r}"

    def _step(self) -> None:
        step, began = self.steps + 1, time.monotonic()
        self._student.send(report=pb.Report(step=step, received_step=step - 1))
        pairs = [sums(*DISTANCES[step % 3])]
        self._teacher.send(report=pb.Report(step=step, pairs=pairs, received_step=step - 1))
        for stream in (self._teacher, self._student):
            decision = next(stream.call).decision
            assert decision.step == step
            assert decision.pairs[0].mode == MODES[step % 3], "another decision"
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.steps = step
        time.sleep(self._pause)

    def end(self) -> None:
        """Check that it still goes on, and end it as a rank does."""
        before = self.steps
        wait_until(lambda: self._error or self.steps > before + 10, 10, "ten more steps")
        self._is_ending = True
        self._thread.join(10)
        assert not self._error, self._error
        for stream in (self._teacher, self._student):
            stream.send(leave=pb.Leave())
            assert stream.end() == ("OK", "")
            stream.close()


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection; what it has sent before is read."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes((kind, flags))
        + struct.pack(">I", stream)
        + payload
    )


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
