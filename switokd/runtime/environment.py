"""torchrun's environment, read in one place; without torch, so that mistakes show at once.

Not covered: joining the other processes (`process_group.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from switokd.errors import UsageError


@dataclass(frozen=True)
class ProcessLayout:
    """So many processes on this machine, each with so many CPU threads."""

    processes: int
    threads: int

    @property
    def code(self) -> str:
        """As one argument of a command: "2x1"."""
        return f"{self.processes}x{self.threads}"

    @classmethod
    def of(cls, code: str) -> ProcessLayout:
        """Read `code`."""
        processes, threads = code.split("x")
        return cls(int(processes), int(threads))

    def __str__(self) -> str:
        """Such as "2 processes with 1 thread each"."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        if self.processes == 1:
            return f"1 process with {threads}"
        return f"{self.processes} processes with {threads} each"


@dataclass(frozen=True)
class Environment:
    """What torchrun tells a process; one process alone without it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    under_torchrun: bool = False
    embedded: bool = False
    """Whether this is a program of the user's, whose signals and memory are its own (`api.py`)."""
    layouts: tuple[ProcessLayout, ...] = ()
    """What `placement: auto` may choose from, largest first; empty: as many as there are."""

    def first(self, processes: int) -> Environment:
        """As it is where only the first so many processes go on; they are on one machine."""
        return replace(self, world_size=processes, local_world_size=processes, layouts=())

    @property
    def one_host(self) -> bool:
        """Whether all processes run on this machine."""
        return self.local_world_size == self.world_size


def cores() -> int:
    """Cores that this process may use, by its affinity and by its container's limit."""
    from joblib import cpu_count

    return int(cpu_count())


def environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """Read torchrun's variables."""
    if "WORLD_SIZE" not in variables:
        return Environment()
    return Environment(
        rank=int(variables["RANK"]),
        world_size=int(variables["WORLD_SIZE"]),
        local_rank=int(variables["LOCAL_RANK"]),
        local_world_size=int(variables["LOCAL_WORLD_SIZE"]),
        master_addr=variables["MASTER_ADDR"],
        under_torchrun="TORCHELASTIC_RUN_ID" in variables,
    )


def check_world_size(needed: int, topology: str, command: str, env: Environment) -> None:
    """UsageError, with the command to type, unless there are as many processes as needed.

    command: the recipe with its settings.
    """
    if env.world_size != needed:
        processes = "1 process" if needed == 1 else f"{needed} processes"
        raise UsageError(
            f"{command.split()[0]} is {topology} and needs {processes}, found {env.world_size}: "
            f"torchrun --standalone --nproc-per-node={needed} -m switokd.train {command}"
        )


def check_alone(env: Environment) -> None:
    """UsageError unless there is one process only, which can decide by itself."""
    if env.world_size > 1:
        raise UsageError(
            f"coordinator: off is for a run of one process, found {env.world_size}; leave it on "
            "auto, or use placement=replicated in one process"
        )
