"""Load for a coordinator: the streams of many ranks from one thread, with little CPU time.

gRPC's client needs more CPU time per message than the coordinator. Each rank here is therefore a
TCP connection with a minimal HTTP/2 client. Requests are hand-made frames. Of the responses only
lengths and frame types are read, except for the last decision of each stream, which is checked.

Not covered: flow control for sending. A rank has at most a few hundred bytes in flight, and the
smallest window of HTTP/2 is 65,535 bytes.
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
SETTLE_STEPS = 500
"""Steps between two checkpoints, at which rank 0 settles what was decided."""
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
    """Preface, settings with windows too large to need updates, and headers of the stream."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": METHOD,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(  # every header as a literal without indexing
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
    """Connection of one rank."""

    run_id: str
    rank: int
    teachers: tuple[str, ...]
    """Teachers that the rank holds: it reports their pairs and waits for decisions.

    A rank without teachers also reports the next step after the decision, because in training it
    waits for the ranks of the teachers.
    """
    done: int = -1
    """Last step with a received decision; the answer to `attach` counts as step 0."""
    sent: int = 0
    sent_at: float = 0.0
    last: bytes | bytearray = b""
    _bytes: bytearray = field(default_factory=bytearray)
    _messages: bytearray = field(default_factory=bytearray)

    def connect(self, address: str) -> None:
        """Open the stream and attach, without waiting for the answer."""
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        attach = pb.Attach(run_id=self.run_id, rank=self.rank)
        self.socket.sendall(_opening(address) + request(pb.TrainRequest(attach=attach)))

    def receive(self) -> int:
        """Read the available bytes; returns the number of complete messages."""
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
        data, start, count = self._messages, 0, 0
        while len(data) - start >= 5:
            end = start + 5 + int.from_bytes(data[start + 1 : start + 5], "big")
            if end > len(data):
                break
            self.last = data[start + 5 : end]
            start, count = end, count + 1
        del data[:start]
        self.done += count
        return count


@dataclass
class Outcome:
    """Result of one call of `Load.drive`."""

    seconds: float
    reports: int
    latencies: array[float]
    """Seconds from a report to its decision, for ranks that wait for decisions."""


class Load:
    """All ranks of some runs, driven by one thread."""

    def __init__(self, address: str, ranks: Sequence[Rank], pairs: Sequence[pb.PairSums]) -> None:
        """Attach all ranks. A rank reports the pairs of the teachers that it holds."""
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
        """Report step after step for `seconds`; a report follows the decision of the last step.

        step_seconds: minimum time between the starts of two steps; 0 starts them at once.
        """
        latencies: array[float] = array("d")
        reports_before = sum(rank.sent for rank in self._ranks)
        started = due = clock()
        goal: dict[str, int] | None = None
        while goal is None or any(min(r.done, r.sent) < goal[r.run_id] for r in self._ranks):
            now = clock()
            if goal is None and now - started > seconds:
                # All ranks of a run end with the last step that one of them has started.
                ordered = sorted(self._ranks, key=lambda rank: rank.sent)
                goal = {rank.run_id: rank.sent for rank in ordered}
                due = now
            if now >= due:  # without step_seconds only at the start and at the end
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
        """Check the last decision of each stream, then leave and close the connections."""
        for rank in self._ranks:
            decision = pb.TrainResponse.FromString(bytes(rank.last)).decision
            assert decision.step == rank.sent, f"{decision.step} is not {rank.sent}"
            rank.socket.sendall(request(pb.TrainRequest(leave=pb.Leave())))
            self._selector.unregister(rank.socket)
            rank.socket.close()
        self._selector.close()

    def _report_next(self, rank: Rank, goal: dict[str, int] | None) -> None:
        """Report the next step, if the last one is decided and the goal is not reached.

        A rank without teachers may receive several decisions at once, and then reports several
        steps.
        """
        while rank.done >= rank.sent and not (goal and rank.sent >= goal[rank.run_id]):
            rank.sent += 1
            rank.sent_at = clock()
            rank.socket.sendall(self._bytes(rank.sent, rank.teachers))

    def _bytes(self, step: int, teachers: tuple[str, ...]) -> bytes:
        """Report of a step, serialised once for all ranks with the same teachers."""
        key = (step, teachers)
        if key not in self._reports:
            if len(self._reports) > 1000:
                self._reports.clear()
            pairs = [pair for pair in self._pairs if pair.teacher in teachers]
            wait = 1e-3 if teachers else None
            report = pb.Report(
                step=step,
                pairs=pairs,
                decision_wait_seconds=wait,
                exchange_seconds=1e-3,
                received_step=step - 1,
                settled_step=step - step % SETTLE_STEPS,
            )
            self._reports[key] = request(pb.TrainRequest(report=report))
        return self._reports[key]
