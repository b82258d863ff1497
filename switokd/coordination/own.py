"""What one rank decides by itself about its own teachers.

Every rank has all logits and therefore all sums of its teachers, and the decision is a pure
function. Only where rounding might matter, because ranks may have different processors, the first
rank of a teacher chooses the mode for all: in its report, and in a text that the teacher's other
ranks read if the coordinator is late.

Not covered: when a rank may use its own decision (`client.py`).
"""

from __future__ import annotations

from dataclasses import replace

from switokd.config.config import Config
from switokd.coordination.settling import Board
from switokd.distillation.decision import (
    NOTHING,
    ROUNDING,
    Decision,
    Mode,
    Rule,
    decide,
    unsafe_pairs,
)
from switokd.distillation.distances import Parts, means
from switokd.distillation.overrides import Overrides
from switokd.distillation.topology import Pair
from switokd.runtime.placement import Placement


class OwnDecisions:
    """One rank's own decisions.

    board: None if no teacher's ranks need each other's modes. overrides: what commands change;
    None: nothing.
    """

    def __init__(
        self,
        rank: int,
        config: Config,
        placement: Placement,
        board: Board | None,
        overrides: Overrides | None = None,
    ) -> None:
        self._rule, self._board = config.method.rule, board
        self._overrides = overrides or Overrides()
        self.in_force = NOTHING
        """What commands change in the last step."""
        self.reported = {
            pair: placement.ranks_of(pair.teacher).index(rank)
            for pair in config.topology.pairs
            if rank in placement.ranks_of(pair.teacher)
        }
        """Pairs of this rank's teachers, with this rank's index among the teacher's ranks."""
        self._shared = {t for t in config.topology.teachers if len(placement.ranks_of(t)) > 1}
        self.measured = _measured(list(self.reported), self._rule)
        """Pairs that the rank measures: those it reports, and those it needs to decide them."""
        self._last: Decision | None = None
        self._unsafe: tuple[Pair, ...] = ()

    @property
    def safe(self) -> Decision | None:
        """The last decision; None if rounding could make another rank's differ."""
        return None if self._unsafe else self._last

    def decide(self, step: int, parts: Parts) -> dict[Pair, Mode]:
        """Decide the reported pairs; return the modes that hold because this rank chooses them.

        parts: sums of the measured pairs.
        """
        if not parts:
            return {}
        distances = means(parts)
        self.in_force = self._overrides.at(step)
        whole = decide(step, distances, self._rule, in_force=self.in_force)
        self._last = own = replace(
            whole,
            pairs=tuple(p for p in whole.pairs if p.pair in self.reported),
            paused=tuple(t for t in whole.paused if any(p.teacher == t for p in self.reported)),
        )
        # What is unsafe on another rank is unsafe here with twice the margin.
        close = unsafe_pairs(own, distances, self._rule, 2 * ROUNDING)
        chosen = {pair: own.mode(pair) for pair in close if self.reported[pair] == 0}
        for pair, mode in chosen.items():
            if self._board and pair.teacher in self._shared:
                self._board.publish(_key(step, pair), mode.value)
        unsafe = unsafe_pairs(own, distances, self._rule) if len(chosen) < len(close) else ()
        self._unsafe = tuple(pair for pair in unsafe if pair not in chosen)
        return chosen

    def settled(self, seconds: float) -> Decision | None:
        """Return the last decision with the modes that the teachers' first ranks have chosen.

        seconds: longest wait for one of these. None if it does not come.
        """
        if self._last is None or not self._unsafe:
            return self._last
        modes = {}
        for pair in self._unsafe:
            key = _key(self._last.step, pair)
            text = self._board.read(key, seconds) if self._board else None
            if text is None:
                return None
            modes[pair] = Mode(text)
        pairs = tuple(replace(p, mode=modes.get(p.pair, p.mode)) for p in self._last.pairs)
        decision = replace(self._last, pairs=pairs)
        teachers = dict.fromkeys(p.pair.teacher for p in pairs) if self._rule.pauses else ()
        return replace(decision, paused=tuple(t for t in teachers if decision.is_expert(t)))


def _key(step: int, pair: Pair) -> str:
    return f"mode/{step}/{pair.teacher}/{pair.student}"


def _measured(reported: list[Pair], rule: Rule) -> list[Pair]:
    """Return the pairs, and those that their epsilons are computed from."""
    pairs = dict.fromkeys(reported)
    while more := [s for p in pairs if (s := rule.epsilon_from.get(p, p)) not in pairs]:
        pairs.update(dict.fromkeys(more))
    return list(pairs)


def first_difference(ours: Decision, theirs: Decision) -> Pair | None:
    """Return the first pair of our decision that has another mode in theirs; None: no pair."""
    differing = (p.pair for p in ours.pairs if theirs.mode(p.pair) is not p.mode)
    return next(differing, None)
