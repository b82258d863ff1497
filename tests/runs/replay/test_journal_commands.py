"""A journal's decisions follow from its commands, not from what the decisions say of themselves."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from switokd.distillation.decision import Decision, InForce, Mode, decide
from switokd.distillation.gap import Distances
from switokd.distillation.overrides import Action, Command, Overrides, Stamped
from switokd.distillation.topology import Pair
from switokd.runs.replay.record import JournalRecord
from switokd.runs.replay.replay import Replay, replay
from switokd.services.coordinator.journal import SqliteJournal
from tests.services.examples import PLAN
from tests.support import wait_until

A, B = Pair("a", "s"), Pair("b", "s")
RULE = PLAN.rule(())
PAIRS = PLAN.topology.pairs
HOLD = Stamped(Command("1", Action.HOLD, "a", Mode.LEARNING, until_step=6), 3, at=1.0)
SCALE = Stamped(Command("2", Action.SCALE, factor=0.5), 5, at=2.0)
RELEASE = Stamped(Command("3", Action.RELEASE, "a"), 6, at=3.0)
UNANSWERED = Stamped(Command("4", Action.HOLD, "b", Mode.EXPERT), 0)
REFUSED = Stamped(Command("5", Action.HOLD, "b", Mode.EXPERT), 0, at=4.0, failure="no")
COMMANDS = (HOLD, SCALE, RELEASE)


def decision(step: int, in_force: InForce) -> Decision:
    found = {A: Distances(1.0, 1.0, 0.2, 8), B: Distances(0.5, 1.0, 0.9, 8)}
    return decide(step, found, RULE, in_force=in_force)


def write(path: Path, said: Sequence[Stamped], kept: Sequence[Stamped], ends: bool = True) -> None:
    """Write a journal. said: what the decisions tell. kept: the commands that the journal has."""
    changed, journal = Overrides(PAIRS, said), SqliteJournal(path)
    try:
        journal.begin("r", 1, PLAN)
        for stamped in kept:
            journal.add_command("r", stamped)
        for step in range(1, 11):
            journal.add("r", decision(step, changed.at(step)))
        if ends:
            journal.end("r", 1, "")
        wait_until(lambda: journal.recorded("r", 1) == 10, 20, "the last step on the disk")
    finally:
        journal.close()


def replayed(path: Path) -> Replay:
    return replay(JournalRecord(path, "r"))


def named(found: Replay) -> list[tuple[int, str, str]]:
    return [(each.step, each.teacher, each.field) for each in found.differences]


def test_commands_of_the_journal_explain_what_its_decisions_say(tmp_path: Path) -> None:
    write(tmp_path / "j", COMMANDS, (UNANSWERED, *COMMANDS, REFUSED))
    found = replayed(tmp_path / "j")
    assert found.is_exact
    assert (found.held, found.scaled) == (3, 12)


@pytest.mark.parametrize(
    ("kept", "differing"),
    [
        ((SCALE,), [(step, "a", "held") for step in (3, 4, 5)]),
        ((HOLD, RELEASE), [(s, t, "delta_scale") for s in range(5, 11) for t in "ab"]),
        ((HOLD, SCALE), [(6, "a", "held")]),
    ],
    ids=["no hold", "no scale", "no release"],
)
def test_what_no_command_of_the_journal_explains_is_named(
    tmp_path: Path, kept: Sequence[Stamped], differing: list[tuple[int, str, str]]
) -> None:
    write(tmp_path / "j", COMMANDS, kept)
    assert named(replayed(tmp_path / "j")) == differing


def test_a_decision_that_hides_a_command_is_named(tmp_path: Path) -> None:
    write(tmp_path / "j", (), (HOLD, RELEASE))
    assert named(replayed(tmp_path / "j")) == [(step, "a", "held") for step in (3, 4, 5)]


def test_another_mode_than_the_command_asks_for_is_named(tmp_path: Path) -> None:
    expert = Stamped(Command("1", Action.HOLD, "a", Mode.EXPERT, until_step=4), 3, at=1.0)
    learning = Stamped(Command("1", Action.HOLD, "a", Mode.LEARNING, until_step=4), 3, at=1.0)
    write(tmp_path / "j", (learning,), (expert,))
    assert named(replayed(tmp_path / "j")) == [(3, "a", "mode"), (4, "a", "mode")]


def test_a_command_that_a_run_gets_while_it_is_read_is_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, COMMANDS, (), ends=False)
    record = JournalRecord(path, "r")
    journal = SqliteJournal(path)
    for stamped in COMMANDS:
        journal.add_command("r", stamped)
    journal.close()
    assert replay(record).is_exact


def test_a_journal_that_is_older_than_commands_is_read(tmp_path: Path) -> None:
    write(tmp_path / "j", (), ())
    with closing(sqlite3.connect(tmp_path / "j")) as connection, connection:
        connection.execute("DROP TABLE commands")
        connection.execute("DROP TABLE overridden")
    assert replayed(tmp_path / "j").is_exact
