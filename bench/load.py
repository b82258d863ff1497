"""Load for a coordinator: the streams of many ranks from one thread, with little CPU time.

gRPC's client needs more CPU time per message than the coordinator. Each rank here is therefore a
TCP connection with a minimal HTTP/2 client. Requests are hand-made frames. Of the responses only
lengths and frame types are read, except for the last decision of each stream, which is checked.

Not covered: flow control for sending, except for a flood. Another rank has at most a few hundred
bytes in flight, and the smallest window of HTTP/2 is 65,535 bytes.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush

from switokd.v1 import coordinator_pb2 as pb

TOPOLOGY = {"teacher1": pb.ROLE_TEACHER, "teacher2": pb.ROLE_TEACHER, "student": pb.ROLE_STUDENT}
METHOD = "/switokd.v1.CoordinatorService/Train"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
SETTLE_STEPS = 500
"""Steps between two checkpoints, at which rank 0 settles what was decided."""
FLOOD_PIECE = 20
"""Messages that a flood sends at once."""
SILENCE_SECONDS = 30.0
"""A coordinator that sends nothing for longer than this hangs."""
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
INITIAL_WINDOW_SIZE = 4
FIRST_WINDOW, LARGEST_WINDOW = 65_535, 2**31 - 1
clock = time.perf_counter


def run_plan(ranks: Sequence[Sequence[int]]) -> pb.RunPlan:
    """Return the plan of a run of `TOPOLOGY`. ranks: those of each network."""
    return pb.RunPlan(
        networks=[
            pb.Network(name=name, role=role, ranks=of_network)
            for (name, role), of_network in zip(TOPOLOGY.items(), ranks, strict=True)
        ],
        strategy="switokd",
        config_digest="bench",
        round_timeout_seconds=60.0,
    )


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
        + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST_WINDOW - FIRST_WINDOW))
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
                self.on_frame(kind, 0, bytes(buffer[start : start + size]))
                payload = bytes(buffer[start : start + size]) if kind == PING else b""
                self.answer(frame(kind, ACK, 0, payload))
            elif kind in (RESET, GOAWAY) or (kind == HEADERS and flags & END_STREAM):
                raise ConnectionError(
                    f"rank {self.rank} of run {self.run_id}: the coordinator ended the stream: "
                    f"{bytes(buffer[start : start + size])!r}"
                )
            elif kind == WINDOW_UPDATE:
                of_stream = int.from_bytes(buffer[start - 4 : start], "big")
                self.on_frame(kind, of_stream, bytes(buffer[start : start + size]))
            start += size
        del buffer[:start]
        return self._count()

    def answer(self, acknowledgement: bytes) -> None:
        """Send the answer to a frame of the coordinator."""
        self.socket.sendall(acknowledgement)

    def on_frame(self, kind: int, stream: int, payload: bytes) -> None:
        """Note settings and windows; a rank that reports once per step needs neither."""

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


class Flood(Rank):
    """A rank that sends messages as fast as the coordinator reads them, in large pieces.

    Only this class counts the windows of HTTP/2, because only here there is more in flight than
    they hold.
    """

    def start(self, address: str, message: Callable[[int], bytes]) -> None:
        """Open the stream and wait for the answer. message: the n-th request, counted from 1."""
        self.windows = {0: FIRST_WINDOW - 1000, 1: FIRST_WINDOW - 1000}
        """Bytes that the coordinator permits, by stream; 0: all of the connection."""
        self._initial = FIRST_WINDOW
        self.flooded = 0
        """Messages sent."""
        self._message, self._unsent, self._answers = message, b"", b""
        self.connect(address)
        while self.done < 0:
            self.receive()
        self.socket.setblocking(False)

    def pump(self) -> None:
        """Read what has come, and send one piece if the windows and the socket permit it.

        The other ranks are driven by the same thread, and must not wait for the flood.
        """
        with suppress(BlockingIOError):
            while True:
                self.receive()
        with suppress(BlockingIOError):
            if not self._unsent:  # answers go between two pieces
                self._unsent, self._answers = self._answers, b""
            if self._unsent or self._prepare():
                self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def _prepare(self) -> int:
        """Make as many messages as the windows permit; return their number."""
        size = len(self._message(self.flooded + 1)) + 10  # later steps take a byte more
        count = min(min(self.windows.values()) // size, FLOOD_PIECE)
        first = self.flooded + 1
        self._unsent = b"".join(map(self._message, range(first, first + count)))
        for stream in self.windows:
            self.windows[stream] -= len(self._unsent)
        self.flooded += count
        return count

    def answer(self, acknowledgement: bytes) -> None:
        """Send the answer with the next piece."""
        self._answers += acknowledgement

    def on_frame(self, kind: int, stream: int, payload: bytes) -> None:
        """Note a window that the coordinator opens."""
        if kind == WINDOW_UPDATE:
            self.windows[stream] += int.from_bytes(payload, "big")
        elif kind == SETTINGS:
            for i in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[i : i + 6])
                if name == INITIAL_WINDOW_SIZE:
                    self.windows[1] += value - self._initial
                    self._initial = value


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
        self._floods: list[Flood] = []
        self._selector = selectors.DefaultSelector()
        for rank in ranks:
            rank.connect(address)
            self._selector.register(rank.socket, selectors.EVENT_READ, rank)
        while any(rank.done < 0 for rank in ranks):
            for key, _ in self._selector.select(10):
                key.data.receive()

    def add_flood(self, flood: Flood) -> None:
        """Let a flood that has started go on while the ranks are driven."""
        self._selector.register(flood.socket, selectors.EVENT_READ, flood)
        self._floods.append(flood)

    def drive(self, seconds: float, step_seconds: float = 0.0) -> Outcome:
        """Report step after step for `seconds`; a report follows the decision of the last step.

        step_seconds: minimum time between the starts of two steps; 0 starts them at once. The
        ranks of a run start together, the runs one after another: they know nothing of each other.
        """
        latencies: array[float] = array("d")
        reports_before = sum(rank.sent for rank in self._ranks)
        started = heard = clock()
        runs: dict[str, list[Rank]] = {}
        for rank in self._ranks:
            runs.setdefault(rank.run_id, []).append(rank)
        due = [(started + i * step_seconds / len(runs), name) for i, name in enumerate(runs)]
        """When each run starts its next step, the first one first."""
        goal: dict[str, int] | None = None
        while goal is None or any(min(r.done, r.sent) < goal[r.run_id] for r in self._ranks):
            now = clock()
            if goal is None and now - started > seconds:
                # All ranks of a run end with the last step that one of them has started.
                ordered = sorted(self._ranks, key=lambda rank: rank.sent)
                goal = {rank.run_id: rank.sent for rank in ordered}
                due = [(now, name) for name in runs]
            while due[0][0] <= now:  # without step_seconds only at the start and at the end
                at, name = heappop(due)
                next_at = max(at + step_seconds, now) if step_seconds else now + 1.0
                heappush(due, (next_at + 1e-9, name))
                for rank in runs[name]:
                    self._report_next(rank, goal)
            for flood in self._floods:
                flood.pump()
            ready = self._selector.select(max(due[0][0] - now, 0.0))
            heard = now if ready else heard
            if now - heard > SILENCE_SECONDS + step_seconds:
                raise TimeoutError(f"the coordinator has sent nothing for {SILENCE_SECONDS:g} s")
            for key, _ in ready:
                rank = key.data
                if isinstance(rank, Flood):
                    rank.pump()
                elif rank.receive() and rank.done >= rank.sent:
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
        for rank in [*self._ranks, *self._floods]:
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
                settled_step=(step - 1) // SETTLE_STEPS * SETTLE_STEPS,  # never this step
            )
            self._reports[key] = request(pb.TrainRequest(report=report))
        return self._reports[key]
