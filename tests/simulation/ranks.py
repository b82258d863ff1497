"""The ranks of a job: each trains with the real `Client`, in threads under the virtual clock.

Not covered: heartbeats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from switokd.coordination.client import Client
from switokd.coordination.membership import Endpoint, Membership
from switokd.distillation.decision import Decision
from switokd.errors import SwitokdError
from switokd.v1 import coordinator_pb2 as pb
from tests.simulation.clock import Clock
from tests.simulation.network import Stream
from tests.simulation.threads import Event

if TYPE_CHECKING:
    from tests.simulation.world import World

RUN_ID, SECRET = "run", b"known to all ranks of the run"
DEADLINE = 1.0
SETTLE_EVERY = 7
STUCK_SECONDS = 10.0
"""How long a rank that has failed may still wait for the others."""


class Violation(AssertionError):
    """The simulation has found a state that must not be."""


class NoHeart:
    """Sends no heartbeats."""

    def __init__(self, send: Callable[[pb.TrainRequest], None], timeout: float) -> None:
        pass

    def stop(self) -> None:
        pass


class Job:
    """One start of the run's processes."""

    def __init__(self, world: World, epoch: int, first_step: int) -> None:
        self.world, self.epoch, self.first_step = world, epoch, first_step
        self.is_alive = True
        self.is_undisturbed = world.is_calm
        self.commands = list(world.numbers.commands)
        """Those that rank 0 has found in the run folder."""
        self.board: dict[str, str] = {}
        self.collectives: dict[int, Collective] = {}
        """By number, as each rank counts them."""
        self.finished: set[int] = set()
        self.closed: set[int] = set()
        self.ranks = [Rank(self, rank) for rank in range(3)]
        for rank in self.ranks:
            world.clock.start(rank.train, rank)

    def fail(self) -> None:
        """Kill all processes of the job; it starts again."""
        if self.is_alive:
            self.is_alive = False
            for rank in self.ranks:
                self.world.clock.kill(rank)
                if rank.stream:
                    rank.stream.breaks()
            self.world.restart_job()


class Collective:
    """One operation that all ranks do together."""

    def __init__(self, kind: str, clock: Clock) -> None:
        self.kind, self.brought = kind, dict[int, Any]()
        self.rank_0_is_there, self.all_are_there = Event(clock), Event(clock)

    def bring(self, rank: int, mine: Any) -> None:
        """Note that a rank has come."""
        self.brought[rank] = mine
        if rank == 0:
            self.rank_0_is_there.set()
        if len(self.brought) == 3:
            self.all_are_there.set()


class Peers:
    """The other ranks of a job, as one of them sees them."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job, self._rank, self._clock = job, rank, job.world.clock
        self._number = 0

    def exchange(self, mine: bool) -> bool:
        """Wait for all ranks; return what rank 0 has brought."""
        collective = self._come("exchange", mine)
        collective.all_are_there.wait()
        return bool(collective.brought[0])

    def gather(self, mine: Any) -> list[Any]:
        collective = self._come("gather", mine)
        if self._rank:
            return []
        collective.all_are_there.wait()
        return [collective.brought[rank] for rank in range(3)]

    def broadcast(self, rank_0s: Any) -> Any:
        collective = self._come("broadcast", rank_0s)
        collective.rank_0_is_there.wait()
        return collective.brought[0]

    def publish(self, key: str, text: str) -> None:
        if self._job.board.setdefault(key, text) != text:
            raise Violation(f"{key} is published twice, and differs")

    def read(self, key: str, seconds: float) -> str | None:
        self._clock.wait_for(lambda: key in self._job.board, seconds, 2e-3)
        return self._job.board.get(key)

    def _come(self, kind: str, mine: Any = None) -> Collective:
        """Begin a collective; all ranks must begin the same ones in the same order."""
        self._number += 1
        new = Collective(kind, self._clock)
        collective = self._job.collectives.setdefault(self._number, new)
        if collective.kind != kind:
            raise Violation(f"one rank is in {kind}, another one in {collective.kind}")
        collective.bring(self._rank, mine)
        return collective


class Rank:
    """One process of a job."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank, self.world, self.clock = job, rank, job.world, job.world.clock
        self.is_alive, self.stopped_until = True, 0.0
        self.stream: Stream | None = None
        self.cut_off_until = 0.0
        self.peers = Peers(job, rank)
        self.client: Client | None = None
        self._config, self._placement = self.world.numbers.config, self.world.numbers.placement
        self.teaches = [
            p for p in self._config.topology.pairs if rank in self._placement.ranks_of(p.teacher)
        ]
        """The pairs of its teachers."""
        self._heard = self._heard_alone = job.first_step - 1
        """The last step whose decision has arrived; the same when a step was last decided alone."""
        self._alone_steps = 0
        self._alone_waits = 0.0
        """Seconds that it has waited since, for decisions that have not come."""

    def can_connect(self) -> bool:
        return self.world.server.is_answering and self.clock.now >= self.cut_off_until

    def train(self) -> None:
        """Do what a rank does, from the start of its process to the end."""
        try:
            self._train()
        except SwitokdError as error:
            self._fail(error)

    def _train(self) -> None:
        job, world = self.job, self.world
        self.client = client = Client(
            Membership(Endpoint("host:1"), RUN_ID, self.rank, job.epoch, SECRET),
            self._config,
            self._placement,
            on_decision=self._on_decision,
            on_failure=self._on_failure,
            first_step=job.first_step,
            peers=self.peers,
        )
        client.commands.restore(job.commands, world.note_command)
        for step in range(job.first_step, world.steps + 1):
            self._step(client, step)
        job.finished.add(self.rank)
        self.clock.wait_for(lambda: world.may_close, 1e9, 1.0)
        client.close()
        job.closed.add(self.rank)
        self.clock.kill(self)  # the process ends, with threads that have not finished

    def _step(self, client: Client, step: int) -> None:
        """Do what `train_step` and the loop around it do in a step."""
        self._pause(5e-4, 2e-2)
        is_commanded = self.peers.exchange(client.commands.has_waiting)
        if step == self.world.calm_from and not self.job.is_undisturbed:
            self.world.heal()
            self.clock.wait(20.0)
        parts = self.world.numbers.parts(self.rank, step, client.pairs)
        self._timed(client, step - 1, lambda: client.report(step, parts))
        early = client.decide_early(step, parts)
        if self.teaches:
            decision = early or self._timed(client, step, lambda: client.decision(step))
            self._check_applied(decision, step)
            if step % self.world.accumulates == 0:
                self._pause(0.0, 2e-3)
                self._check_applied(self._timed(client, step, lambda: client.decision(step)), step)
                self._check_flag(client, step)
        if is_commanded:
            client.commands.take(step)
        if step % SETTLE_EVERY == 0 or step == self.world.steps:
            client.settle(step)
            if self.teaches:
                self._check_flag(client, step)
            if self.rank == 0:
                self.world.save_checkpoint(step)

    def _timed(self, client: Client, step: int, call: Callable[[], Any]) -> Any:
        """Decide a step; what does not come must not be waited for in every step."""
        started = self.clock.now
        result = call()
        stopped_until = max(rank.stopped_until for rank in self.job.ranks)
        took = self.clock.now - max(started, stopped_until)
        if took > DEADLINE / 2 and self.world.must_be_decided(self.job, step):
            raise Violation(f"step {step}: waits, although nothing is wrong")
        if client.alone_steps[-1:] == [step]:
            if self._heard > self._heard_alone:
                self._alone_waits = 0.0
            self._heard_alone = self._heard
            self._alone_waits += max(took, 0.0)
            if self._alone_waits > 3 * DEADLINE:
                raise Violation(f"step {step}: waits in every step for a lost coordinator")
        self.world.decided_alone += len(client.alone_steps) - self._alone_steps
        self._alone_steps = len(client.alone_steps)
        return result

    def _check_applied(self, decision: Decision, step: int) -> None:
        """What a rank applies is what is decided."""
        for pair in self.teaches:
            if decision.mode(pair) is not self.world.numbers.truth(step).mode(pair):
                raise Violation(f"rank {self.rank} applies step {step} differently")

    def _check_flag(self, client: Client, step: int) -> None:
        """A step counts as decided alone if, and only if, its decision had not come in time."""
        if step in client.alone_steps:
            if self.world.must_be_decided(self.job, step):
                raise Violation(f"step {step} is decided alone, although nothing is wrong")
        elif self._heard < step:
            raise Violation(f"step {step} is decided alone, and nobody is told")

    def hear(self, response: pb.TrainResponse) -> None:
        """Note what arrives at this rank."""
        if response.WhichOneof("event") == "decision":
            self._heard = max(self._heard, response.decision.step)
            self.world.check_acknowledged(response.decision.recorded_step, self.job)

    def check_message(self, message: pb.TrainRequest) -> None:
        """A report says whether the step before it was decided alone."""
        if message.WhichOneof("event") == "report" and self.client:
            before = message.report.step - 1
            if before in self.client.alone_steps and not message.report.previous_decided_alone:
                raise Violation(f"step {before} was decided alone, and the report does not say so")

    def _on_decision(self, decision: Decision) -> None:
        self.world.check_decision(decision)
        if self.rank == 0:
            if decision.step == self.world.steps:
                self.clock.wait(self.world.last_write_takes, hurries=False)
            self.world.add_to_record(decision)

    def _on_failure(self, error: SwitokdError) -> None:
        self.world.note_failure(error, self.job, self.client is not None)
        self.clock.at(STUCK_SECONDS, self.job.fail)

    def _fail(self, error: SwitokdError) -> None:
        """End this process; sometimes it says why, as it should."""
        self.world.note_failure(error, self.job, self.client is not None)
        if self.client and self.clock.rng.random() < 0.5:
            self.client.close(failure=str(error))
        self.job.fail()

    def _pause(self, least: float, most: float) -> None:
        self.clock.wait(self.clock.rng.uniform(least, most))
