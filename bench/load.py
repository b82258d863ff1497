"""Many ranks' streams from one thread, cheaply enough not to be what is measured.

gRPC's own client costs more processor time per message than the coordinator it would measure. So
each rank here is a TCP connection of its own that speaks just enough HTTP/2: requests are frames
made by hand, and of what comes back only lengths and kinds are looked at, but for each stream's
last decision, which is parsed and checked.

Not covered: flow control of what is sent. A rank has at most a few hundred bytes under way, and
the smallest window of HTTP/2 is 65,535.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from switokd.v1 import coordinator_pb2 as pb

METHOD = "/switokd.v1.CoordinatorService/Train"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
INITIAL_WINDOW_SIZE = 4
LARGEST_WINDOW = 2**31 - 1
clock = time.perf_counter


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def request(message: pb.TrainRequest) -> bytes:
    """One gRPC message on a rank's stream."""
    return _data(message.SerializeToString())


def _data(body: bytes) -> bytes:
    return frame(DATA, 0, 1, struct.pack(">BI", 0, len(body)) + body)


def _opening(authority: str) -> bytes:
    """Preface, settings with windows too large to need updates, and the stream's headers."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": METHOD,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(  # each as a literal that is not indexed
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, LARGEST_WINDOW))
        + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST_WINDOW - 65535))
        + frame(HEADERS, END_HEADERS, 1, block)
    )


@dataclass
class Rank:
    """One rank's connection. `done` is the last step it has the decision of."""

    run_id: str
    rank: int
    teachers: tuple[str, ...]
    """Those that it holds: it reports their pairs and waits for decisions. A rank without any
    reports the next step at the decision too, as it waits for the teachers' ranks in training."""
    done: int = -1  # "attached" counts as the decision of step 0
    sent: int = 0
    sent_at: float = 0.0
    last: bytes | bytearray = b""
    _bytes: bytearray = field(default_factory=bytearray)
    _messages: bytearray = field(default_factory=bytearray)

    def connect(self, address: str) -> None:
        """Open the stream and attach; does not wait for the answer."""
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        attach = pb.Attach(run_id=self.run_id, rank=self.rank)
        self.socket.sendall(_opening(address) + request(pb.TrainRequest(attach=attach)))

    def receive(self) -> int:
        """Take what has come; return how many messages that were."""
        chunk = self.socket.recv(1 << 18)
        if not chunk:
            raise ConnectionError(f"rank {self.rank} of run {self.run_id}: the stream ended")
        buffer = self._bytes
        buffer += chunk
        start, end = 0, len(buffer)
        while end - start >= 9:
            size = int.from_bytes(buffer[start : start + 3], "big")
            if end - start < 9 + size:
                break
            kind, flags = buffer[start + 3], buffer[start + 4]
            start += 9
            if kind == DATA:
                self._messages += buffer[start : start + size]
            elif kind in (SETTINGS, PING) and not flags & ACK:
                payload = bytes(buffer[start : start + size]) if kind == PING else b""
                self.socket.sendall(frame(kind, ACK, 0, payload))
            elif kind in (RESET, GOAWAY) or (kind == HEADERS and flags & END_STREAM):
                raise ConnectionError(
                    f"rank {self.rank} of run {self.run_id}: the coordinator ended the stream: "
                    f"{bytes(buffer[start : start + size])!r}"
                )
            start += size
        del buffer[:start]
        return self._count()

    def _count(self) -> int:
        data, start, found = self._messages, 0, 0
        while len(data) - start >= 5:
            end = start + 5 + int.from_bytes(data[start + 1 : start + 5], "big")
            if end > len(data):
                break
            self.last = data[start + 5 : end]
            start, found = end, found + 1
        del data[:start]
        self.done += found
        return found


@dataclass
class Outcome:
    """What one run of the load has seen, after its warm-up."""

    seconds: float
    reports: int
    latencies: array[float]
    """Seconds from a report to its decision, of the ranks that wait for one."""


class Load:
    """All ranks of some runs, driven from one thread."""

    def __init__(self, address: str, ranks: Sequence[Rank], pairs: Sequence[pb.PairSums]) -> None:
        """Attach every rank. A rank reports those of `pairs` whose teacher it holds."""
        self._ranks = ranks
        self._pairs = pairs
        self._reports: dict[tuple[int, tuple[str, ...]], bytes] = {}
        self._selector = selectors.DefaultSelector()
        for rank in ranks:
            rank.connect(address)
            self._selector.register(rank.socket, selectors.EVENT_READ, rank)
        while any(rank.done < 0 for rank in ranks):
            for key, _ in self._selector.select(10):
                key.data.receive()

    def drive(self, seconds: float, step_seconds: float = 0.0) -> Outcome:
        """Report step after step for `seconds`, each once its decision is there.

        step_seconds: begin steps no faster than this (0: at once).
        """
        latencies: array[float] = array("d")
        reports_before = sum(rank.sent for rank in self._ranks)
        started = due = clock()
        goal: dict[str, int] | None = None
        while goal is None or any(min(r.done, r.sent) < goal[r.run_id] for r in self._ranks):
            now = clock()
            if goal is None and now - started > seconds:
                # Ranks of a run end with the same step, the last that any of them has begun.
                ordered = sorted(self._ranks, key=lambda rank: rank.sent)
                goal = {rank.run_id: rank.sent for rank in ordered}
                due = now
            if now >= due:  # without a pace only at the beginning and at the end
                due = now + 1.0 if not step_seconds else max(due + step_seconds, now)
                for rank in self._ranks:
                    self._report_next(rank, goal)
            for key, _ in self._selector.select(max(due - now, 0.0)):
                rank = key.data
                if rank.receive() and rank.done >= rank.sent:
                    if rank.teachers:
                        latencies.append(clock() - rank.sent_at)
                    if not step_seconds:
                        self._report_next(rank, goal)
        took = clock() - started
        return Outcome(took, sum(r.sent for r in self._ranks) - reports_before, latencies)

    def close(self) -> None:
        """Check each stream's last decision, say goodbye and hang up."""
        for rank in self._ranks:
            decision = pb.TrainResponse.FromString(bytes(rank.last)).decision
            assert decision.step == rank.sent, f"{decision.step} is not {rank.sent}"
            rank.socket.sendall(request(pb.TrainRequest(leave=pb.Leave())))
            self._selector.unregister(rank.socket)
            rank.socket.close()
        self._selector.close()

    def _report_next(self, rank: Rank, goal: dict[str, int] | None) -> None:
        """Report the next step, unless the last is still open or the goal is reached.

        A rank that only listens may have received several decisions at once: it catches up.
        """
        while rank.done >= rank.sent and not (goal and rank.sent >= goal[rank.run_id]):
            rank.sent += 1
            rank.sent_at = clock()
            rank.socket.sendall(self._bytes(rank.sent, rank.teachers))

    def _bytes(self, step: int, teachers: tuple[str, ...]) -> bytes:
        """A step's report, made once for all ranks that hold the same teachers."""
        key = (step, teachers)
        if key not in self._reports:
            if len(self._reports) > 1000:
                self._reports.clear()
            pairs = [pair for pair in self._pairs if pair.teacher in teachers]
            wait = 1e-3 if teachers else None
            report = pb.Report(
                step=step, pairs=pairs, decision_wait_seconds=wait, exchange_seconds=1e-3
            )
            self._reports[key] = request(pb.TrainRequest(report=report))
        return self._reports[key]
