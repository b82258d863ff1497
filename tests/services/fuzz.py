"""Sends hostile messages to a coordinator in which an honest run trains, and must not suffer.

    python -m tests.services.fuzz --messages 100000 --seed 0

The honest run is driven by hand: each of its decisions is compared with the one that its distances
lead to. Its streams must never break. At the end the coordinator must be alive and healthy, and
its journal must hold the honest run without a difference.

Not covered: a flood that takes the whole core or network; attacks on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from switokd.distillation.decision import Rule, decide
from switokd.distillation.gap import PairSums
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair
from switokd.runs.replay.record import JournalRecord
from switokd.runs.replay.replay import replay
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from switokd.wire import decision_from_wire
from tests.services.hostile import METHODS, SERVICE, Hostile
from tests.support import process

RUN = "honest"
SECRET = bytes(range(32))
NAMES = ("a", "b", "s")
PAIRS = (Pair("a", "s"), Pair("b", "s"))
AT_ONCE = 32
"""Calls and connections that are open at once."""
ROLES = (pb.ROLE_TEACHER, pb.ROLE_TEACHER, pb.ROLE_STUDENT)
PLAN = pb.RunPlan(
    networks=[
        pb.Network(name=name, role=role, ranks=[rank])
        for rank, (name, role) in enumerate(zip(NAMES, ROLES, strict=True))
    ],
    strategy="switokd",
    config_digest="d",
    round_timeout_seconds=60,
)
RULE = Rule(make_strategy("switokd").switch)


@dataclass
class Outcome:
    """What a fuzz has sent, and what it has found."""

    seed: int
    messages: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Number of messages by kind."""
    answers: Counter[str] = field(default_factory=Counter)
    """Number of calls by method and status."""
    steps: int = 0
    """Steps of the honest run."""
    slowest: float = 0.0
    """Seconds that the slowest of its steps took."""
    seconds: float = 0.0
    memory_growth: int = 0
    """Bytes."""
    log_bytes: int = 0
    tracebacks: int = 0
    """In the coordinator's log."""
    secrets_hold: bool = False
    """Whether the coordinator refuses a join with another secret."""
    problems: list[str] = field(default_factory=list)
    """What must not be."""


class HonestRun(threading.Thread):
    """A run of two teachers and a student, which goes on until it is asked to end."""

    def __init__(self, address: str, seed: int, epoch: int, outcome: Outcome) -> None:
        super().__init__(name="honest run", daemon=True)
        self._address, self._epoch, self._outcome = address, epoch, outcome
        self._rng = random.Random(f"honest {seed}")
        self.is_ready, self.is_over = threading.Event(), threading.Event()

    def run(self) -> None:
        """Report, and compare every decision on every rank."""
        try:
            with grpc.insecure_channel(self._address) as channel:
                self._train(pb_grpc.CoordinatorServiceStub(channel))
        except Exception as error:  # of the honest run: the fuzz has found something
            text = error.details() if isinstance(error, grpc.RpcError) else repr(error)
            self._outcome.problems.append(
                f"the honest run broke at step {self._outcome.steps}: {text}"
            )
        self.is_ready.set()

    def _train(self, stub: pb_grpc.CoordinatorServiceStub) -> None:
        queues = [SimpleQueue[pb.TrainRequest | None]() for _ in NAMES]
        for rank in range(3):
            stub.Join(
                pb.JoinRequest(run_id=RUN, rank=rank, plan=PLAN, epoch=self._epoch, secret=SECRET)
            )
        calls = [stub.Train(iter(queue.get, None)) for queue in queues]
        for rank, (queue, call) in enumerate(zip(queues, calls, strict=True)):
            attach = pb.Attach(run_id=RUN, rank=rank, epoch=self._epoch, secret=SECRET)
            attach.client, attach.attempt = f"honest {self._rng.random()}", 1
            queue.put(pb.TrainRequest(attach=attach))
            assert next(call).WhichOneof("event") == "attached"
        self.is_ready.set()
        while not self.is_over.is_set():
            step = self._outcome.steps + 1
            sums = {pair: self._sums() for pair in PAIRS}
            started = time.monotonic()
            for rank, queue in enumerate(queues):
                report = pb.Report(step=step, settled_step=step - 1, received_step=step - 1)
                for pair in PAIRS[rank : rank + 1]:
                    s = sums[pair]
                    report.pairs.add(
                        teacher=pair.teacher, student="s", gap=s.gap, e_s=s.e_s, e_t=s.e_t, n=s.n
                    )
                queue.put(pb.TrainRequest(report=report))
            expected = decide(step, {p: s.mean() for p, s in sums.items()}, RULE)
            for rank, call in enumerate(calls):
                while (response := next(call)).WhichOneof("event") != "decision":
                    pass  # a notice
                if decision_from_wire(response.decision) != expected:
                    self._outcome.problems.append(
                        f"rank {rank}: step {step} is {response.decision}"
                    )
            self._outcome.slowest = max(self._outcome.slowest, time.monotonic() - started)
            self._outcome.steps = step
        for queue, call in zip(queues, calls, strict=True):
            queue.put(pb.TrainRequest(leave=pb.Leave()))
            queue.put(None)
            for _ in call:
                pass
        state = stub.GetRunStatus(pb.GetRunStatusRequest(run_id=RUN)).state
        if state != pb.RUN_STATE_FINISHED:
            self._outcome.problems.append(f"the honest run ended in state {state}")

    def _sums(self) -> PairSums:
        e_s, e_t = (self._rng.uniform(0, 2) for _ in range(2))
        gap = self._rng.uniform(abs(e_s - e_t), min(e_s + e_t, 2))
        return PairSums(gap * 8, e_s * 8, e_t * 8, 8)


class Attack:
    """Sends the messages of a seed to a coordinator.

    Its tasks have a seed each, so that what one of them sends does not depend on the others.
    """

    def __init__(self, addresses: dict[str, str], messages: int, outcome: Outcome) -> None:
        self._grpc, self._http = addresses["grpc"], addresses["http"]
        self._messages, self._outcome = messages, outcome

    async def run(self) -> None:
        """Send all messages, several calls and connections at a time."""
        await asyncio.gather(*(self._send(task) for task in range(AT_ONCE)))

    async def _send(self, task: int) -> None:
        hostile = Hostile(f"{self._outcome.seed} {task}", RUN)
        rng, turns = hostile.rng, count()
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        while self._outcome.messages < self._messages:
            async with grpc.aio.insecure_channel(self._grpc, options=options) as channel:
                for turn in islice(turns, rng.randrange(1, 200)):
                    if self._outcome.messages >= self._messages:
                        return
                    kind = rng.choices(("call", "stream", "run", "connection"), (12, 5, 2, 2))[0]
                    if kind == "call":
                        name = rng.choice([n for n in METHODS if n != "Train"])
                        await self._call(channel, name, hostile.serialized(name))
                    elif kind == "stream":
                        number = rng.choice((1, 2, 5, 20))
                        contents = [hostile.serialized("Train") for _ in range(number)]
                        await self._stream(channel, contents, rng.random() < 0.3)
                    elif kind == "run":
                        await self._own_run(channel, hostile, f"hostile {task} {turn}")
                    else:
                        address = rng.choice((self._grpc, self._grpc, self._http))
                        await self._connect(address, hostile.raw())

    async def _own_run(self, channel: grpc.aio.Channel, hostile: Hostile, run_id: str) -> None:
        """Join a run whose plan is right, and let its ranks misbehave."""
        secret = hostile.rng.randbytes(32)
        join = pb.JoinRequest(run_id=run_id, plan=PLAN, epoch=1, secret=secret)
        join.plan.round_timeout_seconds = hostile.rng.choice((0.05, 60))
        for rank in range(3):
            join.rank = rank
            await self._call(channel, "Join", join.SerializeToString())
        streams = [hostile.rank(run_id, rank, secret) for rank in range(3)]
        await asyncio.gather(*(self._stream(channel, contents, False) for contents in streams))

    def _count(self, kind: str, number: int = 1) -> None:
        self._outcome.messages += number
        self._outcome.kinds[kind] += number

    async def _call(self, channel: grpc.aio.Channel, name: str, content: bytes) -> None:
        """Call a method that takes one message."""
        path = f"/{SERVICE.full_name}/{name}"
        self._count(name)
        status = "OK"
        try:
            if METHODS[name].server_streaming:
                stream: Any = channel.unary_stream(path)(content, timeout=5)  # type: ignore[arg-type]
                for _ in range(2):
                    await stream.read()
                stream.cancel()
            else:
                await channel.unary_unary(path)(content, timeout=5)  # type: ignore[arg-type]
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        except asyncio.CancelledError:
            status = "CANCELLED"
        self._outcome.answers[f"{name} {status}"] += 1

    async def _stream(self, channel: grpc.aio.Channel, contents: list[bytes], is_cut: bool) -> None:
        """Open a rank's stream, write messages, and cut it off or wait for what is answered."""
        status = "OK"
        call: Any = channel.stream_stream(f"/{SERVICE.full_name}/Train")(timeout=2)
        try:
            for content in contents:
                self._count("Train")
                await call.write(content)
            if not is_cut:
                await call.done_writing()
                await asyncio.wait_for(call.read(), 0.3)
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        except (asyncio.InvalidStateError, asyncio.CancelledError, asyncio.TimeoutError):
            status = "ended"
        call.cancel()
        self._outcome.answers[f"Train {status}"] += 1

    async def _connect(self, address: str, pieces: list[bytes]) -> None:
        """Write bytes to a port that follow HTTP/2 or HTTP/1 in part, or not at all."""
        host, _, port = address.rpartition(":")
        self._count("raw to gRPC" if address == self._grpc else "raw to HTTP", len(pieces))
        with suppress(OSError, asyncio.TimeoutError):
            reader, writer = await asyncio.open_connection(host, int(port))
            with suppress(OSError, asyncio.TimeoutError):
                for piece in pieces:
                    writer.write(piece)
                    await asyncio.wait_for(writer.drain(), 1)
                await asyncio.wait_for(reader.read(4096), 0.05)
            writer.close()


def secrets_hold(stub: pb_grpc.CoordinatorServiceStub) -> bool:
    """Whether a join with another secret is refused."""
    join = pb.JoinRequest(run_id="probe", rank=0, plan=PLAN, epoch=1, secret=SECRET)
    stub.Join(join)
    join.secret, join.epoch = bytes(32), 2
    try:
        stub.Join(join)
    except grpc.RpcError:
        return True
    return False


def fuzz(messages: int, seed: int, folder: Path) -> Outcome:
    """Attack a coordinator of its own; return what was sent, and what was found."""
    outcome, journal, log = Outcome(seed), folder / "journal.db", folder / "coordinator.log"
    command = [sys.executable, "-m", "switokd", "coordinator", "--port=0", "--http-port=0"]
    with process([*command, f"--journal={journal}"], folder, log) as child:
        deadline = time.monotonic() + 30
        while "\n" not in (text := log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        addresses = json.loads(text.splitlines()[0])
        server = psutil.Process(addresses["pid"])
        with grpc.insecure_channel(addresses["grpc"]) as channel:
            stub = pb_grpc.CoordinatorServiceStub(channel)
            outcome.secrets_hold = secrets_hold(stub)
            # Without secrets anyone may take a run over by a higher epoch: there is none higher.
            epoch = 1 if outcome.secrets_hold else 2**63 - 1
            honest = HonestRun(addresses["grpc"], seed, epoch, outcome)
            honest.start()
            honest.is_ready.wait(20)
            memory, started = server.memory_info().rss, time.monotonic()
            asyncio.run(Attack(addresses, messages, outcome).run())
            outcome.seconds = time.monotonic() - started
            honest.is_over.set()
            honest.join(30)
            if honest.is_alive():
                outcome.problems.append(f"the honest run hangs after step {outcome.steps}")
            if child.poll() is not None:
                outcome.problems.append(f"the coordinator has ended with {child.returncode}")
            else:
                outcome.memory_growth = server.memory_info().rss - memory
                _check_health(channel, addresses["http"], outcome)
                child.terminate()
                if code := child.wait(20):
                    outcome.problems.append(f"the coordinator ended with exit code {code}")
    said = log.read_text(errors="replace")
    outcome.log_bytes, outcome.tracebacks = (
        len(said),
        said.count("Traceback (most recent call last)"),
    )
    if not outcome.problems:
        _check_journal(journal, outcome)
    return outcome


def _check_health(channel: grpc.Channel, http: str, outcome: Outcome) -> None:
    try:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            outcome.problems.append("the coordinator is not healthy")
        with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as response:
            response.read()
    except (grpc.RpcError, OSError) as error:
        outcome.problems.append(f"the coordinator does not answer: {error!r}")


def _check_journal(journal: Path, outcome: Outcome) -> None:
    """The journal, too, must hold every step of the honest run as it was decided."""
    found = replay(JournalRecord(journal, RUN))
    if not found.is_exact or found.recorded.steps != outcome.steps:
        outcome.problems.append(
            f"the journal has {found.recorded.steps} of {outcome.steps} steps, and the differences "
            f"{found.differences}"
        )


def main() -> None:
    """Attack a coordinator, and print what was sent and found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(options.messages, options.seed, Path(folder))
    print(json.dumps(vars(outcome), indent=2))
    sys.exit(bool(outcome.problems))


if __name__ == "__main__":
    main()
