"""The ranks of a job: they train in step, report, decide alone, and settle.

The protocol, the ranks' own decisions and the settling are the real ones; only the waiting is that
of `Client`, written as processes of the virtual clock.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING

import grpc

from switokd.coordination.own import first_difference
from switokd.coordination.protocol import RankProtocol
from switokd.coordination.settling import decide_reports
from switokd.distillation.decision import Decision
from switokd.services.coordinator.messages import plan_from_wire
from switokd.services.coordinator.outbox import StreamEnd
from switokd.services.coordinator.refusal import Refusal
from switokd.v1 import coordinator_pb2 as pb
from tests.simulation.clock import Process, Until, pause
from tests.simulation.network import Stream
from tests.simulation.numbers import Board

if TYPE_CHECKING:
    from tests.simulation.world import World

RUN_ID = "run"
DEADLINE = 1.0
SETTLE_EVERY = 7


class Violation(AssertionError):
    """The simulation has found a state that must not be."""


class Job:
    """One start of the run's processes."""

    def __init__(self, world: World, epoch: int, first_step: int) -> None:
        self.world, self.epoch, self.first_step = world, epoch, first_step
        self.is_alive = True
        self.board = Board()
        self.at: dict[int, int] = dict.fromkeys(range(3), first_step - 1)
        """By rank: the step whose exchange it has reached."""
        self.missing: dict[int, int] = {}
        self.gathered: dict[int, dict[int, list[bytes]]] = {}
        self.finished: set[int] = set()
        self.plan = world.numbers.plan(first_step)
        self.ranks = [Rank(self, rank) for rank in range(3)]
        for rank in self.ranks:
            world.clock.start(rank.train(), lambda: self.is_alive)
            world.clock.start(rank.connect(), lambda: self.is_alive)

    def has_reached(self, step: int) -> bool:
        """Whether all ranks have come to the exchange of a step."""
        return min(self.at.values()) >= step

    def fail(self) -> None:
        """End all processes of the job; it starts again."""
        if self.is_alive:
            self.is_alive = False
            for rank in self.ranks:
                if rank.stream:
                    rank.stream.breaks()
            self.world.restart_job()


class Rank:
    """One process of a job."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank, self.world = job, rank, job.world
        self.protocol = RankProtocol(RUN_ID, rank, job.epoch, f"{job.epoch}.{rank}", job.first_step)
        self.own = job.world.numbers.own(rank, job.board)
        self.stream: Stream | None = None
        self.last: Decision | None = None
        self.alone: dict[int, Decision] = {}
        self.cut_off_until = 0.0

    def connect(self) -> Process:
        """Keep a stream open."""
        while True:
            yield Until(self._can_connect)
            server = self.world.server
            plan = plan_from_wire(self.job.plan)
            try:
                server.runs.join(RUN_ID, self.rank, plan, server.runs.now(), self.job.epoch)
            except Refusal as refusal:
                self._end(StreamEnd(grpc.StatusCode[refusal.kind.name], str(refusal)))
                return
            finally:
                server.when_running(lambda: None)
            stream = self.stream = Stream(server, self.world.rng, self._receive, self._end)
            for message in self.protocol.attach():
                stream.send(message)
            yield Until(partial(_is_over, stream))
            self.protocol.lose()
            self.stream = None
            yield pause(0.05 + self.world.rng.uniform(0.0, 0.5))

    def train(self) -> Process:
        """Train to the last step."""
        job, rng = self.job, self.world.rng
        for step in range(job.first_step, self.world.steps + 1):
            yield pause(rng.uniform(5e-4, 2e-2))
            job.at[self.rank] = step
            yield Until(partial(job.has_reached, step))
            report = self.world.numbers.report(self.own, self.rank, step)
            self._send(self.protocol.report(report))
            if self.own.reported:
                yield from self._decide(step)
            if step % SETTLE_EVERY == 0 or step == self.world.steps:
                yield from self._settle(step)
        job.finished.add(self.rank)
        yield Until(lambda: False)

    def _decide(self, step: int) -> Generator[Until, bool, None]:
        """What `Client.decision` does."""
        patience = 0.0 if self.protocol.is_alone else DEADLINE
        is_there = yield Until(lambda: self._has(step), patience)
        if is_there:
            assert self.last is not None
            if (safe := self.own.safe) and first_difference(safe, self.last):
                raise Violation(f"step {step}: the coordinator decided differently than a rank")
            applied = self.last
        else:
            yield Until(lambda: self.own.settled(0.0) is not None, 60.0)
            alone = self.own.settled(0.0)
            if alone is None:
                raise Violation(f"step {step}: the first rank's choice never came")
            self.protocol.decide_alone(step)
            self.world.decided_alone += 1
            applied = self.alone[step] = alone
        self.world.check_applied(applied, step, self.rank)

    def _settle(self, step: int) -> Generator[Until, bool, None]:
        """What `Client.settle` does."""
        job = self.job
        if self.rank == 0:
            patience = 0.0 if self.protocol.is_alone else DEADLINE
            is_there = yield Until(lambda: self._has(step), patience)
            if not is_there:
                self.protocol.decide_alone(step)
            job.missing[step] = 0 if is_there else self.protocol.decided + 1
        yield Until(lambda: step in job.missing)
        new: list[Decision] = []
        if 0 < (first := job.missing[step]) <= step:
            mine = [r.SerializeToString() for r in self.protocol.undecided(first, step)]
            gathered = job.gathered.setdefault(step, {})
            gathered[self.rank] = mine
            if self.rank == 0:
                yield Until(lambda: len(gathered) == 3)
                reports = [gathered[rank] for rank in range(3)]
                decisions = decide_reports(job.plan, self.world.numbers.config.method.rule, reports)
                new = [d for d in decisions if d.step > self.protocol.decided]
        yield pause(self.world.rng.uniform(0.0, 5e-3))
        new = [d for d in new if d.step > self.protocol.decided]
        if self.rank == 0:
            self.world.add_to_record(new)
        self._send(self.protocol.settle(step, new))
        if self.rank == 0:
            self.world.save_checkpoint(step)
        self.alone = {s: d for s, d in self.alone.items() if s >= step}

    def _has(self, step: int) -> bool:
        return self.last is not None and self.last.step >= step

    def _can_connect(self) -> bool:
        return self.world.server.is_answering and self.world.clock.now >= self.cut_off_until

    def _send(self, messages: list[pb.TrainRequest]) -> None:
        for message in messages:
            if self.stream and self.stream.is_open:
                self.stream.send(message)

    def _receive(self, response: pb.TrainResponse) -> None:
        received = self.protocol.receive(response, self.protocol.attempt)
        self._send(received.messages)
        for decision in received.decisions:
            self.world.check_decision(decision)
            if self.rank == 0:
                self.world.add_to_record([decision])
            applied = self.alone.get(decision.step)
            if applied and first_difference(applied, decision):
                raise Violation(f"step {decision.step} was applied otherwise than decided")
            self.last = decision
        self.world.check_acknowledged(self.protocol.recorded, self.job)
        if received.is_broken and self.stream:
            self.stream.breaks()

    def _end(self, end: StreamEnd) -> None:
        if end.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OK):
            return
        self.world.note_failure(end, self.job)
        self.world.clock.at(0.0, self.job.fail)


def _is_over(stream: Stream) -> bool:
    return not stream.is_open
