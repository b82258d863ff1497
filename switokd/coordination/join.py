"""Connects a rank to what decides for it: the coordinator, or a decider in its own process.

Not covered: the deciders (`client.py`, `local.py`), the coordinator's process (`process.py`).
"""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from switokd.config.config import Config
from switokd.coordination.addresses import choose_address
from switokd.coordination.client import Client
from switokd.coordination.command_file import append_command, read_commands
from switokd.coordination.decider import Decider
from switokd.coordination.local import LocalDecider
from switokd.coordination.membership import Endpoint, Membership
from switokd.coordination.process import coordinator_process
from switokd.distillation.decision import Decision
from switokd.errors import CollectiveError, PeerError, UsageError, first_line
from switokd.runtime.durable import replace_file
from switokd.runtime.lifecycle import (
    Preempted,
    Terminated,
    end_if_stuck,
    ignore_sigterm,
    print_warning,
    unwind_on_sigterm,
)
from switokd.runtime.log import identify
from switokd.runtime.placement import Placement
from switokd.runtime.process_group import World
from switokd.runtime.usage import USAGE

OnDecision = Callable[[Decision], None]

IDENTITY = "run.json"
"""File in the run folder with the run's id and secret, how often its processes were started, and
where its coordinator is."""

SECRET_BYTES = 32


class Start(NamedTuple):
    """One start of a run's processes."""

    run_id: str
    epoch: int
    """Its number, from 1."""
    address: str
    """Of the coordinator."""
    secret: bytes
    """Of the run."""


@dataclass(frozen=True)
class Joining:
    """What a rank needs to join its run."""

    config: Config
    world: World
    placement: Placement
    wait_for_coordinator: Callable[[], Endpoint] | None = None
    """Waits for the coordinator that this command has started; None if it has started none."""
    first_step: int = 1
    """The step that is decided first."""


@contextmanager
def join_decider(
    joining: Joining, on_decision: OnDecision, folder: Path | None = None
) -> Iterator[tuple[Decider, str]]:
    """Connect to the coordinator, or decide in this process if the run file says so.

    Yields the decider, and a description of where it runs. on_decision: called for each decision.
    folder: the run folder, on rank 0.
    """
    config, world, wait = joining.config, joining.world, joining.wait_for_coordinator
    teachers = config.topology.teachers
    recorded = world.broadcast(world.on_rank_0(lambda: read_commands(folder, teachers)))
    record = partial(append_command, folder) if folder else lambda stamped: None
    if config.coordinator.address == "off":
        assert world.env.world_size == 1, "the configuration requires a coordinator otherwise"
        if not world.env.embedded:
            unwind_on_sigterm()
        decider = LocalDecider(config, on_decision)
        decider.commands.restore(recorded)
        yield decider, "no coordinator"
        return
    with ExitStack() as stack:
        if config.coordinator.address == "auto" and world.rank == 0 and not wait:
            wait = stack.enter_context(coordinator_process(config, world.env))
        membership = _agree(config, world, wait, folder)
        endpoint = membership.coordinator
        where = f"coordinator {endpoint}"
        if endpoint.http:
            where = f"status page http://{endpoint.http}/, metrics at /metrics"
        stack.enter_context(USAGE.watching(folder))
        client = stack.enter_context(_connected(membership, joining, on_decision))
        client.commands.restore(recorded, record)
        yield client, where


def _agree(
    config: Config,
    world: World,
    wait_for_coordinator: Callable[[], Endpoint] | None,
    folder: Path | None,
) -> Membership:
    """Return this rank's membership; all but the rank is the same on all ranks."""

    def choose() -> tuple[Endpoint, Start]:
        addresses = config.coordinator.address
        own: Endpoint | None = None
        if addresses == "auto":
            assert wait_for_coordinator is not None
            own = wait_for_coordinator()
            addresses = own.grpc
        start = next_start(folder, config.name, addresses)
        return own or Endpoint(start.address), start

    endpoint, start = world.broadcast(world.on_rank_0(choose))
    identify(run=start.run_id)
    return Membership(endpoint, start.run_id, world.rank, start.epoch, start.secret)


def next_start(folder: Path | None, name: str, addresses: str) -> Start:
    """Return the next start of a run, whose id and secret stay.

    Notes it in the run folder, in a file that only its owner may read. addresses: of coordinators,
    one of which the id chooses.
    UsageError if the folder cannot be written.
    """
    run_id, epoch = f"{name}-{uuid.uuid4().hex[:6]}", 0
    secret = secrets.token_bytes(SECRET_BYTES)
    if folder is None:
        return Start(run_id, epoch + 1, choose_address(addresses, run_id), secret)
    path = folder / IDENTITY
    try:
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            run_id, epoch = str(before["run_id"]), int(before["epoch"])
            secret = bytes.fromhex(before.get("secret", "")) or secret
        address = choose_address(addresses, run_id)
        noted = {"run_id": run_id, "epoch": epoch + 1, "coordinator": address}
        noted["secret"] = secret.hex()
        replace_file(path, (json.dumps(noted) + "\n").encode(), mode=0o600)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is damaged: remove it to continue the run") from None
    except OSError as error:
        raise UsageError(f"run_dir: {folder} cannot be written: {error.strerror}") from None
    return Start(run_id, epoch + 1, address, secret)


@contextmanager
def _connected(
    membership: Membership, joining: Joining, on_decision: OnDecision
) -> Iterator[Client]:
    """Yield a connected client; if the body fails, send the reason to the coordinator.

    This rank may notice a lost peer first as a failed collective, or as torchrun's SIGTERM. The
    coordinator may know the cause; in this case its PeerError is raised instead.
    """
    unwind_on_sigterm()  # also while the coordinator is waited for
    client = Client(
        membership,
        joining.config,
        joining.placement,
        on_decision=on_decision,
        on_failure=end_if_stuck(joining.placement.who(membership.rank)),
        first_step=joining.first_step,
        peers=joining.world,
        say=print_warning if membership.rank == 0 else lambda sentence: None,
    )
    try:
        yield client
    except Preempted:
        client.close(stopped=True)
        raise
    except (PeerError, Terminated) as error:
        ignore_sigterm()  # torchrun's SIGTERM may arrive before the coordinator's message
        reason = client.why(error.doing if isinstance(error, CollectiveError) else "")
        client.close(failure=str(error) or "stopped by SIGTERM")
        if reason is None:
            raise
        raise reason from error
    except BaseException as error:
        client.close(failure=first_line(error))
        raise
