"""The faults that happen to a simulated run.

Not covered: what must hold in spite of them (`world.py`).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.simulation.ranks import RUN_ID

if TYPE_CHECKING:
    from tests.simulation.world import World

OFTEN = ("broken", "slow", "doubled", "cut_off")
"""Kinds of faults that are three times as likely as the others."""
SELDOM = (
    *("crashed", "frozen", "full", "flipped", "hurried", "skewed", "killed", "unsealed"),
    *("stopped", "commanded"),
)


class Faults:
    """Draws faults. Every run has some of the kinds only, because others would hide their effects.

    In a run whose job is killed again and again, no coordinator is away for long.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        some = [kind for kind in (*OFTEN, *SELDOM) if world.rng.random() < 0.5]
        self._kinds = [kind for kind in some for _ in range(3 if kind in OFTEN else 1)] or OFTEN
        self.tried: Counter[str] = Counter()

    def fault(self) -> None:
        """Let one fault happen, if it can happen now."""
        kind = self._world.rng.choice(self._kinds)
        if getattr(self, f"_{kind}")():
            self.tried[kind] += 1

    def _broken(self) -> bool:
        return self._on_stream(lambda stream: stream.breaks())

    def _slow(self) -> bool:
        slowness = self._world.rng.choice((1.0, 30.0, 300.0))
        return self._on_stream(lambda stream: setattr(stream, "slowness", slowness))

    def _doubled(self) -> bool:
        return self._on_stream(lambda stream: setattr(stream, "doubles", 5))

    def _cut_off(self) -> bool:
        rank = self._world.rng.choice(self._world.job.ranks)
        if not rank.stream:
            return False
        rank.cut_off_until = self._world.clock.now + self._world.rng.choice((0.005, 0.05, 0.5, 5.0))
        rank.stream.breaks()
        return True

    def _frozen(self) -> bool:
        if not self._world.server.is_answering:
            return False
        seconds = self._world.rng.choice((0.005, 0.05, 0.5, 4.0))
        self._world.server.frozen_until = max(
            self._world.server.frozen_until, self._world.clock.now + seconds
        )
        return True

    def _crashed(self) -> bool:
        if not self._world.server.is_running:
            return False
        self._world.server.crash()
        self._world.clock.at(
            self._world.rng.choice((0.02, 0.1, 1.0, 10.0)), self._world.serve_again
        )
        return True

    def _full(self) -> bool:
        self._world.disk.is_full = not self._world.disk.is_full
        return self._world.disk.is_full

    def _flipped(self) -> bool:
        run = self._world.disk.runs.get(RUN_ID)
        if not run or not run.rows:
            return False
        step = self._world.rng.choice(sorted(run.rows))
        self._world.disk.flip(step)
        self._world.lost_rows.add(step)
        return True

    def _unsealed(self) -> bool:
        run = self._world.disk.runs.get(RUN_ID)
        if not run or run.is_damaged:
            return False
        run.is_damaged = True
        return True

    def _stopped(self) -> bool:
        seconds = self._world.rng.choice((0.005, 0.05, 0.5, 4.0))
        rank = self._world.rng.choice(self._world.job.ranks)
        rank.stopped_until = self._world.clock.now + seconds
        return True

    def _commanded(self) -> bool:
        return self._world.rng.random() < 0.2 and self._world.operator.command()

    def _hurried(self) -> bool:
        return self._world.clock.hurry()

    def _skewed(self) -> bool:
        self._world.skew += self._world.rng.choice((1.0, 10.0, 1000.0))
        return self._world.server.is_answering

    def _killed(self) -> bool:
        # A job that were killed at every chance would never come to its next checkpoint.
        if not self._world.job.is_alive or self._world.rng.random() < 0.8:
            return False
        self._world.job.fail()
        return True

    def _on_stream(self, change: object) -> bool:
        streams = [rank.stream for rank in self._world.job.ranks if rank.stream]
        if not streams:
            return False
        change(self._world.rng.choice(streams))  # type: ignore[operator]
        return True
