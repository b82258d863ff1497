"""What the ranks measure in each step, and what must be decided from it.

Ranks round differently, and some steps are so close to the threshold that this matters.
"""

from __future__ import annotations

import random
from functools import lru_cache

from switokd.config.config import Config
from switokd.config.run_file import load
from switokd.coordination.client import plan_of
from switokd.coordination.own import OwnDecisions
from switokd.coordination.settling import decide_reports
from switokd.distillation.decision import Decision
from switokd.distillation.distances import Parts
from switokd.distillation.gap import Distances, PairSums, delta
from switokd.distillation.overrides import Overrides, Stamped
from switokd.distillation.topology import Pair
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import sums_to_wire

PLACEMENTS = (
    "{teacher1: [0], teacher2: [1], student: [2]}",
    "{teacher1: [0, 1], teacher2: [1], student: [2]}",
    "{teacher1: [1, 2], teacher2: [1, 2], student: [0]}",
)
ON_LOSS = (*["decide_alone"] * 8, "wait", "stop")
SAMPLES = 8


@lru_cache
def configuration(placement: str, on_loss: str) -> Config:
    """The configuration of a run of three ranks."""
    return load("digits-2t1s", [f"placement={placement}", f"coordinator.on_loss={on_loss}"])


class Board:
    """Texts that ranks let each other read."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def publish(self, key: str, text: str) -> None:
        self.texts[key] = text

    def read(self, key: str, seconds: float) -> str | None:
        return self.texts.get(key)


class Numbers:
    """The numbers of a run; the same for every start of its processes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        rng = random.Random(seed)
        self.on_loss = rng.choice(ON_LOSS)
        self.config = configuration(rng.choice(PLACEMENTS), self.on_loss)
        self.placement = self.config.placement_on(3)
        self.commands: list[Stamped] = []
        """What rank 0 has noted in the run folder."""
        self._overrides = Overrides(self.config.topology.pairs)
        self._truths: dict[int, Decision] = {}

    def parts(self, rank: int, step: int, pairs: list[Pair]) -> Parts:
        """The sums of all shards, as a rank computes them."""
        return {pair: self._sums(rank, step, pair) for pair in pairs}

    def _sums(self, rank: int, step: int, pair: Pair) -> list[PairSums]:
        exact = random.Random(f"{self._seed} {step} {pair.teacher}")
        own = random.Random(f"{self._seed} {step} {pair.teacher} {rank}")
        e_s, e_t = exact.uniform(0.2, 1.8), exact.uniform(0.2, 1.8)
        gap = exact.uniform(0.0, 2.0)
        if exact.random() < 0.3:
            gap = max(delta(Distances(0.0, e_s, e_t, 1)), 0.0)
        shards = len(self.placement.ranks_of(pair.teacher))

        def rounded(x: float) -> float:
            return SAMPLES * x * (1 + own.uniform(-5e-8, 5e-8))

        return [PairSums(rounded(gap), rounded(e_s), rounded(e_t), SAMPLES) for _ in range(shards)]

    def command(self, stamped: Stamped) -> None:
        """Note a command; from its first step on it changes what must be decided."""
        self.commands.append(stamped)
        self._overrides.add(stamped)
        self._truths = {s: d for s, d in self._truths.items() if s < stamped.first_step}

    def truth(self, step: int) -> Decision:
        """What must be decided in a step, by whomever."""
        if step not in self._truths:
            board = Board()
            reports = [[self._report(rank, step, board).SerializeToString()] for rank in range(3)]
            plan, rule = plan_of(self.config, self.placement, step), self.config.method.rule
            (self._truths[step],) = decide_reports(plan, rule, reports)
        return self._truths[step]

    def _report(self, rank: int, step: int, board: Board) -> pb.Report:
        own = OwnDecisions(rank, self.config, self.placement, board, self._overrides)
        parts = self.parts(rank, step, own.measured)
        modes = own.decide(step, parts)
        sums = {pair: parts[pair][index] for pair, index in own.reported.items()}
        return pb.Report(step=step, pairs=sums_to_wire(sums, modes, own.in_force))
