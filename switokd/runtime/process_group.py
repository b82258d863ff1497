"""Joins the ranks of a run into process groups.

Ranks that share a GPU exchange over Gloo and the host's memory, because NCCL allows one rank per
GPU.

Not covered: starting the processes (`launcher.py`).
"""

from __future__ import annotations

import os
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
from switokd.runtime.environment import Environment, restart_count
from switokd.runtime.phase import ACTIVITY
from switokd.runtime.waiting import PeerWatch, waiting

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""Timeout of collectives during set-up and evaluation, where ranks' work may be unequal."""


@dataclass(frozen=True)
class World:
    """This rank, its device, and its process groups."""

    env: Environment
    device: torch.device
    timeout: timedelta = timedelta(minutes=1)
    """Timeout of the collectives in a step."""
    backend: str = "gloo"
    """Backend of the collectives in a step: nccl if every rank has its own GPU, else gloo."""
    steps: dist.ProcessGroup | None = None
    """Group of all ranks for the collectives in a step; None in a run of one process."""
    sharing: int = 1
    """Number of ranks that share this rank's GPU; meaningless on a CPU."""
    store: Store | None = None
    """Where the ranks have met; None in a run of one process."""

    @property
    def transport(self) -> torch.device | None:
        """Device that the collectives of a step need their tensors on; None: the rank's device."""
        via_host = self.device.type == "cuda" and self.backend == "gloo"
        return torch.device("cpu") if via_host and self.env.world_size > 1 else None

    @property
    def is_silent(self) -> bool:
        """Whether a collective that hangs raises no error here, but ends the process (NCCL)."""
        return self.backend == "nccl"

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Create a group of ranks for the collectives in a step; None for a single rank.

        Every rank must call this for every group. The group of all ranks exists already and is
        reused: a second one would cost each rank a thread and connections, and would never work
        at the same time as the first one.
        """
        if len(ranks) == 1:
            return None
        if self.steps is not None and len(ranks) == self.env.world_size:
            return self.steps
        # NCCL's watchdog ends the process without a message. The longer timeout lets the
        # coordinator report the reason first, which it learns from `watchdog.Watchdog`.
        timeout = 2 * self.timeout if self.backend == "nccl" else self.timeout
        group = dist.new_group(list(ranks), timeout=timeout, backend=self.backend)
        return group if isinstance(group, dist.ProcessGroup) else None

    @contextmanager
    def first(self, ranks: int) -> Iterator[World]:
        """Yield a world of the first `ranks` ranks, for the body of the `with` statement.

        Every rank must call this; the other ranks must not use the yielded world. The group is
        destroyed at the end, unless the body fails, because its threads would run on.
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
        """Return the objects of all ranks, in rank order."""
        if self.env.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.env.world_size
        with collective_errors("waiting for the other ranks", PATIENCE):
            dist.all_gather_object(everyone, mine)
        return everyone

    def gather(self, mine: Any) -> list[Any]:
        """Return the objects of all ranks on rank 0, an empty list on the other ranks."""
        if self.env.world_size == 1:
            return [mine]
        everyone: list[Any] | None = [None] * self.env.world_size if self.rank == 0 else None
        with collective_errors("waiting for the other ranks", PATIENCE):
            dist.gather_object(mine, everyone)
        return everyone or []

    def scatter(self, rank_0s: Sequence[Any] | None) -> Any:
        """Return this rank's object of rank 0's list; the other ranks pass None."""
        if self.env.world_size == 1:
            assert rank_0s is not None
            return rank_0s[0]
        mine: list[Any] = [None]
        with collective_errors("waiting for rank 0", PATIENCE):
            dist.scatter_object_list(mine, None if rank_0s is None else list(rank_0s))
        return mine[0]

    def broadcast(self, rank_0s: Any) -> Any:
        """Return rank 0's object on every rank."""
        if self.env.world_size == 1:
            return rank_0s
        carrier = [rank_0s]
        with collective_errors("waiting for rank 0", PATIENCE):
            dist.broadcast_object_list(carrier)
        return carrier[0]

    def publish(self, key: str, text: str) -> None:
        """Let the other ranks `read` a text; does not wait for them."""
        if self.store is not None:
            self.store.set(f"text/{key}", text)

    def read(self, key: str, seconds: float) -> str | None:
        """Wait for a text that a rank publishes; None if none comes in time."""
        if self.store is None:
            return None
        try:
            with ACTIVITY.waiting(seconds):
                self.store.wait([f"text/{key}"], timedelta(seconds=seconds))
        except RuntimeError:  # DistStoreError
            return None
        return self.store.get(f"text/{key}").decode()

    def on_rank_0(self, make: Callable[[], T]) -> T | None:
        """Return the result of `make` on rank 0, None elsewhere.

        A SwitokdError that `make` raises is raised on every rank.
        """
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
def collective_errors(doing: str, limit: timedelta | None = None) -> Iterator[None]:
    """Turn the failure of a collective into a CollectiveError, and note that the rank waits.

    doing: describes what the rank was doing. limit: the collective's timeout; None: that of the
    collectives in a step.
    """
    try:
        with ACTIVITY.waiting(limit.total_seconds() if limit else None):
            yield
    except torch.OutOfMemoryError:  # not a failure of the collective
        raise
    except (RuntimeError, ValueError) as error:
        # A message of Gloo begins with a source line and ends with advice.
        reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip()).splitlines()[0]
        raise CollectiveError(doing, reason.partition(". ")[0]) from error


@contextmanager
def join_world(env: Environment, device: torch.device, timeout: float) -> Iterator[World]:
    """Join the process groups; leave them at the end, unless the body fails.

    The default group exchanges Python objects and waits up to PATIENCE, so it uses Gloo. The
    collectives of a step have their own group. After a failure the groups are not left, because
    leaving would wait for lost peers. timeout: of the collectives in a step, in seconds.
    PeerError if a rank does not join.
    """
    if env.world_size == 1:
        yield World(env, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mine = _identity(device)
    with collective_errors("joining the process group", PATIENCE):
        store = _store(env)
        _meet(store.clone(), env)
        dist.init_process_group("gloo", None, PATIENCE, env.world_size, env.rank, store=store)
        world = World(env, device, timedelta(seconds=timeout), store=store)
        everyone = world.all_gather(mine)
        world = replace(world, backend=_backend(everyone), sharing=everyone.count(mine))
        world = replace(world, steps=world.group(range(env.world_size)))
    watch = PeerWatch(store.clone(), env.rank, env.world_size, timeout)
    yield world
    watch.stop()
    dist.destroy_process_group()


def _store(env: Environment) -> Store:
    """Return the store in which the ranks meet.

    Its prefix separates it from a larger world that the same ranks may have left, and from the
    processes that torchrun has started before: it keeps its store when it starts them again.
    """
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    what = f"the store of the ranks at {address}"
    hint = "are all machines' commands started, with the same address?"
    with waiting(what, PATIENCE.total_seconds(), hint):
        store, _, _ = next(rendezvous("env://", env.rank, env.world_size, timeout=PATIENCE))
    return PrefixStore(f"of {env.world_size}, restart {restart_count()}", store)


def _meet(store: Store, env: Environment) -> None:
    """Wait until all ranks are here, and name those that are not."""
    store.set(f"here/{env.rank}", "")
    keys = [f"here/{rank}" for rank in range(env.world_size)]
    looker = store.clone()  # the other one serves the wait

    def missing() -> str:
        late = [f"rank {rank}" for rank, key in enumerate(keys) if not looker.check([key])]
        return f"{', '.join(late[:4])}{' and others' * (len(late) > 4)} to join the run"

    with waiting(missing, PATIENCE.total_seconds()):
        store.wait(keys, PATIENCE)


def _identity(device: torch.device) -> str:
    """Identify a GPU by its machine and UUID; an empty string for a CPU."""
    if device.type != "cuda":
        return ""
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def _backend(identities: Sequence[str]) -> str:
    """Choose NCCL if every rank has its own GPU, else Gloo."""
    return "nccl" if all(identities) and len(set(identities)) == len(identities) else "gloo"


def check_same_configuration(world: World, mine: Mapping[str, Any]) -> None:
    """Raise UsageError if a rank's configuration differs from that of rank 0.

    The message names the first such rank and key. mine: this rank's configuration by dotted key.
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
