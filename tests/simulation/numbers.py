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
from switokd.distillation.topology import Pair
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import sums_to_wire

PLACEMENTS = (
    "{teacher1: [0], teacher2: [1], student: [2]}",
    "{teacher1: [0, 1], teacher2: [1], student: [2]}",
    "{teacher1: [1, 2], teacher2: [1, 2], student: [0]}",
)
SAMPLES = 8


@lru_cache
def configuration(placement: str) -> Config:
    """The configuration of a run of three ranks."""
    return load("digits-2t1s", [f"placement={placement}"])


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
        self.config = configuration(random.Random(seed).choice(PLACEMENTS))
        self.placement = self.config.placement_on(3)
        self._truths: dict[int, Decision] = {}

    def plan(self, first_step: int) -> pb.RunPlan:
        return plan_of(self.config, self.placement, first_step)

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

    def own(self, rank: int, board: Board) -> OwnDecisions:
        return OwnDecisions(rank, self.config, self.placement, board)

    def report(self, own: OwnDecisions, rank: int, step: int) -> pb.Report:
        """Decide a step on a rank, and return the rank's report."""
        parts = self.parts(rank, step, own.measured)
        modes = own.decide(step, parts)
        sums = {pair: parts[pair][index] for pair, index in own.reported.items()}
        return pb.Report(step=step, pairs=sums_to_wire(sums, modes))

    def truth(self, step: int) -> Decision:
        """What must be decided in a step, by whomever."""
        if step not in self._truths:
            board = Board()
            reports = [self.report(self.own(rank, board), rank, step) for rank in range(3)]
            serialized = [[report.SerializeToString()] for report in reports]
            rule = self.config.method.rule
            (self._truths[step],) = decide_reports(self.plan(step), rule, serialized)
        return self._truths[step]
