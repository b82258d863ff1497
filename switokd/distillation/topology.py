"""Networks, their roles, and the teacher-student pairs between them.

The paper's topologies are 1T1S, 2T1S and 1T2S (section 3.4). Here they are cases of N teachers
and M students.

Not covered: which rank holds which network (`placement.py`), weights and temperatures of the pairs
(`couplings.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple


class Role(str, Enum):
    """Role of a network in the distillation."""

    TEACHER = "teacher"
    STUDENT = "student"


class Pair(NamedTuple):
    """One teacher and one student, by name.

    A tuple, because it is the key of most dictionaries: its hash costs a third of a dataclass's.
    """

    teacher: str
    student: str


@dataclass(frozen=True)
class Topology:
    """The networks of a run with their roles."""

    roles: tuple[tuple[str, Role], ...]
    """(name, role) of each network, in the run file's order."""
    off: frozenset[Pair] = frozenset()
    """Pairs that are switched off: they have no KL term and no decision."""

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.roles)

    def role(self, network: str) -> Role:
        """Role of `network`. KeyError if the run has no network of that name."""
        return self._role_of[network]

    @cached_property
    def _role_of(self) -> dict[str, Role]:
        return dict(self.roles)

    @cached_property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers."""
        return tuple(name for name, role in self.roles if role is Role.TEACHER)

    @cached_property
    def students(self) -> tuple[str, ...]:
        """Names of the students."""
        return tuple(name for name, role in self.roles if role is Role.STUDENT)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Every teacher with every student, teacher by teacher, without the pairs in `off`."""
        pairs = (Pair(t, s) for t in self.teachers for s in self.students)
        return tuple(pair for pair in pairs if pair not in self.off)

    def problem(self) -> str:
        """An error message if the topology is invalid, else an empty string."""
        names = [name for name, _ in self.roles]
        if len(set(names)) < len(names):
            return "two networks have the same name"
        if not self.teachers or not self.students:
            missing = "student" if self.teachers else "teacher"
            return f"a run needs at least one teacher and one student (there is no {missing})"
        for pair in sorted(self.off):
            roles = self._role_of.get(pair.teacher), self._role_of.get(pair.student)
            if roles != (Role.TEACHER, Role.STUDENT):
                return f"the pair {pair.teacher}, {pair.student} is not a teacher with a student"
        paired = {name for pair in self.pairs for name in (pair.teacher, pair.student)}
        for name, role in self.roles:
            if name not in paired:
                other = "student" if role is Role.TEACHER else "teacher"
                return f"{role.value} {name} has no {other}: all its pairs are switched off"
        return ""

    @property
    def name(self) -> str:
        """Name of the topology in the paper's notation, such as "2T1S"."""
        return f"{len(self.teachers)}T{len(self.students)}S"
