"""Commands of operators, as the ranks of a run take them: all together, after the same step.

The coordinator sends a command to rank 0, where it waits. With the next exchange of logits rank 0
tells all ranks that one waits (`training/exchange.py`). After that step all ranks take it, by one
broadcast, and it holds from the next step on. Rank 0 notes it in the run folder before the others
learn of it, so that a run that is continued has it at the same step. Coordinator and deadlines have
no part in this: ranks that decide early or alone have the same commands as all others.

Not covered: what a command changes (`distillation/overrides.py`), the file (`command_file.py`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from switokd.config.config import Config
from switokd.distillation.overrides import Action, Command, Overrides, Stamped
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import command_from_wire, taken_to_wire


class Broadcasts(Protocol):
    """The other ranks; every rank must call `broadcast` together."""

    def broadcast(self, rank_0s: Any) -> Any:
        """Return rank 0's object on every rank."""
        ...


class Commands:
    """The commands of a run, on one rank. Without peers and coordinator none comes.

    peers: the other ranks. rank: this one. answer: sends rank 0's answers to the coordinator.
    """

    def __init__(
        self,
        config: Config,
        peers: Broadcasts | None = None,
        rank: int = 0,
        answer: Callable[[pb.CommandTaken], None] = lambda taken: None,
    ) -> None:
        self._config, self._peers, self._rank, self._answer = config, peers, rank, answer
        self._teachers = tuple(dict.fromkeys(pair.teacher for pair in config.topology.pairs))
        self._record: Callable[[Stamped], None] = lambda stamped: None
        self._waiting: deque[Command] = deque()
        self._known: dict[str, Stamped] = {}
        self.overrides = Overrides(config.topology.pairs)
        """What the commands that were taken change."""

    def restore(
        self,
        recorded: Sequence[Stamped],
        record: Callable[[Stamped], None] = lambda stamped: None,
    ) -> None:
        """Take over the commands that the run folder has; all ranks with the same ones.

        record: on rank 0, notes a further command; OSError if it cannot.
        """
        self._record = record
        self._note(recorded)

    @property
    def has_waiting(self) -> bool:
        """Whether a command waits to be taken; on rank 0 only."""
        return bool(self._waiting)

    def receive(self, message: pb.Command) -> None:
        """Let a command of the coordinator wait; on any thread."""
        try:
            self._waiting.append(command_from_wire(message))
        except ValueError as error:
            self._answer(pb.CommandTaken(command_id=message.command_id, failure=str(error)))

    def take(self, step: int) -> list[Stamped]:
        """Take the commands that wait, after `step`; return those that the run obeys.

        All ranks call this together, and get the same commands.
        """
        mine = self._stamp(step) if self._rank == 0 else []
        taken: list[Stamped] = self._peers.broadcast(mine) if self._peers else mine
        self._note(taken)
        return [stamped for stamped in taken if not stamped.failure]

    def _stamp(self, step: int) -> list[Stamped]:
        """Stamp the commands that wait; note those that the run obeys in its folder."""
        taken = []
        while self._waiting:
            command = self._waiting.popleft()
            if before := self._known.get(command.id):  # the coordinator has forgotten the answer
                self._answer(taken_to_wire(before))
                continue
            stamped = Stamped(command, step + 1, time.time(), self._problem(command, step))
            if not stamped.failure:
                try:
                    self._record(stamped)
                except OSError as error:
                    why = f"it cannot be noted in the run folder: {error.strerror}"
                    stamped = replace(stamped, failure=why)
            self._known[command.id] = stamped
            taken.append(stamped)
        return taken

    def _note(self, taken: Sequence[Stamped]) -> None:
        self.overrides.add(*taken)
        if self._rank == 0:
            for stamped in taken:
                self._known[stamped.command.id] = stamped
                self._answer(taken_to_wire(stamped))

    def _problem(self, command: Command, step: int) -> str:
        """Say why the run does not obey a command; empty if it does."""
        if problem := command.problem(self._teachers, step):
            return problem
        if command.action is Action.STOP:
            return ""
        if command.action is Action.CHECKPOINT:
            return "" if self._config.checkpoint.keep else "with checkpoint.keep=0 it saves none"
        if not self._config.method.strategy.pauses:
            return f"its strategy {self._config.distillation.strategy} pauses no teacher"
        return ""
