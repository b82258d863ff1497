"""One rank of a run: the command line of `python -m switokd.train`.

Torch is imported only after the run file has been read, so that a mistake in the file shows
at once.

Not covered: training itself (`switokd/worker.py`).
"""

from __future__ import annotations

import json
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from switokd.cli.arguments import EPILOG, RunFile, Settings
from switokd.config.run_file import load_importable
from switokd.coordination.membership import Endpoint
from switokd.coordination.process import coordinator_process
from switokd.errors import PeerError
from switokd.runs.curves import drawing_process
from switokd.runtime.environment import (
    ProcessLayout,
    check_alone,
    check_world_size,
    environment,
    started,
)
from switokd.runtime.lifecycle import follow_launcher, one_line_errors
from switokd.runtime.threads import wait_briefly

if TYPE_CHECKING:
    from switokd.worker import Helpers


def worker_main() -> None:
    """Run the command line of `python -m switokd.train`, which torchrun starts once per rank."""
    wait_briefly()
    worker = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @worker.command(epilog=EPILOG)
    def rank(
        recipe: RunFile,
        settings: Settings = None,
        layouts: Annotated[str, typer.Option(hidden=True)] = "",  # set by `switokd train`
        fork: Annotated[int, typer.Option(hidden=True)] = 0,
        launcher: Annotated[int, typer.Option(hidden=True)] = -1,
        coordinator: Annotated[str, typer.Option(hidden=True)] = "",
    ) -> None:
        """Train the networks of one rank; torchrun starts this command once per rank.

        torchrun --standalone --nproc-per-node=3 -m switokd.train digits-2t1s [KEY.KEY=VALUE]...

        A run of one process needs no torchrun:

        python -m switokd.train digits-2t1s placement=replicated coordinator=off

        Writes the run folder that run_dir names; see 'switokd train --help'.
        """
        allowed = [ProcessLayout.of(code) for code in layouts.split(",") if code]
        if fork:
            fork_ranks(recipe, settings or [], allowed, fork, socket.socket(fileno=launcher))
        else:
            endpoint = Endpoint(**json.loads(coordinator)) if coordinator else None
            run_rank(recipe, settings or [], allowed, endpoint)

    worker(prog_name="torchrun ... -m switokd.train")


def fork_ranks(
    recipe: str,
    settings: list[str],
    layouts: Sequence[ProcessLayout],
    world_size: int,
    launcher: socket.socket,
) -> None:
    """Import PyTorch, start the ranks of `switokd train`, and end with the run's exit code.

    launcher: sends the coordinator's addresses, and receives the run folder to draw.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to print before the ranks start
    config = load_importable(recipe, settings)
    from switokd import worker
    from switokd.runtime.fork import start_ranks, wait_for_ranks

    with launcher.makefile(encoding="utf-8") as messages:
        message = messages.readline()
    if not message:
        raise typer.Exit(PeerError.exit_code)  # the launcher is gone, or has printed an error
    addresses = json.loads(message)
    endpoint = Endpoint(**addresses) if addresses else None
    options = [f"--layouts={','.join(layout.code for layout in layouts)}"] if layouts else []
    options += [f"--coordinator={message.strip()}"] if endpoint else []
    command = [sys.executable, "-u", "-m", "switokd.train", *options, recipe, *settings]
    started = start_ranks(world_size, launcher, command)
    if started:
        ranks, _store = started
        raise typer.Exit(wait_for_ranks(ranks, launcher, lambda rank: config.who(rank, world_size)))
    follow_launcher(environment())

    def send(message: str, folder: Path) -> None:
        launcher.sendall(json.dumps({message: str(folder)}).encode() + b"\n")

    to_launcher = worker.Helpers(draw=partial(send, "draw"), on_folder=partial(send, "folder"))
    run_rank(recipe, settings, layouts, endpoint, to_launcher)


def run_rank(
    recipe: str,
    settings: list[str],
    layouts: Sequence[ProcessLayout] = (),
    endpoint: Endpoint | None = None,
    helpers: Helpers | None = None,
) -> None:
    """Train as one rank; an error is printed in one line and ends the process.

    layouts: numbers of processes and threads that `placement: auto` may choose from. endpoint: the
    coordinator, if the launcher has started one. helpers: what the launcher does. Rank 0 starts a
    process for the coordinator or the drawing if these are None.
    """
    env = replace(environment(), layouts=tuple(layouts), started=started())
    with one_line_errors(env):
        config = load_importable(recipe, settings)
        needed = config.world_size or env.world_size
        check_world_size(needed, config.topology.name, shlex.join([recipe, *settings]), env)
        if config.coordinator.address == "off":
            check_alone(env)
    with one_line_errors(env, config.who(env.rank, env.world_size)), ExitStack() as stack:
        wait_for_coordinator: Callable[[], Endpoint] | None = None
        draw: Callable[[Path], object] | None = None
        if env.rank == 0:  # these processes start while this one imports PyTorch
            draw = helpers.draw if helpers else stack.enter_context(drawing_process())
            if endpoint is not None:
                wait_for_coordinator = partial(replace, endpoint)
            elif config.coordinator.address == "auto":
                wait_for_coordinator = stack.enter_context(coordinator_process(config, env))
        from switokd import worker

        helpers = helpers or worker.Helpers()
        if draw:
            helpers = replace(helpers, wait_for_coordinator=wait_for_coordinator, draw=draw)
        worker.train(config, env, helpers)
