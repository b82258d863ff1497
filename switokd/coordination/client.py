"""Decides through the coordinator, for runs of several processes.

A rank reports its sums of every step and waits for the coordinator's decision. A rank that can
decide early starts its backward pass before the decision arrives, but applies no update before
the coordinator has decided the same.

Not covered: reconnecting; deciding without the coordinator when it is lost (`local.py` is for runs
that have none).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from switokd.config.config import Config
from switokd.coordination.decision_writer import DecisionWriter
from switokd.coordination.membership import Membership
from switokd.coordination.stream import CoordinatorStream
from switokd.distillation.decision import Decision, decide_early
from switokd.distillation.distances import Parts, means
from switokd.errors import CoordinatorError, SwitokdError
from switokd.runtime.placement import Placement
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import ROLE_TO_WIRE, sums_to_wire

LAST_WRITE_SECONDS = 2.0
"""How long a rank that has failed waits for its last decisions to be written."""


class Client:
    """One rank's decider. Waiting methods raise `failure` once the stream has failed."""

    def __init__(
        self,
        membership: Membership,
        config: Config,
        placement: Placement,
        on_decision: Callable[[Decision], None] = lambda decision: None,
        on_failure: Callable[[SwitokdError], None] = lambda error: None,
        first_step: int = 1,
    ) -> None:
        """Join the run and open the stream.

        on_decision: called for every decision, in order, on a thread of its own; only `close`
        waits for it. If it raises, the stream fails. on_failure: called on the thread that has
        noticed a failure. first_step: the step that is reported first. CoordinatorError if the
        coordinator does not answer in time or refuses this rank; UsageError if it refuses the run's
        plan.
        """
        self._coordinator = membership.coordinator
        self._rule = config.method.rule
        self._first_step = first_step
        self._reported = {
            pair: placement.ranks_of(pair.teacher).index(membership.rank)
            for pair in config.topology.pairs
            if membership.rank in placement.ranks_of(pair.teacher)
        }
        """Pairs of this rank's teachers, with this rank's index among the teacher's ranks."""
        sources = [self._rule.epsilon_from.get(pair, pair) for pair in self._reported]
        self.pairs = list(dict.fromkeys([*self._reported, *sources]))
        """Pairs that this rank measures: those it reports, and those it needs to decide early."""
        self.waits: list[float] = []
        """By step: seconds that this rank waited for the decision. Empty if it has no teacher."""
        self._early_decision: Decision | None = None
        self._stream = CoordinatorStream(membership, config.coordinator.timeout, on_failure)
        self._stream.join(_plan_to_wire(config, placement, first_step))
        self._writer = DecisionWriter(on_decision, self._stream.fail)
        self._stream.attach(self._writer.put)

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
        sums = {pair: parts[pair][index] for pair, index in self._reported.items()}
        report = pb.Report(
            step=step,
            pairs=sums_to_wire(sums),
            decision_wait_seconds=self.waits[-1] if self.waits else None,
            exchange_seconds=exchange_seconds,
        )
        self._stream.report(report)
        if self.pairs:
            self.waits.append(0.0)

    def decide_early(self, step: int, parts: Parts) -> Decision | None:
        """Decide the pairs of this rank, if rounding cannot make the coordinator's decision differ.

        None otherwise. `decision` compares the result with the coordinator's decision.
        """
        self._early_decision = decide_early(step, means(parts), self._rule) if parts else None
        return self._early_decision

    def decision(self, step: int) -> Decision:
        """Wait for the decision of `step`, the last step that this rank has reported.

        CoordinatorError if the coordinator does not decide in time, or decides otherwise than
        `decide_early`.
        """
        started = time.perf_counter()
        decision = self._stream.decision(step)
        if self.pairs:
            assert decision.step == step, "decisions come in order, one per reported step"
            self.waits[-1] += time.perf_counter() - started
        self._check_early_decision(decision)
        return decision

    def progress(
        self,
        network: str,
        samples: int,
        loss: float | None = None,
        accuracy: float | None = None,
        test_accuracy: float | None = None,
    ) -> None:
        """Send numbers for the metrics; does not wait. accuracy, test_accuracy: from 0 to 1."""
        progress = pb.Progress(
            step=self._stream.step,
            network=network,
            samples=samples,
            loss=loss,
            accuracy=accuracy,
            test_accuracy=test_accuracy,
        )
        self._stream.send(pb.TrainRequest(progress=progress))

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

    def close(self, failure: str = "") -> None:
        """Wait until all decisions are written, then leave the run.

        failure: why this rank failed; empty if it has finished. Raises the error of `on_decision`
        if there was one and the rank has not failed for another reason.
        """
        self._stream.ignore_failures()
        error = self._writer.close(LAST_WRITE_SECONDS if failure else None)
        self._stream.close(failure or str(error or ""))
        if error and not failure:
            raise error

    def _check_early_decision(self, decision: Decision) -> None:
        early = self._early_decision
        if early is None or early.step != decision.step:
            return
        for pair, mode in ((p.pair, p.mode) for p in early.pairs):
            if decision.mode(pair) is not mode:
                raise CoordinatorError(
                    f"the coordinator at {self._coordinator} decided step {decision.step} for "
                    f"{pair.teacher} and {pair.student} differently than this rank, from the same "
                    "distances: it is faulty, or another version of switokd"
                )


def _plan_to_wire(config: Config, placement: Placement, first_step: int) -> pb.RunPlan:
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
