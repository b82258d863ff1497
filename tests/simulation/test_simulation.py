"""Thousands of faults break no invariant; a protocol that was broken on purpose is found out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from switokd.coordination import protocol
from switokd.coordination.own import OwnDecisions
from switokd.coordination.protocol import RankProtocol, Received
from switokd.services.coordinator.rounds import Rounds
from switokd.services.coordinator.run import CoordinatedRun
from tests.simulation import world
from tests.simulation.disk import DiskJournal
from tests.simulation.ranks import Violation
from tests.simulation.world import World


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def test_no_fault_breaks_an_invariant() -> None:
    faults: Counter[str] = Counter()
    alone = 0
    for seed in range(20):
        simulated = World(seed)
        faults += simulated.run()
        alone += simulated.decided_alone
    assert faults.total() > 1500
    assert alone > 500
    assert len(faults) == 11, faults  # every kind was tried


FOUND = {
    1046: "a stream that was opened before its step was settled was refused",
    10081: "a step that was settled while a stream was opened was missing in the journal",
    30625: "steps that an earlier coordinator had decided were missing, if later ones were settled",
    20619: "a run that a lost coordinator had taken for lost lost its acknowledged steps",
}
"""Seeds that have found a fault."""


@pytest.mark.parametrize("seed", FOUND)
def test_what_a_seed_has_found_is_mended(seed: int) -> None:
    World(seed).run()


def test_a_seed_always_does_the_same() -> None:
    first, second = World(3), World(3)
    assert first.run() == second.run()
    assert first.clock.now == second.clock.now


Patch = Callable[[pytest.MonkeyPatch], None]


def no_resending(patch: pytest.MonkeyPatch) -> None:
    def attached(self: RankProtocol, message: Any) -> Received:
        self.is_attached = True
        return Received([], [])

    patch.setattr(RankProtocol, "_attached", attached)


def no_settled_decisions(patch: pytest.MonkeyPatch) -> None:
    """Rank 0 tells no coordinator what it has decided."""
    patch.setattr(protocol, "_settled", lambda decision, alone: b"")
    patch.setattr(CoordinatedRun, "add_settled", lambda self, decision: False)


def forgotten_too_early(patch: pytest.MonkeyPatch) -> None:
    """The ranks forget their reports before rank 0 has the decisions."""
    original = RankProtocol.report

    def report(self: RankProtocol, message: Any) -> Any:
        messages = original(self, message)
        self._outbox = {s: r for s, r in self._outbox.items() if s > message.step - 3}
        return messages

    patch.setattr(RankProtocol, "report", report)


def every_rank_chooses(patch: pytest.MonkeyPatch) -> None:
    """Near the threshold each rank trusts its own rounding."""
    patch.setattr(OwnDecisions, "settled", lambda self, seconds: self._last)


def acknowledged_too_early(patch: pytest.MonkeyPatch) -> None:
    """A decision counts as recorded before it is on the disk."""
    original = DiskJournal.add

    def add(self: DiskJournal, run_id: str, decision: Any, alone: bool = False) -> None:
        original(self, run_id, decision, alone)
        written, step = self._recorded.get(run_id, (0, 0))
        self._recorded[run_id] = written, max(step, decision.step)

    patch.setattr(DiskJournal, "add", add)


def doubles_count(patch: pytest.MonkeyPatch) -> None:
    """A report that comes twice is refused, as it was before ranks could send it again."""
    original = Rounds._check_step

    def check(self: Rounds, rank: int, step: int) -> None:
        original(self, rank, step)
        if step <= self._step_of[rank]:
            raise Violation("goes backwards")

    patch.setattr(Rounds, "_check_step", check)


def stale_acknowledgement(patch: pytest.MonkeyPatch) -> None:
    """What an earlier start of the job has recorded counts for the next one: seed 17 found this."""
    patch.setattr(
        DiskJournal, "recorded", lambda self, run_id, epoch: self._recorded.get(run_id, (0, 0))[1]
    )


MUTATIONS: list[Patch] = [
    *(no_resending, no_settled_decisions, forgotten_too_early),
    *(every_rank_chooses, acknowledged_too_early, doubles_count, stale_acknowledgement),
]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_a_broken_protocol_is_found(mutate: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    monkeypatch.setattr(world, "LONGEST", 2000.0)
    assert any(map(finds_a_fault, range(60))), "no seed has found it"


def finds_a_fault(seed: int) -> bool:
    try:
        World(seed).run()
    except (Violation, KeyError):
        return True
    return False
