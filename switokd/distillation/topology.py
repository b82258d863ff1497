"""Networks, their roles, and the teacher-student pairs between them.

1T1S, 2T1S and 1T2S are the paper's topologies (section 3.4); nothing here is
particular to them, N teachers and M students work the same way. Torch-free: the
coordinator uses it.

Not covered: which rank holds which network (`placement.py`), weights and temperatures of the pairs
(`couplings.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Role(str, Enum):
    """What a network is in the distillation."""

    TEACHER = "teacher"
    STUDENT = "student"


@dataclass(frozen=True, order=True)
class Pair:
    """One teacher with one student, by name."""

    teacher: str
    student: str


@dataclass(frozen=True)
class Topology:
    """The networks of a run, by name in the run file's order, with their roles.

    Pairs in `off` neither distil nor decide.
    """

    roles: tuple[tuple[str, Role], ...]
    off: frozenset[Pair] = frozenset()

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.roles)

    def role(self, network: str) -> Role:
        """Role of `network`; KeyError if there is none of that name."""
        return dict(self.roles)[network]

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers."""
        return tuple(name for name, role in self.roles if role is Role.TEACHER)

    @property
    def students(self) -> tuple[str, ...]:
        """Names of the students."""
        return tuple(name for name, role in self.roles if role is Role.STUDENT)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every teacher with every student, teacher by teacher, but those that are off."""
        every = (Pair(t, s) for t in self.teachers for s in self.students)
        return tuple(pair for pair in every if pair not in self.off)

    def problem(self) -> str:
        """What is wrong with it, in a sentence; empty if nothing is."""
        names = [name for name, _ in self.roles]
        if len(set(names)) < len(names):
            return "two networks have the same name"
        if not self.teachers or not self.students:
            missing = "student" if self.teachers else "teacher"
            return f"a run needs at least one teacher and one student (there is no {missing})"
        for pair in sorted(self.off):
            if pair.teacher not in self.teachers or pair.student not in self.students:
                return f"the pair {pair.teacher}, {pair.student} is no teacher with a student"
        left = {name for pair in self.pairs for name in (pair.teacher, pair.student)}
        for name, role in self.roles:
            if name not in left:
                other = "student" if role is Role.TEACHER else "teacher"
                return f"{role.value} {name} has no {other}: all its pairs are switched off"
        return ""

    @property
    def name(self) -> str:
        """The paper's name of the topology, such as "2T1S"."""
        return f"{len(self.teachers)}T{len(self.students)}S"
