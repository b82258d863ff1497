"""A run with its coordinator, its disk and its faults; raises Violation if an invariant breaks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from switokd.distillation.decision import Decision
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.outbox import StreamEnd
from switokd.services.coordinator.registry import RunRegistry
from tests.simulation.clock import Clock, Process, pause
from tests.simulation.disk import Disk, DiskJournal
from tests.simulation.network import Server
from tests.simulation.numbers import Numbers
from tests.simulation.ranks import RUN_ID, Job, Violation

EXPECTED = ("went away", "did not answer", "has taken over", "has failed", "no report", "no stream")
"""Words of the reasons for which a job may fail after a fault."""
LONGEST = 20_000.0
"""Virtual seconds within which a run must end."""


class World:
    """Everything that a seed makes. steps: length of the run."""

    def __init__(self, seed: int, steps: int = 100) -> None:
        self.rng, self.steps = random.Random(seed), steps
        self.numbers, self.clock, self.disk = Numbers(seed), Clock(), Disk()
        self.faults: Counter[str] = Counter()
        self.decided_alone = 0
        self.record: list[Decision] = []
        self.checkpoint = self.acknowledged = 0
        self._metrics = Metrics()
        self._skew = 0.0
        self._lost_rows: set[int] = set()
        """Steps whose only copy on the coordinator's disk was damaged."""
        self._is_healing = False
        self.server = self._serve()
        self.job = Job(self, 1, 1)

    def run(self) -> Counter[str]:
        """Train to the end under faults, then heal and check; return the faults by kind."""
        self.clock.start(self._disturb())
        while len(self.job.finished) < 3:
            self._step()
        self._heal()
        limit = self.clock.now + 900.0
        while not self._is_complete() and self.clock.now < limit:
            self._step()
        if [d.step for d in self.record] != list(range(1, self.steps + 1)):
            raise Violation("the record has a hole")
        if not self._is_complete():
            raise Violation("the journal has a hole, although all could have told it")
        if any(row and row != self.numbers.truth(row.step) for row in self.disk.rows(RUN_ID)):
            raise Violation("the journal has another decision")
        return self.faults

    def add_to_record(self, decisions: Sequence[Decision]) -> None:
        """Do what the recorder of rank 0 does."""
        for decision in decisions:
            self.check_decision(decision)
            if decision.step != len(self.record) + 1:
                raise Violation(f"record: step {decision.step} follows step {len(self.record)}")
            self.record.append(decision)

    def check_decision(self, decision: Decision) -> None:
        """Every decision of a step is the same, whoever makes it and however often."""
        if decision != self.numbers.truth(decision.step):
            raise Violation(f"step {decision.step} is decided differently")

    def check_applied(self, decision: Decision, step: int, rank: int) -> None:
        """What a rank applies is what is decided."""
        truth = self.numbers.truth(step)
        for pair in (p for p in truth.pairs if p.pair in self.job.ranks[rank].own.reported):
            if decision.mode(pair.pair) is not pair.mode:
                raise Violation(f"rank {rank} applies step {step} differently")

    def check_acknowledged(self, step: int, job: Job) -> None:
        """What is acknowledged is on the disk."""
        if job is not self.job or step < job.first_step or step <= self.acknowledged:
            return
        run = self.disk.runs.get(RUN_ID)
        for s in range(job.first_step, step + 1):
            if not run or (s not in run.rows and s not in self._lost_rows):
                raise Violation(f"step {s} is acknowledged and not on the disk")
        self.acknowledged = step

    def save_checkpoint(self, step: int) -> None:
        """Do what rank 0 does, after it has settled."""
        if len(self.record) < step:
            raise Violation(f"checkpoint: the record ends at {len(self.record)}, before {step}")
        self.checkpoint = step

    def note_failure(self, end: StreamEnd, job: Job) -> None:
        """A run may fail because of a lost rank, but not because of the protocol."""
        if job is self.job and not any(word in end.details for word in EXPECTED):
            raise Violation(f"the run has failed: {end.details}")

    def restart_job(self) -> None:
        """Start the job again from its checkpoint."""
        self.clock.at(self.rng.choice((0.02, 0.5, 6.0)), self._start_job)

    def _start_job(self) -> None:
        del self.record[self.checkpoint :]
        self.acknowledged = min(self.acknowledged, self.checkpoint)
        self.job = Job(self, self.job.epoch + 1, self.checkpoint + 1)

    def _step(self) -> None:
        if self.clock.now > LONGEST or not self.clock.step():
            raise Violation(f"nothing goes on; ranks are at {self.job.at}")

    def _serve(self) -> Server:
        self._journal = journal = DiskJournal(self.disk)
        runs = RunRegistry(self._metrics, journal=journal, clock=self._coordinators_clock)
        server = Server(runs, self.clock)
        server.watch()

        def commit() -> None:
            if server.is_running:
                server.when_running(journal.commit)
                self.clock.at(self.rng.uniform(0.005, 0.1), commit)

        commit()
        return server

    def _coordinators_clock(self) -> float:
        return self.clock.now + self._skew

    def _is_complete(self) -> bool:
        run = self.disk.runs.get(RUN_ID)
        steps = range(self.job.first_step, self.steps + 1)
        return run is not None and all(s in run.rows or s in self._lost_rows for s in steps)

    def _heal(self) -> None:
        self._is_healing = True
        self.disk.is_full = False
        if not self.server.is_running:
            self.server = self._serve()

    def _disturb(self) -> Process:
        mean = self.rng.choice((0.01, 0.03, 0.1))
        while not self._is_healing:
            yield pause(self.rng.expovariate(1 / mean))
            for _ in range(self.rng.choice((1, 1, 1, 2))):  # sometimes two at once
                if not self._is_healing and self.job.is_alive:
                    self._fault()

    def _fault(self) -> None:
        often = ("broken", "slow", "doubled", "cut_off") * 3
        kinds = ("crashed", "frozen", "full", "flipped", "hurried", "skewed", "killed")
        kind = self.rng.choice((*often, *kinds))
        if getattr(self, f"_{kind}")():
            self.faults[kind] += 1

    def _broken(self) -> bool:
        return self._on_stream(lambda stream: stream.breaks())

    def _slow(self) -> bool:
        slowness = self.rng.choice((1.0, 30.0, 300.0))
        return self._on_stream(lambda stream: setattr(stream, "slowness", slowness))

    def _doubled(self) -> bool:
        return self._on_stream(lambda stream: setattr(stream, "doubles", 5))

    def _cut_off(self) -> bool:
        rank = self.rng.choice(self.job.ranks)
        if not rank.stream:
            return False
        rank.cut_off_until = self.clock.now + self.rng.choice((0.005, 0.05, 0.5, 5.0))
        rank.stream.breaks()
        return True

    def _frozen(self) -> bool:
        if not self.server.is_answering:
            return False
        seconds = self.rng.choice((0.005, 0.05, 0.5, 4.0))
        self.server.frozen_until = max(self.server.frozen_until, self.clock.now + seconds)
        return True

    def _crashed(self) -> bool:
        if not self.server.is_running:
            return False
        self.server.crash()
        self.clock.at(self.rng.choice((0.02, 0.1, 1.0, 10.0)), self._serve_again)
        return True

    def _serve_again(self) -> None:
        if not self.server.is_running:
            self.server = self._serve()

    def _full(self) -> bool:
        self.disk.is_full = not self.disk.is_full
        return self.disk.is_full

    def _flipped(self) -> bool:
        run = self.disk.runs.get(RUN_ID)
        if not run or not run.rows:
            return False
        step = self.rng.choice(sorted(run.rows))
        self.disk.flip(step)
        self._lost_rows.add(step)
        return True

    def _hurried(self) -> bool:
        return self.clock.hurry()

    def _skewed(self) -> bool:
        self._skew += self.rng.choice((1.0, 10.0, 1000.0))
        return self.server.is_answering

    def _killed(self) -> bool:
        if not self.job.is_alive:
            return False
        self.job.fail()
        return True

    def _on_stream(self, change: object) -> bool:
        streams = [rank.stream for rank in self.job.ranks if rank.stream]
        if not streams:
            return False
        change(self.rng.choice(streams))  # type: ignore[operator]
        return True
