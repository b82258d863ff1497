"""Commands on the ranks: taken together, noted first, answered; and the file that keeps them.

Not covered: real runs (`tests/training/test_commanded_runs.py`), every order of faults
(`tests/simulation`).
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from switokd.config.run_file import load
from switokd.coordination.command_file import COMMANDS, append_command, read_commands
from switokd.coordination.commands import Commands
from switokd.distillation.decision import Mode
from switokd.distillation.overrides import Action, Command, Stamped
from switokd.distillation.topology import Pair
from switokd.errors import UsageError
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import command_from_wire, command_to_wire

CONFIG = load("digits-2t1s")
HOLD = Command("h", Action.HOLD, "teacher1", Mode.EXPERT, 90, asked_by="operator")
ALL = [
    HOLD,
    Command("r", Action.RELEASE, "teacher1", asked_by="run"),
    Command("s", Action.SCALE, factor=0.1 + 0.2),
    Command("t", Action.SCALE, "teacher2", factor=3.0),
    Command("c", Action.CHECKPOINT),
    Command("e", Action.STOP),
]
EARLIER = Stamped(Command("0", Action.SCALE, factor=2.0), 3)


class Ranks:
    """Two ranks; rank 0 hands over what it has taken."""

    def __init__(self, *settings: str) -> None:
        config = load("digits-2t1s", list(settings)) if settings else CONFIG
        self.answers: list[pb.CommandTaken] = []
        self.noted: list[Stamped] = []
        self._handed: Any = None
        self.first = Commands(config, self, 0, self.answers.append)
        self.second = Commands(config, self, 1, self.answers.append)
        for commands in (self.first, self.second):
            commands.restore([EARLIER], self.noted.append)
        self.answers.clear()

    def broadcast(self, rank_0s: Any) -> Any:
        if rank_0s:
            self._handed = list(rank_0s)
            assert [s for s in self._handed if not s.failure] == self.noted, "noted before"
        return self._handed

    def take(self, step: int) -> list[Stamped]:
        taken = self.first.take(step)
        assert self.second.take(step) == taken
        return taken


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.id)
def test_a_command_survives_wire_and_file(command: Command, tmp_path: Path) -> None:
    assert command_from_wire(
        pb.Command.FromString(command_to_wire(command).SerializeToString())
    ) == (command)
    stamped = Stamped(command, 38, 1795000000.25)
    append_command(tmp_path, EARLIER)
    append_command(tmp_path, stamped)
    assert read_commands(tmp_path, ["teacher1", "teacher2"]) == [EARLIER, stamped]


def test_all_ranks_take_what_waits_at_rank_0() -> None:
    ranks = Ranks()
    waiting = [ranks.first.has_waiting]
    ranks.first.receive(command_to_wire(HOLD))
    waiting.append(ranks.first.has_waiting)
    (taken,) = ranks.take(37)
    assert (taken.command, taken.first_step) == (HOLD, 38)
    assert [*waiting, ranks.first.has_waiting] == [False, True, False]
    pairs = [Pair("teacher1", "student"), Pair("teacher2", "student")]
    for commands in (ranks.first, ranks.second):
        assert dict(commands.overrides.at(37).scales) == dict.fromkeys(pairs, 2.0)
        assert not commands.overrides.at(37).holds
        assert commands.overrides.at(38).holds == {pairs[0]: Mode.EXPERT}
    (answer,) = ranks.answers
    assert (answer.command_id, answer.first_step, answer.failure) == ("h", 38, "")
    assert command_from_wire(answer.command) == HOLD


def test_a_command_that_comes_again_is_answered_as_before() -> None:
    ranks = Ranks()
    ranks.first.receive(command_to_wire(HOLD))
    ranks.take(37)
    for command in (HOLD, EARLIER.command):
        ranks.first.receive(command_to_wire(command))
    ranks._handed = []
    assert ranks.take(80) == []
    assert [(a.command_id, a.first_step) for a in ranks.answers] == [("h", 38), ("h", 38), ("0", 3)]


@pytest.mark.parametrize(
    ("settings", "command", "words"),
    [
        ([], Command("x", Action.HOLD, "student", Mode.EXPERT), "'student' is no teacher"),
        ([], Command("x", Action.HOLD, "teacher1", Mode.EXPERT, 37), "step 37, the last one"),
        (["distillation.strategy=vanilla"], HOLD, "its strategy vanilla pauses no teacher"),
        (["checkpoint.keep=0"], Command("x", Action.CHECKPOINT), "checkpoint.keep=0"),
    ],
)
def test_what_the_ranks_refuse_changes_nothing(
    settings: list[str], command: Command, words: str
) -> None:
    ranks = Ranks(*settings)
    ranks.first.receive(command_to_wire(command))
    assert ranks.take(37) == []
    (answer,) = ranks.answers
    assert words in answer.failure
    assert not ranks.noted
    assert not ranks.second.overrides.at(38).holds


def test_a_command_that_cannot_be_noted_is_refused() -> None:
    def full(stamped: Stamped) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ranks = Ranks()
    ranks.first.restore([], full)
    ranks.first.receive(command_to_wire(HOLD))
    assert ranks.take(37) == []
    assert ranks.answers[0].failure.endswith("in the run folder: No space left on device")


def test_an_action_of_a_later_version_is_answered_at_once() -> None:
    ranks = Ranks()
    ranks.first.receive(pb.Command(command_id="new"))
    assert not ranks.first.has_waiting
    assert [(a.command_id, bool(a.failure)) for a in ranks.answers] == [("new", True)]


def test_a_torn_line_was_never_taken(tmp_path: Path) -> None:
    path = tmp_path / COMMANDS
    append_command(tmp_path, EARLIER)
    path.write_bytes(path.read_bytes() + b'{"id": "h", "acti')
    assert read_commands(tmp_path, ["teacher1"]) == [EARLIER]
    append_command(tmp_path, Stamped(HOLD, 9))
    assert read_commands(tmp_path, ["teacher1"]) == [EARLIER, Stamped(HOLD, 9)]


def test_a_line_by_hand_needs_no_id(tmp_path: Path) -> None:
    line = '{"action": "hold", "teacher": "t", "mode": "expert", "first_step": 20}\n'
    (tmp_path / COMMANDS).write_text(line)
    (found,) = read_commands(tmp_path, ["t"])
    assert found == Stamped(Command("line-1", Action.HOLD, "t", Mode.EXPERT), 20)
    assert read_commands(None, ["t"]) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{}", "line 1: action must be one of hold, release, scale, checkpoint, stop, found None"),
        ('{"action": "holt"}', "found holt; did you mean 'hold'?"),
        (
            '{"action": "hold", "teacher": "teacher1", "mode": "expert"}',
            "first_step must be a step",
        ),
        (
            '{"action": "hold", "teacher": "x", "mode": "expert", "first_step": 3}',
            "'x' is no teacher",
        ),
        ('{"action": "hold", "teacher": "x", "mode": "paused"}', "mode must be expert or learning"),
        (
            '{"action": "scale", "factor": "2", "first_step": 3}',
            'factor must be a number, found "2"',
        ),
        ('{"action": "release", "factor": 2}', "unknown key factor; release has id, action"),
    ],
)
def test_mistakes_in_a_file_of_commands(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "commands.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError) as caught:
        read_commands(tmp_path, ["teacher1"])
    assert words in str(caught.value)
    assert "commands.jsonl, line 1" in str(caught.value)
