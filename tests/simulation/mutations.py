"""Faults that are put into the real code on purpose: does the simulation find them?

    python -m tests.simulation.mutations --seeds 20     how many of 20 seeds find each fault

Not covered: faults in SQLite's journal, of which the simulation has a model (`disk.py`).
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
import textwrap
from typing import Any, NamedTuple

import pytest

from switokd.coordination.absence import Absence
from switokd.coordination.client import Client
from switokd.coordination.commands import Commands
from switokd.coordination.own import OwnDecisions
from switokd.coordination.protocol import RankProtocol
from switokd.coordination.stream import CoordinatorStream
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.rounds import Rounds
from switokd.services.coordinator.session import Session
from tests.simulation import world
from tests.simulation.disk import DiskJournal
from tests.simulation.world import World

LONGEST = 2000.0
"""Virtual seconds after which a run with a fault counts as stuck."""


class Mutation(NamedTuple):
    """One place of the code, and what stands there instead."""

    owner: Any
    method: str
    old: str
    new: str

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        """Put the fault into the code."""
        found = getattr(self.owner, self.method)
        function: Any = found.fget if isinstance(found, property) else found
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.method}: {self.old!r} is not there once"
        names: dict[str, Any] = {}
        exec(source.replace(self.old, self.new), function.__globals__, names)
        patch.setattr(self.owner, self.method, names[self.method])


MUTATIONS = {
    # The rank's waiting code.
    "the deadline is waited for in every step": Mutation(
        Client, "_patience", "0.0 if self._stream.protocol.is_alone else ", ""
    ),
    "no decision is waited for": Mutation(
        Client, "_patience", "else self._settings.deadline", "else 0.0"
    ),
    "the first step that is missing is not settled": Mutation(
        Client, "settle", "protocol.decided + 1", "protocol.decided + 2"
    ),
    "a single step that is missing is not settled": Mutation(
        Client, "settle", "0 < missing <= step", "0 < missing < step"
    ),
    "a step that was decided alone does not count": Mutation(
        Client, "_decide_alone", "self.alone_steps.append(step)", "pass"
    ),
    "the coordinator does not hear of a step that was decided alone": Mutation(
        Client, "_decide_alone", "self._stream.decide_alone(step)", "pass"
    ),
    "an early decision is not confirmed": Mutation(
        Client, "decision", "= self._stream.wait(", "= self._own.safe or self._stream.wait("
    ),
    "near the threshold a rank trusts its own rounding": Mutation(
        Client, "_decide_alone", "self._own.settled(self._settings.timeout)", "self._own._last"
    ),
    "a line of the record is written twice": Mutation(
        Client,
        "_on_decision",
        "self._writer.put(decision)",
        "[self._writer.put(decision) for _ in 'ab']",
    ),
    "a rank leaves before its record is written": Mutation(
        Client, "close", "LAST_WRITE_SECONDS if failure else None", "0.0"
    ),
    "no choice near the threshold is published": Mutation(
        OwnDecisions, "decide", "self._board.publish(_key(step, pair), mode.value)", "pass"
    ),
    "a lost coordinator ends the run": Mutation(
        Absence, "begin", 'return self._on_loss == "stop"', 'return self._on_loss != "wait"'
    ),
    # Commands.
    "a command is taken again after a restart": Mutation(
        Commands, "_stamp", "self._known.get(command.id)", "None"
    ),
    "a command holds for the step at hand": Mutation(
        Commands, "_stamp", "Stamped(command, step + 1,", "Stamped(command, step,"
    ),
    "the coordinator is not told what commands change": Mutation(
        Client,
        "report",
        "sums_to_wire(sums, modes, self._own.in_force)",
        "sums_to_wire(sums, modes)",
    ),
    "only rank 0 knows a command": Mutation(
        Commands, "take", "self._note(taken)", "self._rank or self._note(taken)"
    ),
    "a command is not sent on a new stream": Mutation(
        Session, "_attach", "entry.run.commands.waiting if rank == 0", "() if rank == 0"
    ),
    "a hold in a report is ignored": Mutation(
        Rounds, "report", "round_.override(self._plan.first_pairs(rank), in_force)", "pass"
    ),
    # The rank's stream.
    "a decision that has come wakes nobody": Mutation(
        CoordinatorStream, "_handle", "self._changed.notify_all()", "pass"
    ),
    "the decision of the step before is taken": Mutation(
        CoordinatorStream, "_has_decided", ">= step", ">= step - 1"
    ),
    "a step that comes while it is settled is recorded twice": Mutation(
        CoordinatorStream, "settle", " if d.step > self.protocol.decided", ""
    ),
    "a rank does not join a new coordinator": Mutation(
        CoordinatorStream, "_receive_always", "self._has_joined = False", "self._has_joined = True"
    ),
    "a stream with a gap goes on": Mutation(
        CoordinatorStream, "_handle", "return not received.is_broken", "return True"
    ),
    "a new stream's messages go to the old one": Mutation(
        CoordinatorStream, "_receive", "self._outgoing = outgoing", "pass"
    ),
    # The rank's protocol.
    "a report is not kept": Mutation(
        RankProtocol, "report", "self._outbox[report.step] = report", "pass"
    ),
    "a rank never waits again": Mutation(RankProtocol, "report", "self.is_alone = False", "pass"),
    "the first report that is needed is not sent again": Mutation(
        RankProtocol, "_attached", "step >= attached.next_step", "step > attached.next_step"
    ),
    "a decision that comes twice counts twice": Mutation(
        RankProtocol, "receive", "response.decision.step <= self", "response.decision.step < self"
    ),
    "steps that were settled while a stream opened are not told": Mutation(
        RankProtocol, "_tell_settled", "(self._told + 1, min(self.settled", "(1, min(0"
    ),
    "steps that an earlier coordinator had decided are not told": Mutation(
        RankProtocol,
        "_tell_settled",
        "(max(self._told, self._last_here) + 1, self.settled)",
        "(1, 0)",
    ),
    "a settled step is forgotten before it is recorded": Mutation(
        RankProtocol, "_note_recorded", "<= step:", "<= step + 1:"
    ),
    # The coordinator.
    "a step is decided before its last report": Mutation(
        Rounds, "report", "< self._reports_needed", "< self._reports_needed - 1"
    ),
    "the choice of a teacher's first rank is ignored": Mutation(
        Rounds, "report", "round_.modes.update(modes)", "pass"
    ),
    "a decision is forgotten that a rank lacks": Mutation(
        Rounds, "acknowledge", "<= low)", "<= low + 1)"
    ),
    "a decision that a rank lacks is not sent": Mutation(
        Rounds, "attach", "if step > last", "if step > last + 1"
    ),
    "a report that comes twice is refused": Mutation(
        Rounds, "_check_step", "self._before < step <= expected", "step == expected"
    ),
    "steps that were settled since a stream was opened are unknown": Mutation(
        Session,
        "_report",
        "run.acknowledge(rank, message.settled_step, _received(message))",
        "pass",
    ),
    "a rank of an earlier start may attach": Mutation(
        Session, "_attach", "message.epoch != entry.run.epoch", "False"
    ),
    "the journal is not told of a new start": Mutation(
        RunRegistry, "_replace", "self._journal.begin(run.run_id, run.epoch, run.plan)", "pass"
    ),
    "steps of an earlier start count as recorded": Mutation(
        DiskJournal, "recorded", "step if written == epoch else 0", "step"
    ),
    "a step counts as recorded before it is on the disk": Mutation(
        DiskJournal,
        "commit",
        "self._note()",
        "self._note(); self._recorded = "
        "{name: (epoch, step + 1) for name, (epoch, step) in self._recorded.items()}",
    ),
}
"""By what is wrong."""


def finds_a_fault(seed: int) -> str:
    """Say what a seed finds; empty: nothing."""
    try:
        World(seed).run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    """Print how many seeds find each fault; the exit code is 1 if one is not found."""
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds")
    parser.add_argument("--only", default="", help="a part of a name")
    arguments = parser.parse_args()
    missed = 0
    for name, mutation in MUTATIONS.items():
        if arguments.only not in name:
            continue
        with pytest.MonkeyPatch.context() as patch:
            mutation.apply(patch)
            patch.setattr(world, "LONGEST", LONGEST)
            found = {seed: why for seed in range(arguments.seeds) if (why := finds_a_fault(seed))}
        missed += not found
        first = next(iter(found.items()), None)
        print(f"{name}: {len(found)} of {arguments.seeds}; first {first}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
