"""Reads the environment variables that torchrun sets. Imported without torch.

Not covered: joining the other processes (`process_group.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from switokd.errors import UsageError

STARTED = "SWITOKD_STARTED"
"""Environment variable with the time at which `switokd train` was started, for its ranks."""

TORCHRUN = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR")
"""Environment variables of a process among several."""

_IMPORTED_AT = time.time()


@dataclass(frozen=True)
class ProcessLayout:
    """A number of processes on this machine, and the CPU threads of each process."""

    processes: int
    threads: int

    @property
    def code(self) -> str:
        """Text form for a command line: "2x1" for 2 processes with 1 thread each."""
        return f"{self.processes}x{self.threads}"

    @classmethod
    def of(cls, code: str) -> ProcessLayout:
        """Parse the text form `code`."""
        processes, threads = code.split("x")
        return cls(int(processes), int(threads))

    def __str__(self) -> str:
        """Return text such as "2 processes with 1 thread each"."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        if self.processes == 1:
            return f"1 process with {threads}"
        return f"{self.processes} processes with {threads} each"


@dataclass(frozen=True)
class Environment:
    """A process among the processes of the run. The default is a run of one process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    under_torchrun: bool = False
    embedded: bool = False
    """Whether training runs inside a user's program, whose signals and memory stay unchanged."""
    layouts: tuple[ProcessLayout, ...] = ()
    """Layouts that `placement: auto` may choose from, largest first; empty: the number is fixed."""
    started: float | None = None
    """When the command was started, in seconds of `time.time`; None: unknown."""

    def first(self, processes: int) -> Environment:
        """Environment restricted to the first `processes` ranks, all on one machine."""
        return replace(self, world_size=processes, local_world_size=processes, layouts=())

    @property
    def one_host(self) -> bool:
        """Whether all processes of the run are on this machine."""
        return self.local_world_size == self.world_size


def started() -> float:
    """Return when this command, or the one that has started this rank, was started."""
    return float(os.environ.get(STARTED) or _IMPORTED_AT)


def cores() -> int:
    """Return the number of cores that affinity and container limits allow this process."""
    from joblib import cpu_count

    return int(cpu_count())


def environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """Read torchrun's variables; without them, return the environment of a single process.

    UsageError if only some of them are set, as a job of another program leaves them, or if a value
    cannot be one of torchrun's.
    """
    if not variables.get("WORLD_SIZE"):
        return Environment()
    if missing := [name for name in TORCHRUN if not variables.get(name)]:
        raise UsageError(
            f"environment variable WORLD_SIZE={variables['WORLD_SIZE']} is set, but not "
            f"{', '.join(missing)}: torchrun sets all of them; start with torchrun, or unset "
            "WORLD_SIZE"
        )
    world_size, local_world_size = (_count(variables, name, 1) for name in TORCHRUN[:2])
    return Environment(
        rank=_count(variables, "RANK", 0, world_size - 1),
        world_size=world_size,
        local_rank=_count(variables, "LOCAL_RANK", 0, local_world_size - 1),
        local_world_size=local_world_size,
        master_addr=variables["MASTER_ADDR"],
        under_torchrun="TORCHELASTIC_RUN_ID" in variables,
    )


def _count(variables: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    """Read a whole number from `least` to `most`; UsageError for any other value."""
    text = variables[name].strip()
    value = int(text) if text.isdecimal() and len(text) < 10 else -1
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise UsageError(
            f"environment variable {name}={variables[name]}: allowed: {allowed}; torchrun sets it"
        )
    return value


def describe_rank() -> str:
    """Return "rank 1" for a message, an empty string in a run of one process."""
    try:
        env = environment()
    except UsageError:  # another program's variables: not of a rank
        return ""
    return f"rank {env.rank}" if env.world_size > 1 else ""


def restart_count() -> str:
    """Return how often torchrun has started the ranks again, as it tells them: "0" at first."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def check_world_size(needed: int, topology: str, command: str, env: Environment) -> None:
    """Raise UsageError, with the right torchrun command, if the number of processes is wrong.

    command: recipe and settings.
    """
    if env.world_size != needed:
        processes = "1 process" if needed == 1 else f"{needed} processes"
        raise UsageError(
            f"{command.split()[0]} is {topology} and needs {processes}, found {env.world_size}: "
            f"torchrun --standalone --nproc-per-node={needed} -m switokd.train {command}"
        )


def check_alone(env: Environment) -> None:
    """Raise UsageError unless the run has a single process, which needs no coordinator."""
    if env.world_size > 1:
        raise UsageError(
            f"coordinator: off is for a run of one process, found {env.world_size}; leave it on "
            "auto, or use placement=replicated in one process"
        )
