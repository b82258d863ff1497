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
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switokd.cli.arguments import EPILOG, RunFile, Settings, Verbose
from switokd.cli.commands import CliCommand
from switokd.config.run_file import load_importable
from switokd.coordination.membership import Endpoint
from switokd.coordination.probe import probing
from switokd.coordination.process import coordinator_process
from switokd.coordination.tokens import hide_token
from switokd.errors import PeerError
from switokd.runs.curves import drawing_process
from switokd.runtime.console import accept_any_console, outlive_console
from switokd.runtime.environment import (
    Environment,
    ProcessLayout,
    check_alone,
    check_world_size,
    environment,
    started,
)
from switokd.runtime.heartbeat_file import heartbeat_file
from switokd.runtime.interpreter import python_command, start_fork_server
from switokd.runtime.lifecycle import follow_launcher, one_line_errors, print_warning
from switokd.runtime.log import identify, log_output, set_up
from switokd.runtime.threads import drop_unusable_threads, wait_briefly

if TYPE_CHECKING:
    from switokd.worker import Helpers


def worker_main() -> None:
    """Run the command line of `python -m switokd.train`, which torchrun starts once per rank."""
    accept_any_console()
    set_up(sys.argv)
    drop_unusable_threads(print_warning)
    wait_briefly()
    worker = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @worker.command(epilog=EPILOG, cls=CliCommand)
    def rank(
        recipe: RunFile,
        settings: Settings = None,
        layouts: Annotated[str, typer.Option(hidden=True)] = "",  # set by `switokd train`
        fork: Annotated[int, typer.Option(hidden=True)] = 0,
        launcher: Annotated[int, typer.Option(hidden=True)] = -1,
        coordinator: Annotated[str, typer.Option(hidden=True)] = "",
        verbose: Verbose = False,
    ) -> None:
        """Train the networks of one rank; torchrun starts this command once per rank.

        torchrun --standalone --nproc-per-node=3 -m switokd.train digits-2t1s [KEY.KEY=VALUE]...

        A run of one process needs no torchrun:

        python -m switokd.train digits-2t1s placement=replicated coordinator=off

        Writes the run folder that run_dir names; see 'switokd train --help'.
        """
        log_output()
        outlive_console()
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

    launcher: sends a line per start of the ranks (`launcher.py`), and receives the run folder to
    draw. After a run that has lost a process, this one stays for the next start if the launcher
    wants it, and imports nothing again.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to print before the ranks start
    config = load_importable(recipe, settings)
    from switokd import worker

    def send(message: str, folder: Path) -> None:
        launcher.sendall(json.dumps({message: str(folder)}).encode() + b"\n")

    code = PeerError.exit_code  # the launcher is gone, or has printed an error
    while start := _next_start(launcher):
        to_start = [*settings, *start["settings"]]
        endpoint = Endpoint(**start["coordinator"]) if start["coordinator"] else None
        options = [f"--layouts={','.join(layout.code for layout in layouts)}"] if layouts else []
        options += [f"--coordinator={json.dumps(start['coordinator'])}"] if endpoint else []
        command = [*python_command("switokd.train"), *options, recipe, *to_start]
        ended = _run_ranks(
            world_size, launcher, command, partial(config.who, world_size=world_size)
        )
        if ended is None:
            follow_launcher(environment())
            helpers = worker.Helpers(draw=partial(send, "draw"), on_folder=partial(send, "folder"))
            run_rank(recipe, to_start, layouts, endpoint, helpers)
            return
        code = ended
        if code != PeerError.exit_code or not start["again"]:
            break
        with suppress(BrokenPipeError):
            launcher.sendall(json.dumps({"lost": code}).encode() + b"\n")
    raise typer.Exit(code)


def _next_start(launcher: socket.socket) -> dict[str, Any] | None:
    """Wait for the launcher's next start; None if there is none."""
    with launcher.makefile(encoding="utf-8") as messages:
        line = messages.readline()
    return json.loads(line) if line else None


def _run_ranks(
    world_size: int, launcher: socket.socket, command: list[str], who: Callable[[int], str]
) -> int | None:
    """Start the ranks and wait for them; return the exit code, or None in a forked rank.

    Signals end this process at once before and afterwards.
    """
    from switokd.runtime.fork import StoreProcess, start_ranks, wait_for_ranks

    if (started := start_ranks(world_size, launcher, command)) is None:
        return None
    ranks, store = started
    process = store if isinstance(store, StoreProcess) else None
    code = wait_for_ranks(ranks, launcher, who, process)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if process:
        process.close()
    return code


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
    hide_token()
    with one_line_errors(Environment()):
        env = replace(environment(), layouts=tuple(layouts), started=started())
    with one_line_errors(env):
        config = load_importable(recipe, settings)
        needed = config.world_size or env.world_size
        check_world_size(needed, config.topology.name, shlex.join([recipe, *settings]), env)
        if config.coordinator.address == "off":
            check_alone(env)
        if config.data.workers:
            start_fork_server()
    identify(config.name, env.rank)
    with one_line_errors(env, config.who(env.rank, env.world_size)), ExitStack() as stack:
        stack.enter_context(heartbeat_file(env.rank))
        wait_for_coordinator: Callable[[], Endpoint] | None = None
        draw: Callable[[Path], object] | None = None
        if env.rank == 0 and not helpers:  # the launcher has said it
            stack.enter_context(probing(config.coordinator))
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
