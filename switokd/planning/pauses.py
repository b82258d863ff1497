"""How often which teachers are paused together: what a step is expected to cost depends on it.

Torch-free.

Not covered: how the share changes while a run goes on; pauses in stretches rather than alone.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from switokd.config.sections import Auto
from switokd.distillation.decision import Mode
from switokd.distillation.method import Method
from switokd.distillation.topology import Topology
from switokd.errors import UsageError, nearest

USUAL_SHARE = 0.3
"""Of a teacher's steps under switokd, before anything is known: between none, early in a run, and
the half that the digits recipes reach. A guess; an earlier run's record is better."""

ALL_PATTERNS = 6
"""Up to so many teachers every combination is counted, beyond it `DRAWN` are drawn."""
DRAWN = 64


@dataclass(frozen=True)
class Pauses:
    """Probabilities of the sets of teachers that a step pauses; they add up to 1."""

    patterns: tuple[tuple[frozenset[str], float], ...]
    source: str = ""
    """Where they come from, in words."""

    @classmethod
    def none(cls) -> Pauses:
        """Nobody pauses."""
        return cls(((frozenset(), 1.0),), "nobody pauses")

    @classmethod
    def independent(cls, shares: Mapping[str, float]) -> Pauses:
        """Each teacher by itself, with its share of the steps, 0 to 1.

        Beyond `ALL_PATTERNS` teachers the sets are a sample, the same one each time.
        """
        shares = {teacher: share for teacher, share in shares.items() if share > 0}
        if not shares:
            return cls.none()
        source = "assumed, each by itself: " + _describe(shares)
        if len(shares) > ALL_PATTERNS:
            draw = random.Random(0)
            drawn = Counter(
                frozenset(t for t, share in shares.items() if draw.random() < share)
                for _ in range(DRAWN)
            )
            return cls(tuple((paused, n / DRAWN) for paused, n in drawn.items()), source)
        patterns = []
        for is_paused in product((False, True), repeat=len(shares)):
            chances = [s if p else 1 - s for p, s in zip(is_paused, shares.values(), strict=True)]
            paused = frozenset(t for t, p in zip(shares, is_paused, strict=True) if p)
            patterns.append((paused, prod(chances)))
        return cls(tuple((paused, chance) for paused, chance in patterns if chance > 0), source)

    @classmethod
    def usual(cls, method: Method) -> Pauses:
        """Before anything is known: nobody where the strategy pauses nobody, all frozen ones, else
        `USUAL_SHARE` for each teacher.
        """
        if not (method.strategy.pauses and method.rule.pauses):
            return cls.none()
        share = 1.0 if method.strategy.frozen_teachers else USUAL_SHARE
        return cls.independent(dict.fromkeys(method.topology.teachers, share))

    @classmethod
    def of_run(cls, folder: Path, topology: Topology) -> Pauses:
        """As often, and in such sets, as an earlier run's decisions.jsonl records.

        UsageError if there is none, or if it is of other networks.
        """
        path = folder / "decisions.jsonl"
        modes: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                pair = json.loads(line)
                teacher, mode = pair["teacher"], pair["mode"]
                if not (isinstance(teacher, str) and isinstance(mode, str)):
                    raise TypeError
                modes[pair["step"]][teacher].append(mode)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is not a run's record of decisions") from None
        teachers = {teacher for step in modes.values() for teacher in step}
        if teachers != set(topology.teachers):
            raise UsageError(
                f"{path} is of the teachers {', '.join(sorted(teachers)) or '(none)'}; the run "
                f"file has {', '.join(topology.teachers)}"
            )
        counts = Counter(
            frozenset(t for t, modes in step.items() if set(modes) == {Mode.EXPERT.value})
            for step in modes.values()
        )
        patterns = tuple((paused, n / len(modes)) for paused, n in counts.items())
        shares = {t: sum(p for paused, p in patterns if t in paused) for t in topology.teachers}
        return cls(patterns, f"of the {len(modes)} steps of {folder}: {_describe(shares)}")

    def share(self, network: str) -> float:
        """Share of the steps at which `network` is paused, 0 to 1."""
        return sum(chance for paused, chance in self.patterns if network in paused)


def parse_shares(given: list[str], topology: Topology) -> dict[str, float]:
    """Shares as the command line gives them: "0.5" for every teacher, "teacher1=0.5" for one.

    A teacher's own counts before that of all; one that is not named pauses never. UsageError for
    what is no share from 0 to 1 or no teacher.
    """
    own: dict[str, float] = {}
    everyone = 0.0
    for text in given:
        name, equals, number = text.rpartition("=")
        if equals and name not in topology.teachers:
            raise UsageError(
                f"--paused {text}: no teacher {name!r}{nearest(name, topology.teachers)} "
                f"(teachers: {', '.join(topology.teachers)})"
            )
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise UsageError(f"--paused {text}: a share is a number from 0 to 1, like 0.5")
        if equals:
            own[name] = share
        else:
            everyone = share
    return {teacher: own.get(teacher, everyone) for teacher in topology.teachers}


def _describe(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{teacher} {share:.0%}" for teacher, share in shares.items())


def expected_pauses(method: Method, given: Auto) -> Pauses:
    """As `given` says by its run or its shares, else the usual; UsageError if that is no such run.

    What it says is of teachers that learn and pause by turns: where the strategy pauses nobody,
    or leaves its teachers as they come, it is certain already.
    """
    strategy, topology = method.strategy, method.topology
    if strategy.pauses and method.rule.pauses and not strategy.frozen_teachers:
        if given.run is not None:
            return Pauses.of_run(Path(given.run), topology)
        if given.paused is not None:
            own = given.paused if isinstance(given.paused, dict) else {}
            everyone = given.paused if isinstance(given.paused, int | float) else 0.0
            return Pauses.independent({t: own.get(t, everyone) for t in topology.teachers})
    return Pauses.usual(method)
