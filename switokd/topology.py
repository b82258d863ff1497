"""Networks, their roles, and the teacher-student pairs between them.

1T1S, 2T1S and 1T2S are the paper's topologies (section 3.4); nothing here is
particular to them, N teachers and M students work the same way. Torch-free: the
coordinator uses it.

Not covered: which rank holds which network (`placement.py`), pairs switched off.
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
    """The networks of a run, by name in the run file's order, with their roles."""

    roles: tuple[tuple[str, Role], ...]

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
        """Every teacher with every student, teacher by teacher."""
        return tuple(Pair(t, s) for t in self.teachers for s in self.students)

    @property
    def name(self) -> str:
        """The paper's name of the topology, such as "2T1S"."""
        return f"{len(self.teachers)}T{len(self.students)}S"
