"""The process groups and the device.

Ranks that share a GPU exchange over Gloo and the host's memory: NCCL refuses two on one GPU.

Not covered: starting the processes (`launcher.py`).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from switokd.errors import CollectiveError, SwitokdError, UsageError
from switokd.runtime.environment import Environment

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long ranks wait for each other where their work may be unequal: set-up, evaluation."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    env: Environment
    device: torch.device
    timeout: timedelta = timedelta(minutes=1)
    """How long a step's collective waits."""
    backend: str = "gloo"
    """Of the steps' collectives: nccl where each rank has a GPU of its own, else gloo."""
    steps: dist.ProcessGroup | None = None
    """Group of the steps' exchange; None in a run of one process."""
    sharing: int = 1
    """Ranks on this one's GPU; says nothing where there is none."""

    @property
    def transport(self) -> torch.device | None:
        """Where the steps' collectives need their tensors; None: on the rank's device."""
        via_host = self.device.type == "cuda" and self.backend == "gloo"
        return torch.device("cpu") if via_host and self.env.world_size > 1 else None

    @property
    def is_silent(self) -> bool:
        """Whether a step's collective that hangs raises nothing here, but ends the process."""
        return self.backend == "nccl"

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Make a group for the steps' collectives; every rank must call it for every group.

        All ranks have one already: another would cost each of them a thread and a connection to
        each other, and never run at the same time, for sums are over before the next exchange.
        """
        if len(ranks) == 1:
            return None
        if self.steps is not None and len(ranks) == self.env.world_size:
            return self.steps
        # NCCL's watchdog ends the process without a word: give the coordinator time to say why.
        # It hears of it by `lifecycle.Overdue`.
        timeout = 2 * self.timeout if self.backend == "nccl" else self.timeout
        group = dist.new_group(list(ranks), timeout=timeout, backend=self.backend)
        return group if isinstance(group, dist.ProcessGroup) else None

    @contextmanager
    def first(self, ranks: int) -> Iterator[World]:
        """The first so many ranks within this world, for the steps' collectives, for a while.

        Every rank must call it; what others than those get is of no use. Their group is left at
        the end unless the body fails: its threads would stay for the whole training.
        """
        if ranks == self.env.world_size:
            yield self
            return
        few = replace(self, env=self.env.first(ranks), steps=self.group(range(ranks)))
        yield few
        if few.steps is not None:
            dist.destroy_process_group(few.steps)

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.env.rank

    def all_gather(self, mine: Any) -> list[Any]:
        """Every rank's object, in rank order."""
        if self.env.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.env.world_size
        with collective_errors("waiting for the other ranks"):
            dist.all_gather_object(everyone, mine)
        return everyone

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's object on rank 0; nothing elsewhere."""
        if self.env.world_size == 1:
            return [mine]
        everyone: list[Any] | None = [None] * self.env.world_size if self.rank == 0 else None
        with collective_errors("waiting for the other ranks"):
            dist.gather_object(mine, everyone)
        return everyone or []

    def broadcast(self, rank_0s: Any) -> Any:
        """Rank 0's object, on every rank."""
        if self.env.world_size == 1:
            return rank_0s
        carrier = [rank_0s]
        with collective_errors("waiting for rank 0"):
            dist.broadcast_object_list(carrier)
        return carrier[0]

    def on_rank_0(self, make: Callable[[], T]) -> T | None:
        """What `make` gives on rank 0, None elsewhere; its SwitokdError is raised on all."""
        made, problem = None, None
        if self.rank == 0:
            try:
                made = make()
            except SwitokdError as error:
                problem = error
        problem = self.broadcast(problem)
        if problem is not None:
            raise problem.seen_by(every_rank=True)
        return made


@contextmanager
def collective_errors(doing: str) -> Iterator[None]:
    """Turn a collective's failure into a CollectiveError that says what the rank was doing."""
    try:
        yield
    except torch.OutOfMemoryError:  # this rank's own
        raise
    except (RuntimeError, ValueError) as error:
        # Gloo begins with a place in its source and ends with advice.
        reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip()).splitlines()[0]
        raise CollectiveError(doing, reason.partition(". ")[0]) from error


@contextmanager
def join_world(env: Environment, device: torch.device, timeout: float) -> Iterator[World]:
    """Join the process groups, and leave them at the end unless the body fails.

    The default group may take minutes and carries Python objects, so it is Gloo's; the steps'
    collectives have one of their own. After a failure leaving would wait for peers that are
    gone, and the process ends anyway. timeout: seconds after which a step's collective gives up.
    PeerError if a rank does not come.
    """
    if env.world_size == 1:
        yield World(env, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mine = _identity(device)
    with collective_errors("joining the process group"):
        dist.init_process_group("gloo", None, PATIENCE, env.world_size, env.rank, store=_store(env))
        world = World(env, device, timedelta(seconds=timeout))
        everyone = world.all_gather(mine)
        world = replace(world, backend=_backend(everyone), sharing=everyone.count(mine))
        world = replace(world, steps=world.group(range(env.world_size)))
    yield world
    dist.destroy_process_group()


def _store(env: Environment) -> Store:
    """Where ranks find each other: apart from the world that the first of them may have left."""
    store, _, _ = next(rendezvous("env://", env.rank, env.world_size, timeout=PATIENCE))
    return PrefixStore(f"of {env.world_size}", store)


def _identity(device: torch.device) -> str:
    """Which GPU of which machine this is; nothing for a CPU."""
    if device.type != "cuda":
        return ""
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def _backend(identities: Sequence[str]) -> str:
    """NCCL where each rank has a GPU of its own, else Gloo."""
    return "nccl" if all(identities) and len(set(identities)) == len(identities) else "gloo"


def check_same_configuration(world: World, mine: Mapping[str, Any]) -> None:
    """UsageError naming the first rank, and the key, whose configuration differs from rank 0's.

    mine: this rank's configuration by dotted key.
    """
    first, *others = world.all_gather(dict(mine))
    for rank, theirs in enumerate(others, 1):
        for key in dict.fromkeys([*first, *theirs]):
            here, there = first.get(key, "absent"), theirs.get(key, "absent")
            if here != there:
                raise UsageError(
                    f"rank {rank} was started with another configuration: {key} is {there!r} "
                    f"there and {here!r} on rank 0; give every rank the same run file and settings"
                )
