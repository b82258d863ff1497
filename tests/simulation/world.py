"""A run with its coordinator, its disk and its faults; raises Violation if an invariant breaks."""

from __future__ import annotations

import random
from collections import Counter

from switokd.coordination.heartbeat import HeartbeatThread
from switokd.distillation.decision import Decision
from switokd.distillation.overrides import Stamped
from switokd.errors import SwitokdError
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.registry import RunRegistry
from tests.simulation import grpc_stub
from tests.simulation.clock import Clock
from tests.simulation.disk import Disk, DiskJournal
from tests.simulation.faults import Faults
from tests.simulation.network import Server
from tests.simulation.numbers import Numbers
from tests.simulation.operator import Operator
from tests.simulation.ranks import RUN_ID, Job, NoHeart, Violation
from tests.simulation.threads import Threads, installed

EXPECTED = ("went away", "did not answer", "has taken over", "has failed", "no report", "no stream")
"""Words of the reasons for which a job may fail after a fault."""
LOST = tuple(
    f"the coordinator at host:1 {what}"
    for what in ("went away", "did not decide", "ended the stream", "does not answer")
)
"""The beginnings of the reasons for which a rank may fail that must not go on without one."""
LONGEST = 20_000.0
"""Virtual seconds within which a run must end."""


class World:
    """Everything that a seed makes. steps: length of the run."""

    def __init__(self, seed: int, steps: int = 100) -> None:
        self.rng, self.steps = random.Random(seed), steps
        self.numbers, self.clock, self.disk = Numbers(seed), Clock(self.rng), Disk()
        self.accumulates = self.rng.choice((1, 1, 2, 3))
        """Steps between two updates; a decision must be confirmed before an update only."""
        self.calm_from = steps - 19 if self.rng.random() < 0.5 else steps + 1
        """From this step on, no fault happens."""
        self.may_close = self.rng.random() < 0.3
        """Whether ranks may leave; else they wait until the journal is complete."""
        self.last_write_takes = self.rng.choice((0.0, 0.0, 5.0))
        """Seconds for which the last line of the record keeps its thread busy."""
        self.is_calm = False
        self.decided_alone = 0
        self.record: list[Decision] = []
        self.checkpoint = self.acknowledged = 0
        self._metrics = Metrics()
        self.skew = 0.0
        self.lost_rows: set[int] = set()
        """Steps whose only copy on the coordinator's disk was damaged."""
        self.unheard: set[int] = set()
        """Steps of starts that no coordinator has heard of: its disk may have those of an earlier
        start, in which a command did not hold yet."""
        self.operator = Operator(self)
        self.faults = Faults(self)
        self.is_alive, self.stopped_until = True, 0.0

    def run(self) -> Counter[str]:
        """Train to the end under faults, then heal and check; return the faults by kind."""
        fakes = Threads(self.clock).replacements() | grpc_stub.replacements(self.clock)
        with installed({**fakes, HeartbeatThread: NoHeart}):
            try:
                self._run()
            finally:
                self.clock.close()
        return self.faults.tried

    def _run(self) -> None:
        self.server = self._serve()
        self.job = Job(self, 1, 1)
        self.clock.start(self._disturb, self)
        while len(self.job.finished) < 3:
            self._step()
        self.heal()
        if not self.may_close:
            limit = self.clock.now + 900.0
            while not self._is_complete() and self.clock.now < limit:
                self._step()
            if not self._is_complete():
                raise Violation("the journal has a hole, although all could have told it")
        self.may_close = True
        while len(self.job.closed) < 3:
            self._step()
        if [d.step for d in self.record] != list(range(1, self.steps + 1)):
            raise Violation("the record has a hole")
        has_waited = self.job.first_step <= self.calm_from <= self.steps
        if has_waited and not self.job.is_undisturbed and self.operator.forgotten():
            raise Violation(f"commands are never taken: {self.operator.forgotten()}")
        rows = [row for row in self.disk.rows(RUN_ID) if row and row.step not in self.unheard]
        if any(row != self.numbers.truth(row.step) for row in rows):
            raise Violation("the journal has another decision")

    def add_to_record(self, decision: Decision) -> None:
        """Do what the recorder of rank 0 does."""
        if decision.step != len(self.record) + 1:
            raise Violation(f"record: step {decision.step} follows step {len(self.record)}")
        self.record.append(decision)

    def note_command(self, stamped: Stamped) -> None:
        """Do what rank 0 does before it hands a command to the others."""
        if any(stamped.command.id == noted.command.id for noted in self.numbers.commands):
            raise Violation(f"command {stamped.command.id} is taken twice")
        self.numbers.command(stamped)

    def check_decision(self, decision: Decision) -> None:
        """Every decision of a step is the same, whoever makes it and however often."""
        if decision != self.numbers.truth(decision.step):
            raise Violation(f"step {decision.step} is decided differently")

    def must_be_decided(self, job: Job, step: int) -> bool:
        """Whether the coordinator must decide a step in time, because nothing is wrong."""
        is_over = self.is_calm and (job.is_undisturbed or step >= self.calm_from)
        return is_over or not self.faults.tried

    def check_acknowledged(self, step: int, job: Job) -> None:
        """What is acknowledged is on the disk."""
        if job is not self.job or step < job.first_step or step <= self.acknowledged:
            return
        run = self.disk.runs.get(RUN_ID)
        for s in range(job.first_step, step + 1):
            if not run or (s not in run.rows and s not in self.lost_rows):
                raise Violation(f"step {s} is acknowledged and not on the disk")
        self.acknowledged = step

    def save_checkpoint(self, step: int) -> None:
        """Do what rank 0 does, after it has settled: the record is written by another thread.

        No checkpoint follows the last step: only the end of the run waits for the record.
        """
        if step == self.steps:
            return
        if not self.clock.wait_for(lambda: len(self.record) >= step, 60.0, 1e-3):
            raise Violation(f"checkpoint: the record ends at {len(self.record)}, before {step}")
        self.checkpoint = step

    def note_failure(self, error: SwitokdError, job: Job, has_joined: bool) -> None:
        """A run may fail because of a lost rank, but not because of the protocol."""
        reason = str(error)
        # The reason may be another rank's: "rank 0 (student) stopped: the coordinator ...".
        is_lost = any(beginning in reason for beginning in LOST)
        may_be_lost = not has_joined or self.numbers.on_loss != "decide_alone"
        if is_lost and may_be_lost:
            return
        if job is self.job and (is_lost or not any(word in reason for word in EXPECTED)):
            raise Violation(f"the run has failed: {reason}")

    def restart_job(self) -> None:
        """Start the job again from its checkpoint."""
        self.clock.at(self.rng.choice((0.02, 0.5, 6.0)), self._start_job)

    def _start_job(self) -> None:
        run = self.disk.runs.get(RUN_ID)
        if run and run.epoch < self.job.epoch:
            self.unheard.update(range(self.job.first_step, self.checkpoint + 1))
        del self.record[self.checkpoint :]
        self.acknowledged = min(self.acknowledged, self.checkpoint)
        self.job = Job(self, self.job.epoch + 1, self.checkpoint + 1)

    def _step(self) -> None:
        if self.clock.now > LONGEST or not self.clock.step():
            raise Violation("nothing goes on")

    def _serve(self) -> Server:
        self.lost_rows.update(self.disk.remove_damaged())
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
        return self.clock.now + self.skew

    def _is_complete(self) -> bool:
        run = self.disk.runs.get(RUN_ID)
        steps = range(self.job.first_step, self.steps + 1)
        return run is not None and all(s in run.rows or s in self.lost_rows for s in steps)

    def heal(self) -> None:
        """End all faults."""
        self.is_calm = True
        self.disk.is_full = False
        for rank in self.job.ranks:
            rank.cut_off_until = rank.stopped_until = 0.0
            if rank.stream:
                rank.stream.slowness = 1.0
        self.serve_again()

    def _disturb(self) -> None:
        mean = self.rng.choice((0.01, 0.03, 0.1))
        if self.numbers.on_loss != "decide_alone":
            mean *= 30
        while not self.is_calm:
            if (
                self.clock.now > LONGEST / 20
            ):  # faults that come faster than checkpoints end nothing
                self.heal()
                return
            self.clock.wait(self.rng.expovariate(1 / mean), hurries=False)
            for _ in range(self.rng.choice((1, 1, 1, 2))):  # sometimes two at once
                if not self.is_calm and self.job.is_alive:
                    self.faults.fault()

    def serve_again(self) -> None:
        """Start a coordinator, unless one runs."""
        if not self.server.is_running:
            self.server = self._serve()
