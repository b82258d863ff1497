"""How often teachers are paused, alone and together: the expected cost of a step depends on it.

Torch-free.

Not covered: changes of the shares during a run; the length of a pause.
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
from switokd.config.yaml_loader import parse_number
from switokd.distillation.decision import Mode
from switokd.distillation.method import Method
from switokd.distillation.topology import Topology
from switokd.errors import UsageError, nearest

DEFAULT_SHARE = 0.3
"""Assumed share of the steps in which a teacher is paused, if no decisions of a run are given.

The share is 0 early in a run, and the digits recipes reach 0.5; this is a guess in between."""

MAX_TEACHERS_ENUMERATED = 6
"""Up to this number of teachers all combinations are listed; above it, `SAMPLED` are sampled."""
SAMPLED = 64


@dataclass(frozen=True)
class Pauses:
    """Probabilities of the sets of teachers that are paused in a step; they sum to 1."""

    patterns: tuple[tuple[frozenset[str], float], ...]
    source: str = ""
    """Description of the assumption, or of the run that was read."""

    @classmethod
    def none(cls) -> Pauses:
        """Return the pauses of a run in which no teacher is ever paused."""
        return cls(((frozenset(), 1.0),), "no teacher is paused")

    @classmethod
    def independent(cls, shares: Mapping[str, float]) -> Pauses:
        """Assume that teachers are paused independently.

        shares: by teacher, share of the steps in which it is paused, 0 to 1.
        Above `MAX_TEACHERS_ENUMERATED` teachers the sets are sampled, with a fixed seed.
        """
        shares = {teacher: share for teacher, share in shares.items() if share > 0}
        if not shares:
            return cls.none()
        source = "assumed, independent: " + _describe(shares)
        if len(shares) > MAX_TEACHERS_ENUMERATED:
            generator = random.Random(0)
            sampled = Counter(
                frozenset(t for t, share in shares.items() if generator.random() < share)
                for _ in range(SAMPLED)
            )
            return cls(tuple((paused, n / SAMPLED) for paused, n in sampled.items()), source)
        patterns = []
        for is_paused in product((False, True), repeat=len(shares)):
            factors = [s if p else 1 - s for p, s in zip(is_paused, shares.values(), strict=True)]
            paused = frozenset(t for t, p in zip(shares, is_paused, strict=True) if p)
            patterns.append((paused, prod(factors)))
        return cls(tuple((paused, p) for paused, p in patterns if p > 0), source)

    @classmethod
    def default(cls, method: Method) -> Pauses:
        """Return what to assume if nothing is known of a run with this method.

        No pauses if the strategy never pauses a teacher; always paused if the teachers are frozen;
        otherwise `DEFAULT_SHARE` for each teacher.
        """
        if not (method.strategy.pauses and method.rule.pauses):
            return cls.none()
        share = 1.0 if method.strategy.frozen_teachers else DEFAULT_SHARE
        return cls.independent(dict.fromkeys(method.topology.teachers, share))

    @classmethod
    def of_run(cls, folder: Path, topology: Topology) -> Pauses:
        """Read the pauses from the decision log of an earlier run.

        folder: the run folder, which holds decisions.jsonl.
        Raises UsageError if the log cannot be read or has other teachers.
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
            raise UsageError(f"{path} is not the decision log of a run") from None
        teachers = {teacher for step in modes.values() for teacher in step}
        if teachers != set(topology.teachers):
            raise UsageError(
                f"{path} has the teachers {', '.join(sorted(teachers)) or '(none)'}; the run "
                f"file has {', '.join(topology.teachers)}"
            )
        counts = Counter(
            frozenset(t for t, modes in step.items() if set(modes) == {Mode.EXPERT.value})
            for step in modes.values()
        )
        patterns = tuple((paused, n / len(modes)) for paused, n in counts.items())
        shares = {t: sum(p for paused, p in patterns if t in paused) for t in topology.teachers}
        return cls(patterns, f"in the {len(modes)} steps of {folder}: {_describe(shares)}")

    def share(self, network: str) -> float:
        """Return the share of the steps in which `network` is paused, 0 to 1."""
        return sum(p for paused, p in self.patterns if network in paused)


def parse_shares(texts: list[str], topology: Topology) -> dict[str, float]:
    """Parse the values of --paused: "0.5" for every teacher, "teacher1=0.5" for one teacher.

    Returns a share per teacher, 0 to 1. The value for one teacher wins over the value for all;
    a teacher without a value is never paused. Raises UsageError for a bad share or teacher.
    """
    by_teacher: dict[str, float] = {}
    for_all = 0.0
    for text in texts:
        name, equals, number = text.rpartition("=")
        if equals and name not in topology.teachers:
            raise UsageError(
                f"--paused {text}: no teacher {name!r}{nearest(name, topology.teachers)} "
                f"(teachers: {', '.join(topology.teachers)})"
            )
        share = parse_number(number)
        if share is None or not 0 <= share <= 1:
            raise UsageError(f"--paused {text}: a share is a number from 0 to 1, like 0.5")
        if equals:
            by_teacher[name] = share
        else:
            for_all = share
    return {teacher: by_teacher.get(teacher, for_all) for teacher in topology.teachers}


def _describe(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{teacher} {share:.0%}" for teacher, share in shares.items())


def expected_pauses(method: Method, auto: Auto) -> Pauses:
    """Return the pauses that the setting `auto` describes by a run or by shares, else the default.

    `auto` only matters if the strategy pauses teachers that learn. Without pauses, or with frozen
    teachers, the pauses are known. Raises UsageError if the run cannot be read.
    """
    strategy, topology = method.strategy, method.topology
    if strategy.pauses and method.rule.pauses and not strategy.frozen_teachers:
        if auto.run is not None:
            return Pauses.of_run(Path(auto.run), topology)
        if auto.paused is not None:
            by_teacher = auto.paused if isinstance(auto.paused, dict) else {}
            for_all = auto.paused if isinstance(auto.paused, int | float) else 0.0
            return Pauses.independent({t: by_teacher.get(t, for_all) for t in topology.teachers})
    return Pauses.default(method)
