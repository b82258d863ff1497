"""Commands that operators have given a run: those that wait for its ranks, and their answers.

A command waits until rank 0 has answered with the step from which it holds. It goes to every new
stream of rank 0 again, so that a broken stream loses none. Ranks tell a coordinator that has
forgotten everything which commands they have taken. What a command changes stands in the ranks'
reports; no decision depends on what is kept here.

Not covered: how the ranks take a command (`coordination/commands.py`); who may send one
(`authorisation.py`).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace

from switokd.distillation.overrides import Command, Stamped
from switokd.services.coordinator.authorisation import CallerRole
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.refusal import Refusal

MOST_WAITING = 100
"""Commands of a run that may wait for an answer."""

MOST_KEPT = 1000
"""Commands of a run whose answers are kept; the oldest are forgotten first."""

MOST_SHOWN = 100
"""Answered commands in a run's status: 1,000 of them would take a megabyte."""

ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
ROLES = ("", CallerRole.OPERATOR.value, CallerRole.RUN.value)
WAITING = 0
"""The first step of a command that rank 0 has not answered."""


class RunCommands:
    """Commands of one run, by id, the oldest first. A refused command changes nothing."""

    def __init__(self, plan: Plan) -> None:
        self._teachers = tuple(dict.fromkeys(pair.teacher for pair in plan.topology.pairs))
        self._all: dict[str, Stamped] = {}

    @property
    def all(self) -> Sequence[Stamped]:
        """All commands; `first_step` is 0 where rank 0 has not answered yet."""
        return tuple(self._all.values())

    @property
    def shown(self) -> Sequence[Stamped]:
        """Commands for a run's status: those that wait, and the last ones that are answered."""
        answered = [name for name, stamped in self._all.items() if not _waits(stamped)]
        left_out = set(answered[:-MOST_SHOWN])
        return [stamped for name, stamped in self._all.items() if name not in left_out]

    @property
    def waiting(self) -> Sequence[Command]:
        """Commands that rank 0 has not answered."""
        return [s.command for s in self._all.values() if _waits(s)]

    def find(self, command_id: str) -> Command | None:
        """Return a command; None if there is none with this id."""
        stamped = self._all.get(command_id)
        return stamped.command if stamped else None

    def add(self, command: Command, last_step: int) -> tuple[Stamped, bool]:
        """Add a command; return it, and whether it is new.

        last_step: the last step that is decided. Without an id, the command gets one. Refusal if
        no run with this plan can obey, or if another command has the id.
        """
        command = replace(command, id=command.id or uuid.uuid4().hex[:12])
        _check_id(command)
        if before := self._all.get(command.id):
            if replace(before.command, asked_by="") != replace(command, asked_by=""):
                raise Refusal(
                    Refusal.Kind.ALREADY_EXISTS,
                    f"the id {command.id} belongs to another command: {before.command.describe()}",
                )
            return before, False
        if problem := command.problem(self._teachers, last_step):
            raise _wrong(problem)
        if len(self.waiting) >= MOST_WAITING:
            raise Refusal(
                Refusal.Kind.FAILED_PRECONDITION,
                f"{MOST_WAITING} commands wait for this run already: it takes none now",
            )
        stamped = self._all[command.id] = Stamped(command, WAITING)
        self._forget_old()
        return stamped, True

    def answer(self, stamped: Stamped) -> bool:
        """Note rank 0's answer to a command; return whether it is new. Refusal if it is none.

        A command that is not known here is checked as `add` does: a rank may be no rank.
        """
        _check_id(stamped.command)
        if stamped.first_step < 1 and not stamped.failure:
            raise _wrong(f"a command cannot hold from step {stamped.first_step} on")
        before = self._all.get(stamped.command.id)
        if before is not None:
            if not _waits(before):
                return False
            stamped = replace(stamped, command=before.command)
        elif problem := stamped.command.problem(self._teachers):
            raise _wrong(problem)
        elif stamped.command.asked_by not in ROLES:
            raise _wrong("a command is asked by an operator, or by who has the run's secret")
        self._all[stamped.command.id] = stamped
        self._forget_old()
        return True

    def restore(self, commands: Iterable[Stamped]) -> None:
        """Take over the commands of an earlier start of the run, or of a journal."""
        self._all.update({stamped.command.id: stamped for stamped in commands})

    def end(self, reason: str) -> Sequence[Stamped]:
        """Give up the commands that wait, because the run has ended; return them."""
        given_up = [replace(s, failure=reason) for s in self._all.values() if _waits(s)]
        self._all.update({stamped.command.id: stamped for stamped in given_up})
        return given_up

    def _forget_old(self) -> None:
        answered = [name for name, stamped in self._all.items() if not _waits(stamped)]
        for name in answered[: max(len(self._all) - MOST_KEPT, 0)]:
            del self._all[name]


def _check_id(command: Command) -> None:
    if not ID.fullmatch(command.id):
        raise _wrong("the id of a command is 1 to 64 letters, digits and ._-")


def _waits(stamped: Stamped) -> bool:
    return stamped.first_step == WAITING and not stamped.failure


def _wrong(problem: str) -> Refusal:
    return Refusal(Refusal.Kind.INVALID_ARGUMENT, problem)
