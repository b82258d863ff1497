"""One run as the coordinator sees it: its ranks, the open rounds, the decisions.

Dataclasses in, dataclasses out; no wire, no clock of its own, no tasks, so that everything here
is tested without a server. A *round* is one step: it opens with the first rank's report and is
decided as soon as every rank that holds a teacher has reported. Reports of ranks that hold only
students show that they are alive. A round is complete when all ranks have reported.

Not covered: a run that outlives this process (journal), ranks that come back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from switokd.distillation.decision import Decision, decide
from switokd.distillation.gap import PairSums
from switokd.distillation.topology import Pair
from switokd.services.coordinator.plan import Plan, Refusal

STALL_SECONDS = 1.0
"""Ranks notice a peer's silence at the same time, give or take this."""


class Phase(Enum):
    """Life of a run."""

    JOINING = "joining"
    TRAINING = "training"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass
class Round:
    """One step under way."""

    opened_at: float
    reported: set[int] = field(default_factory=set)
    sums: dict[int, tuple[PairSums, ...]] = field(default_factory=dict)


class Decided(NamedTuple):
    """A decision with the seconds from the round's first report to it."""

    decision: Decision
    duration: float


class RunState:
    """One run's ranks, rounds, last decision. Methods that raise `Refusal` change nothing."""

    def __init__(
        self, run_id: str, plan: Plan, now: float, strategies: Collection[str] = ()
    ) -> None:
        """strategies: import strings of strategies that may be imported."""
        plan.check()
        self._rule = plan.rule(strategies)
        self._created_at = now
        self.run_id = run_id
        self.plan = plan
        self.joined: set[int] = set()
        self.connected: set[int] = set()
        self.finished: set[int] = set()
        self.failure = ""
        self.stalled: dict[int, str] = {}
        self.last: Decision | None = None
        self.ended_at: float | None = None
        self._step_of = dict.fromkeys(plan.networks_of, 0)
        self._parts_needed = sum(1 for pairs in plan.pairs_of.values() if pairs)
        self._rounds: dict[int, Round] = {}
        self._stalled_at = 0.0

    @property
    def world_size(self) -> int:
        """Number of ranks the run needs."""
        return len(self.plan.networks_of)

    @property
    def state(self) -> Phase:
        """Where the run stands."""
        if self.failure:
            return Phase.FAILED
        if len(self.finished) == self.world_size:
            return Phase.FINISHED
        attached = len(self.connected | self.finished)
        started = attached == self.world_size or any(self._step_of.values())
        return Phase.TRAINING if started else Phase.JOINING

    def who(self, rank: int) -> str:
        """A rank as people know it, with all it holds: "rank 1 (teacher2, student)"."""
        return f"rank {rank} ({', '.join(self.plan.networks_of[rank])})"

    def join(self, rank: int, plan: Plan) -> None:
        """Make a rank known; it must bring the run's own plan."""
        self._check_rank(rank)
        if plan.config_digest != self.plan.config_digest:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{self.who(rank)} was started with another configuration than the first rank of "
                f"run {self.run_id!r}: start every rank with the same run file and settings",
            )
        if plan != self.plan:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{self.who(rank)} has another plan than the first rank of run {self.run_id!r}",
            )
        self.joined.add(rank)

    def attach(self, rank: int) -> None:
        """Take a joined rank's stream."""
        self._check_rank(rank)
        if rank not in self.joined:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION, f"{self.who(rank)} must join before its stream"
            )
        if rank in self.connected or rank in self.finished:
            raise Refusal(
                Refusal.Kind.ALREADY_EXISTS,
                f"{self.who(rank)} of run {self.run_id!r} has its stream already",
            )
        self.connected.add(rank)

    def report(
        self, rank: int, step: int, pairs: Mapping[Pair, PairSums], now: float
    ) -> Decided | None:
        """Take one rank's part of a step; return the decision if it was the last part missing."""
        self._check_step(rank, step)
        round_ = self._rounds.get(step)
        self._check_pairs(rank, step, pairs, round_)
        if round_ is None:
            round_ = self._rounds[step] = Round(now)
        self._step_of[rank] = step
        round_.reported.add(rank)
        if len(round_.reported) == self.world_size:
            del self._rounds[step]
        if not pairs:
            return None
        round_.sums[rank] = tuple(pairs.values())
        if len(round_.sums) < self._parts_needed:
            return None
        distances = {
            pair: _add(round_.sums[r][i] for r, i in places).mean()
            for pair, places in self.plan.parts_of.items()
        }
        self.last = decide(step, distances, self._rule)
        return Decided(self.last, now - round_.opened_at)

    def leave(self, rank: int, failure: str, now: float) -> None:
        """Take a rank's goodbye: it has finished, or failed with this sentence."""
        self.connected.discard(rank)
        if not failure:
            self.finished.add(rank)
            if len(self.finished) == self.world_size:
                self.ended_at = now
        else:
            self.fail(f"{self.who(rank)} stopped: {failure}", now)

    def lose(self, rank: int, now: float) -> None:
        """Note that a rank's stream broke off without a goodbye."""
        self.connected.discard(rank)
        step = self._step_of[rank]
        self.fail(f"{self.who(rank)} went away after reporting step {step}", now)

    def stall(self, rank: int, doing: str, now: float) -> None:
        """Note that a rank's collective with the others failed; `overdue` will say whose fault."""
        if not self.stalled:
            self._stalled_at = now
        self.stalled[rank] = doing

    def fail(self, sentence: str, now: float) -> None:
        """End the run; the first reason stays."""
        if self.ended_at is None:
            self.failure, self.ended_at = sentence, now

    def watchdog(self, now: float) -> str | None:
        """Say which ranks keep the run waiting for longer than the plan allows, if any do."""
        if self.ended_at is not None:
            return None
        if self.stalled:
            return self._silent() if now - self._stalled_at > STALL_SECONDS else None
        if self.state is Phase.JOINING:
            waiting_since, what = self._created_at, "no stream"
            present = self.connected
        elif self._rounds:
            step, round_ = min(self._rounds.items())
            waiting_since, what = round_.opened_at, f"no report of step {step}"
            present = round_.reported
        else:
            return None
        if now - waiting_since <= self.plan.round_timeout:
            return None
        missing = [self.who(r) for r in self.plan.networks_of if r not in present]
        return (
            f"{what} from {', '.join(missing)} within {self.plan.round_timeout:g} s of the first "
            "rank's: it hangs, or its machine is cut off"
        )

    def _silent(self) -> str:
        """Name the ranks that all others waited for: those that have not complained themselves."""
        doing = next(iter(self.stalled.values()))
        silent = [self.who(r) for r in sorted(self.connected - self.stalled.keys())]
        if not silent:
            return f"every rank failed {doing}"
        fault = "it hangs" if len(silent) == 1 else "one of them hangs"
        return f"{', '.join(silent)} did not answer while the other ranks were {doing}: {fault}"

    def _check_rank(self, rank: int) -> None:
        if rank not in self.plan.networks_of:
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"run {self.run_id!r} has ranks 0 to {self.world_size - 1}, not {rank}",
            )
        if self.failure:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"run {self.run_id!r} has failed: {self.failure}",
            )

    def _check_step(self, rank: int, step: int) -> None:
        self._check_rank(rank)
        expected = self._step_of[rank] + 1
        if step != expected:
            how = "goes backwards" if step < expected else "skips ahead"
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{self.who(rank)} {how}: it reports step {step}, step {expected} is next",
            )

    def _check_pairs(
        self, rank: int, step: int, pairs: Mapping[Pair, PairSums], round_: Round | None
    ) -> None:
        expected = self.plan.pairs_of[rank]
        if tuple(pairs) != expected:
            wanted = [f"{p.teacher}-{p.student}" for p in expected] or ["none"]
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"{self.who(rank)} must report the pairs {', '.join(wanted)} at step {step}",
            )
        for pair, sums in pairs.items():
            # An L1 distance of two distributions is at most 2; float32 may round it up. Also
            # refuses NaN. A rank without samples has sums of zero.
            limit = 2 * sums.n * (1 + 1e-5)
            if not (0 <= sums.gap <= limit and 0 <= sums.e_s <= limit and 0 <= sums.e_t <= limit):
                raise Refusal(
                    Refusal.Kind.INVALID_ARGUMENT,
                    f"{self.who(rank)} reports distances that are not finite sums of at most 2 per "
                    f"sample for {pair.teacher} and {pair.student} at step {step}: {sums}",
                )
            if sums.n == 0 and self._all_others_empty(rank, pair, round_):
                raise Refusal(
                    Refusal.Kind.INVALID_ARGUMENT,
                    f"{self.who(rank)} is the last to report n=0 samples for {pair.teacher} and "
                    f"{pair.student} at step {step}: some rank must have some",
                )

    def _all_others_empty(self, rank: int, pair: Pair, round_: Round | None) -> bool:
        """Whether every other part of this pair is there and has no sample."""
        sums = round_.sums if round_ else {}
        others = [(r, i) for r, i in self.plan.parts_of[pair] if r != rank]
        return all(r in sums and sums[r][i].n == 0 for r, i in others)


def _add(parts: Iterable[PairSums]) -> PairSums:
    """Add in the order given and in float64: whoever adds these parts gets the same distances.

    The parts' own `+` would make an object for every rank.
    """
    gap = e_s = e_t = 0.0
    n = 0
    for part in parts:
        gap += part.gap
        e_s += part.e_s
        e_t += part.e_t
        n += part.n
    return PairSums(gap, e_s, e_t, n)
