"""An operator who gives the run commands, and repeats each one until it is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from switokd.distillation.decision import Mode
from switokd.distillation.overrides import Action, Command
from switokd.services.coordinator.refusal import Refusal
from tests.simulation.ranks import RUN_ID

if TYPE_CHECKING:
    from tests.simulation.world import World

REPEAT_SECONDS = 1.0
MOST = 40
"""Commands of a run."""


class Operator:
    """Gives commands, as `switokd hold` and the like do."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._given: dict[str, Command] = {}
        self._answered: set[str] = set()

    def command(self) -> bool:
        """Give the run one more command; return whether it may have so many."""
        rng, number = self._world.rng, len(self._given)
        if number == MOST:
            return False
        teacher, last = rng.choice(("teacher1", "teacher2")), rng.choice((0, 30, 60, 90))
        mode, factor = rng.choice(list(Mode)), rng.choice((0.5, 1.0, 2.0))
        command = rng.choice(
            (
                Command(f"{number}", Action.HOLD, teacher, mode, last),
                Command(f"{number}", Action.RELEASE, teacher),
                Command(f"{number}", Action.SCALE, rng.choice(("", teacher)), factor=factor),
            )
        )
        self._given[command.id] = command
        self._send(command)
        return True

    def forgotten(self) -> list[str]:
        """Return the commands that were not answered."""
        for command in self._given.values():
            self._look(command)
        return [name for name in self._given if name not in self._answered]

    def _send(self, command: Command) -> None:
        """Send a command, and look for its answer."""
        server = self._world.server
        if server.is_answering:
            server.when_running(lambda: self._look(command))
        if command.id not in self._answered:
            self._world.clock.at(REPEAT_SECONDS, lambda: self._send(command))

    def _look(self, command: Command) -> None:
        try:
            entry = self._world.server.runs.find(RUN_ID)
            answered = {s.command.id for s in entry.run.commands.all if s.first_step}
            if command.id in answered:
                self._answered.add(command.id)
            else:
                entry.command(command)
        except Refusal as refusal:
            if refusal.kind is Refusal.Kind.INVALID_ARGUMENT:  # its last step is over
                self._answered.add(command.id)
