"""Decides through the coordinator, for runs of several processes.

A rank reports its sums of every step and waits for the coordinator's decision. A rank that can
decide early starts its backward pass before the decision arrives, but applies no update before
the coordinator has decided the same. If the coordinator is late, the rank decides alone: every rank
has all sums of its teachers, and the function is pure, so that all come to the same decision.

If rounding might matter, because ranks may have different processors, the first rank of the teacher
decides in every case: its report has the mode, which the coordinator adopts.

Not covered: the stream (`stream.py`); runs that have no coordinator (`local.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from switokd.config.config import Config
from switokd.coordination.commands import Commands
from switokd.coordination.decision_writer import DecisionWriter
from switokd.coordination.membership import Membership
from switokd.coordination.own import OwnDecisions, first_difference
from switokd.coordination.progress import NetworkProgress
from switokd.coordination.settling import Peers, decide_reports
from switokd.coordination.stream import CoordinatorStream
from switokd.distillation.decision import Decision
from switokd.distillation.distances import Parts
from switokd.errors import CoordinatorError, SwitokdError
from switokd.runtime.placement import Placement
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import ROLE_TO_WIRE, sums_to_wire

LAST_WRITE_SECONDS = 2.0
"""How long a rank that has failed waits for its last decisions to be written."""


class Client:
    """One rank's decider. Waiting methods raise `failure` once the stream has failed."""

    has_metrics = True

    def __init__(
        self,
        membership: Membership,
        config: Config,
        placement: Placement,
        on_decision: Callable[[Decision], None] = lambda decision: None,
        on_failure: Callable[[SwitokdError], None] = lambda error: None,
        first_step: int = 1,
        peers: Peers | None = None,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """Join the run and open the stream.

        on_decision: called for every decision, in order, on a thread of its own; only `close`
        waits for it. If it raises, the stream fails. on_failure: called on the thread that has
        noticed a failure. first_step: the step that is reported first. peers: the other ranks;
        without them no step is settled. say: tells the user that the coordinator is lost, or back.
        CoordinatorError if the coordinator does not answer in time
        or refuses this rank; UsageError if it refuses the run's plan.
        """
        self._member, self._settings = membership, config.coordinator
        self._rule, self._peers, self._first_step = config.method.rule, peers, first_step
        rank = membership.rank
        self.commands = Commands(config, peers, rank, lambda taken: _answer(self._stream, taken))
        self._own = OwnDecisions(rank, config, placement, peers, self.commands.overrides)
        self.pairs = self._own.measured
        """Pairs that this rank measures: those it reports, and those it needs to decide early."""
        self.waits: list[float] = []
        """By step: seconds that this rank waited for the decision. Empty if it has no teacher."""
        self._alone: dict[int, Decision] = {}
        """Decisions since the last settled step that were applied without the coordinator's."""
        self.alone_steps: list[int] = []
        """Steps that this rank has decided alone."""
        self._plan = plan_of(config, placement, first_step)
        self._stream = CoordinatorStream(
            membership, config.coordinator, self._plan, on_failure, first_step, say
        )
        self._writer = DecisionWriter(on_decision, self._stream.fail)
        self._stream.protocol.on_command = self.commands.receive
        self._stream.attach(self._on_decision)

    @property
    def start(self) -> tuple[str, int]:
        """The run's id, and how often its processes were started."""
        return self._member.run_id, self._member.epoch

    @property
    def failure(self) -> SwitokdError | None:
        """Why the stream failed; None while it works."""
        return self._stream.failure

    def report(self, step: int, parts: Parts, exchange_seconds: float | None = None) -> None:
        """Send this rank's sums of a step; waits only for the decision of the previous step.

        exchange_seconds: duration of this step's exchange of logits, for the metrics.
        """
        if self.pairs and step > self._first_step:
            self.decision(step - 1)
        modes = self._own.decide(step, parts)
        sums = {pair: parts[pair][index] for pair, index in self._own.reported.items()}
        report = pb.Report(
            step=step,
            pairs=sums_to_wire(sums, modes, self._own.in_force),
            decision_wait_seconds=self.waits[-1] if self.waits else None,
            exchange_seconds=exchange_seconds,
        )
        self._stream.report(report)
        if self.pairs:
            self.waits.append(0.0)

    def decide_early(self, step: int, parts: Parts) -> Decision | None:
        """Return this rank's decision, unless rounding could make another rank's differ.

        `decision` compares it with the coordinator's decision.
        """
        return self._own.safe

    def decision(self, step: int) -> Decision:
        """Wait for the decision of `step`, the last step that this rank has reported.

        CoordinatorError if the coordinator does not decide in time and the run must not go on
        without it, or if it decides otherwise than this rank.
        """
        if step in self._alone:
            return self._alone[step]
        started = time.perf_counter()
        decision = self._stream.wait(step, self._patience)
        if decision is None:
            decision = self._decide_alone(step)
        if self.pairs:
            assert decision.step == step, "decisions come in order, one per reported step"
            self.waits[-1] += time.perf_counter() - started
        self._check_early_decision(decision)
        return decision

    def settle(self, step: int) -> None:
        """Make rank 0's record complete up to `step`; all ranks call this together.

        CoordinatorError as `decision`.
        """
        if self.pairs:
            self.decision(step)
        if self._peers is None:
            return
        missing = 0
        if self._member.rank == 0 and not self._stream.wait(step, self._patience):
            if not self._decides_alone:
                raise _late(self._member, step, self._settings.timeout)
            self._stream.decide_alone(step)
            missing = self._stream.protocol.decided + 1
        missing = self._peers.broadcast(missing)
        decisions = []
        if 0 < missing <= step:
            mine = [r.SerializeToString() for r in self._stream.undecided(missing, step)]
            reports = self._peers.gather(mine)
            decisions = decide_reports(self._plan, self._rule, reports) if reports else []
        self._stream.settle(step, decisions)
        self._alone = {s: decision for s, decision in self._alone.items() if s >= step}

    def progress(self, progress: NetworkProgress) -> None:
        """Send numbers for the metrics; does not wait."""
        message = progress.to_wire(self._stream.protocol.reported)
        self._stream.send(pb.TrainRequest(progress=message))

    def stall(self, doing: str) -> None:
        """Tell the coordinator that another rank hangs; does not wait.

        doing: what this rank waits for.
        """
        self._stream.send(pb.TrainRequest(stall=pb.Stall(doing=doing)))

    def why(self, doing: str = "", patience: float = 3.0) -> SwitokdError | None:
        """Wait up to `patience` seconds for the coordinator to say why the run failed, or None.

        doing: what this rank waited for when its collective failed.
        """
        if doing:
            self.stall(doing)
        return self._stream.wait_for_failure(patience)

    def close(self, failure: str = "", stopped: bool = False) -> None:
        """Wait until all decisions are written, then leave the run.

        failure: why this rank failed; empty if it did not. stopped: before the last step. Raises
        the error of `on_decision` if there was one and the rank has not failed for another reason.
        """
        self._stream.ignore_failures()
        error = self._writer.close(LAST_WRITE_SECONDS if failure else None)
        self._stream.close(failure or str(error or ""), stopped)
        if error and not failure:
            raise error

    @property
    def _decides_alone(self) -> bool:
        return self._settings.on_loss == "decide_alone"

    @property
    def _patience(self) -> float:
        """Seconds to wait for a decision."""
        if not self._decides_alone:
            return self._settings.timeout
        return 0.0 if self._stream.protocol.is_alone else self._settings.deadline

    def _decide_alone(self, step: int) -> Decision:
        """Return this rank's own decision, because the coordinator's is late."""
        decision = self._own.settled(self._settings.timeout) if self._decides_alone else None
        if decision is None:
            raise _late(self._member, step, self._settings.timeout)
        self._stream.decide_alone(step)
        self._alone[step] = decision
        self.alone_steps.append(step)
        return decision

    def _on_decision(self, decision: Decision) -> None:
        """Write a decision down; compare it with what was applied without it."""
        self._writer.put(decision)
        applied = self._alone.get(decision.step)
        if applied and (problem := _difference(self._member, applied, decision)):
            self._stream.fail(problem)

    def _check_early_decision(self, decision: Decision) -> None:
        early = self._own.safe
        if early is None or early.step != decision.step:
            return
        if problem := _difference(self._member, early, decision):
            raise problem


def _answer(stream: CoordinatorStream, taken: pb.CommandTaken) -> None:
    stream.send(stream.protocol.answer(taken))


def _late(member: Membership, step: int, timeout: float) -> CoordinatorError:
    return CoordinatorError(
        f"the coordinator at {member.coordinator} did not decide step {step} within {timeout:g} s "
        "(coordinator.timeout)"
    )


def _difference(member: Membership, ours: Decision, theirs: Decision) -> CoordinatorError | None:
    if (pair := first_difference(ours, theirs)) is None:
        return None
    return CoordinatorError(
        f"the coordinator at {member.coordinator} decided step {ours.step} for {pair.teacher} and "
        f"{pair.student} differently than this rank, from the same distances: it is faulty, or "
        "another version of switokd"
    )


def plan_of(config: Config, placement: Placement, first_step: int) -> pb.RunPlan:
    """Return what the coordinator must know of a run whose next step is `first_step`."""
    return pb.RunPlan(
        networks=[
            pb.Network(name=name, role=ROLE_TO_WIRE[role], ranks=placement.ranks_of(name))
            for name, role in config.topology.roles
        ],
        strategy=config.distillation.strategy,
        strategy_kwargs=json.dumps(config.distillation.strategy_kwargs, sort_keys=True),
        semantics=config.distillation.semantics,
        switched_off=[
            pb.Pair(teacher=pair.teacher, student=pair.student)
            for pair in sorted(config.topology.off)
        ],
        config_digest=config.digest,
        round_timeout_seconds=config.coordinator.timeout,
        first_step=first_step,
    )
