"""Commands of an operator, and what they change in the decisions from a step on.

    hold, release   a teacher stays in a mode for all its students, whatever the distances are
    scale           the threshold of a teacher's pairs, or of all pairs, is multiplied by a factor

Every command is stamped with the first step at which it holds. All ranks have the same stamped
commands, so all decide the same. A later command comes before an earlier one on the same teacher,
also where a run that was continued takes it at a lower step.

Not covered: how the ranks get commands (`coordination/commands.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from switokd.distillation.decision import NOTHING, InForce, Mode
from switokd.distillation.topology import Pair

LEAST_FACTOR, MOST_FACTOR = 1e-6, 1e6
"""Limits of a scale: distances go from 0 to 2, so that more would change nothing."""


class Action(str, Enum):
    """What a command asks for."""

    HOLD = "hold"
    RELEASE = "release"
    SCALE = "scale"
    CHECKPOINT = "checkpoint"
    STOP = "stop"


@dataclass(frozen=True)
class Command:
    """What an operator asks of a run."""

    id: str
    action: Action
    teacher: str = ""
    """Of a hold or release; of a scale: empty means all teachers."""
    mode: Mode | None = None
    """Of a hold."""
    until_step: int = 0
    """Of a hold: its last step; 0: until a release."""
    factor: float = 1.0
    """Of a scale; 1 ends the scaling."""
    asked_by: str = ""
    """Role of who has sent it: "operator", or "run" for who has the run's secret."""

    def describe(self) -> str:
        """Return words such as "hold of teacher1 in expert mode until step 90"."""
        if self.action is Action.HOLD and self.mode:
            until = f" until step {self.until_step}" if self.until_step else ""
            return f"hold of {self.teacher} in {self.mode.value} mode{until}"
        if self.action is Action.RELEASE:
            return f"release of {self.teacher}"
        if self.action is Action.SCALE:
            return f"scale of {self.factor:g} for {self.teacher or 'all teachers'}"
        return str(self.action.value)

    def problem(self, teachers: Sequence[str], last_step: int = 0) -> str:
        """Say why no run with these teachers can obey; empty if it can.

        last_step: a hold must reach beyond it.
        """
        if self.action in (Action.HOLD, Action.RELEASE, Action.SCALE):
            needs_no_teacher = self.action is Action.SCALE and not self.teacher
            if not needs_no_teacher and self.teacher not in teachers:
                return f"{self.teacher!r} is no teacher of this run: it has {', '.join(teachers)}"
        if self.action is Action.HOLD:
            if self.mode is None:
                return "a hold needs a mode, expert or learning"
            if self.until_step < 0:
                return f"the last step of a hold must be above 0, got {self.until_step}"
            if self.until_step and self.until_step <= last_step:
                return (
                    f"step {self.until_step}, the last one of the hold, is over: the run has made "
                    f"{last_step} steps"
                )
        if self.action is Action.SCALE and not LEAST_FACTOR <= self.factor <= MOST_FACTOR:
            allowed = f"{LEAST_FACTOR:g} to {MOST_FACTOR:g}"
            return f"the factor of a scale must be {allowed}, got {self.factor:g}"
        return ""


@dataclass(frozen=True)
class Stamped:
    """A command with the first step at which it holds, or with the reason for its refusal."""

    command: Command
    first_step: int
    """Of a checkpoint or a stop: the step before it is the last one that was trained."""
    at: float = 0.0
    """When the ranks took it, in seconds of `time.time`."""
    failure: str = ""
    """Why the ranks refuse it; empty if they obey."""


class Overrides:
    """What the commands of a run change, by step. pairs: all pairs of the run."""

    def __init__(self, pairs: Iterable[Pair] = (), stamped: Iterable[Stamped] = ()) -> None:
        self._pairs = tuple(pairs)
        self._stamped: list[Stamped] = []
        self._last = NOTHING
        self._last_range = range(0)
        """The steps for which `_last` holds."""
        self.add(*stamped)

    def add(self, *stamped: Stamped) -> None:
        """Add commands, the oldest first; those that change no decision are left out."""
        actions = (Action.HOLD, Action.RELEASE, Action.SCALE)
        self._stamped += [s for s in stamped if not s.failure and s.command.action in actions]
        self._last, self._last_range = NOTHING, range(0)

    def at(self, step: int) -> InForce:
        """Return what is in force at a step."""
        if not self._stamped:
            return NOTHING
        if step not in self._last_range:
            self._last, self._last_range = self._in_force(step), self._range_of(step)
        return self._last

    def _in_force(self, step: int) -> InForce:
        holds: dict[Pair, Mode] = {}
        scales: dict[Pair, float] = {}
        for stamped in self._stamped:
            command = stamped.command
            if step < stamped.first_step:
                continue
            for pair in self._pairs:
                if command.teacher not in ("", pair.teacher):
                    continue
                if command.action is Action.SCALE:
                    scales[pair] = command.factor
                elif command.mode and not 0 < command.until_step < step:
                    holds[pair] = command.mode
                else:  # a release, or a hold that is over
                    holds.pop(pair, None)
        return InForce(holds, {pair: factor for pair, factor in scales.items() if factor != 1})

    def _range_of(self, step: int) -> range:
        """Return the steps around `step` between which nothing begins or ends."""
        changes = {s.first_step for s in self._stamped}
        changes |= {s.command.until_step + 1 for s in self._stamped if s.command.until_step}
        first = max((change for change in changes if change <= step), default=step)
        last = min((change for change in changes if change > step), default=2**63)
        return range(first, last)
