"""One run as the coordinator sees it, from the first join to the end.

Dataclasses in, dataclasses out: no wire messages, no clock, no tasks. Therefore tests need no
server. Times are seconds of the caller's clock.

Not covered: writing its decisions down (`journal.py`), starting the run's processes again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from enum import Enum
from types import MappingProxyType

from switokd.distillation.decision import NOTHING, Decision, InForce, Mode
from switokd.distillation.gap import PairSums
from switokd.distillation.topology import Pair
from switokd.services.coordinator.commands import RunCommands
from switokd.services.coordinator.hangs import HangDetector
from switokd.services.coordinator.health import Health
from switokd.services.coordinator.limits import DEFAULTS, Limits
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.ranks import NOBODY, Caller, Ranks
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.rounds import DecidedRound, Needs, Rounds
from switokd.services.coordinator.steps import StepSet
from switokd.services.coordinator.text import sentence


class RunState(Enum):
    """State of a run. JOINING: not all ranks have attached a stream yet.

    STOPPED: ended before its last step without a failure; it can be continued.
    """

    JOINING = "joining"
    TRAINING = "training"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def has_left(self) -> bool:
        """Whether all ranks have left without a failure."""
        return self in (RunState.FINISHED, RunState.STOPPED)


class CoordinatedRun:
    """One run: its ranks, its rounds, its end. A method that raises `Refusal` changes nothing."""

    def __init__(
        self,
        run_id: str,
        plan: Plan,
        now: float,
        strategies: Collection[str] = (),
        epoch: int = 0,
        limits: Limits = DEFAULTS,
    ) -> None:
        """Create the run; Refusal if no run can follow the plan.

        strategies: import strings of strategies that the coordinator may import. epoch: how often
        the run's processes were started, as they count it.
        """
        plan.check()
        self.run_id = run_id
        self.plan = plan
        self.epoch = epoch
        self.created_at = now
        self.decided_alone = 0
        """Number of steps that ranks have applied without waiting for their decisions."""
        self._alone = StepSet()
        self._ranks = Ranks(run_id, plan)
        self._rounds = Rounds(plan, self._ranks, plan.rule(strategies), limits)
        self._hangs = HangDetector(self._ranks, self._rounds, plan.round_timeout, now)
        self.health = Health(self._ranks, self._rounds, plan.round_timeout)
        self.commands = RunCommands(plan)
        self._failure = ""
        self._ended_at: float | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks that the plan names."""
        return self._ranks.world_size

    @property
    def joined(self) -> Set[int]:
        """Ranks that have joined."""
        return self._ranks.joined

    @property
    def connected(self) -> Set[int]:
        """Ranks with an open stream."""
        return self._ranks.connected

    @property
    def last_decision(self) -> Decision | None:
        """The last decision; None before the first one."""
        return self._rounds.last_decision

    @property
    def last_step(self) -> int:
        """The last step that is decided or settled; 0 before the first."""
        decision = self._rounds.last_decision
        return max(decision.step if decision else 0, self._rounds.settled)

    @property
    def reported(self) -> Mapping[int, int]:
        """By rank: the last step that it has reported."""
        return {rank: self._rounds.step_of(rank) for rank in self.plan.networks_of}

    @property
    def failure(self) -> str:
        """Why the run failed; empty if it has not failed."""
        return self._failure

    @property
    def ended_at(self) -> float | None:
        """When the run finished or failed; None before."""
        return self._ended_at

    @property
    def state(self) -> RunState:
        """State of the run now."""
        if self._failure:
            return RunState.FAILED
        if self._ranks.all_finished:
            return RunState.STOPPED if self._ranks.is_stopped else RunState.FINISHED
        has_started = self._ranks.all_attached or self._rounds.have_begun
        return RunState.TRAINING if has_started else RunState.JOINING

    def describe(self, rank: int) -> str:
        """Name a rank with its networks: "rank 1 (teacher2, student)"."""
        return self._ranks.describe(rank)

    def join(self, rank: int, plan: Plan) -> None:
        """Add a rank; Refusal if its plan is not the run's plan."""
        self._check(rank)
        self._ranks.join(rank, plan)

    def restore(
        self, settled: int, decisions: Sequence[Decision], steps: Iterable[int], now: float
    ) -> None:
        """Continue after a journal's decisions; all ranks must come back within the timeout."""
        self._rounds.restore(settled, decisions, steps)
        self._hangs.expect_all(now)

    def attach(
        self, rank: int, caller: Caller = NOBODY, settled: int = 0, received: int | None = None
    ) -> Needs:
        """Note a rank's open stream; return what is needed. Refusal as `Ranks.attach`.

        settled, received: as in `Rounds.acknowledge`.
        """
        self._check(rank)
        self._ranks.attach(rank, caller)
        self.health.forget(rank)
        return self._rounds.attach(rank, settled, received)

    def report(
        self,
        rank: int,
        step: int,
        pairs: Mapping[Pair, PairSums],
        now: float,
        modes: Mapping[Pair, Mode] = MappingProxyType({}),
        in_force: InForce = NOTHING,
    ) -> DecidedRound | None:
        """Add one rank's sums of a step; see `Rounds.report`."""
        self._check(rank)
        return self._rounds.report(rank, step, pairs, now, modes, in_force)

    def must_wait(self, rank: int) -> bool:
        """Whether no more of a rank's messages may be taken now; see `Rounds.must_wait`."""
        return self._ended_at is None and self._rounds.must_wait(rank)

    def acknowledge(self, rank: int, settled: int, received: int | None) -> None:
        """Forget decisions that no rank needs again; see `Rounds.acknowledge`."""
        self._rounds.acknowledge(rank, settled, received)

    def add_settled(self, decision: Decision) -> bool:
        """Take over a decision that rank 0 has made; return whether it was missing."""
        return self._rounds.add_settled(decision)

    def note_alone(self, step: int) -> bool:
        """Note that a rank has applied a step without its decision; return whether it is new."""
        if step in self._alone:
            return False
        self._alone.add(step)
        self.decided_alone += 1
        return True

    def was_alone(self, step: int) -> bool:
        """Return whether a rank has said that it applied a step without its decision."""
        return step in self._alone

    def stall(self, rank: int, doing: str, now: float) -> None:
        """Note that a rank's collective failed; `hang` will name the rank at fault.

        doing: what the rank waited for.
        """
        self._hangs.stall(rank, doing, now)

    def hang(self, now: float) -> str | None:
        """Name the ranks that the run has waited for too long; None if no rank hangs."""
        if self._ended_at is not None:
            self.health.clear()
            return None
        self.health.check(now)
        if reason := self._hangs.describe(self.state is RunState.JOINING, now):
            return reason + self.health.explain(now)
        return self.health.hang()

    @property
    def settled(self) -> int:
        """Last step that is known to be in rank 0's record."""
        return self._rounds.settled

    def leave(self, rank: int, failure: str, now: float, stopped: bool = False) -> None:
        """Note a rank's Leave message. failure, stopped: as in the contract."""
        if failure:
            self._ranks.detach(rank)
            self.fail(f"{self._ranks.describe(rank)} stopped: {failure}", now)
        else:
            self._ranks.finish(rank, stopped)
            if self._ranks.all_finished:
                self._ended_at = now

    def lose(self, rank: int, now: float) -> None:
        """Note that a rank's stream broke without a Leave message; the rank may come back."""
        self._ranks.lose(rank, now)

    def fail(self, reason: str, now: float) -> None:
        """End the run; the first reason stays."""
        if self._ended_at is None:
            self._failure, self._ended_at = sentence(reason), now

    def _check(self, rank: int) -> None:
        """Raise Refusal if the run has no such rank or has failed."""
        self._ranks.check(rank)
        if self._failure:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"run {self.run_id!r} has failed: {self._failure}",
            )
