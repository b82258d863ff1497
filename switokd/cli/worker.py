"""One rank of a run: the command line of `python -m switokd.train`.

Torch is imported only after the run file has been read, so that a mistake in the file shows
at once.

Not covered: training itself (`switokd/worker.py`).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from switokd.cli.arguments import EPILOG, RunFile, Settings
from switokd.config.run_file import load_importable
from switokd.runtime.environment import (
    ProcessLayout,
    check_alone,
    check_world_size,
    environment,
)
from switokd.runtime.lifecycle import one_line_errors
from switokd.runtime.threads import wait_briefly


def worker_main() -> None:
    """Run the command line of `python -m switokd.train`, which torchrun starts once per rank."""
    wait_briefly()
    worker = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @worker.command(epilog=EPILOG)
    def rank(
        recipe: RunFile,
        settings: Settings = None,
        layouts: Annotated[str, typer.Option(hidden=True)] = "",  # set by `switokd train`
    ) -> None:
        """Train the networks of one rank; torchrun starts this command once per rank.

        torchrun --standalone --nproc-per-node=3 -m switokd.train digits-2t1s [KEY.KEY=VALUE]...

        A run of one process needs no torchrun:

        python -m switokd.train digits-2t1s placement=replicated coordinator=off

        Writes the run folder that run_dir names; see 'switokd train --help'.
        """
        run_rank(
            recipe, settings or [], [ProcessLayout.of(code) for code in layouts.split(",") if code]
        )

    worker(prog_name="torchrun ... -m switokd.train")


def run_rank(recipe: str, settings: list[str], layouts: Sequence[ProcessLayout] = ()) -> None:
    """Train as one rank; an error is printed in one line and ends the process.

    layouts: numbers of processes and threads that `placement: auto` may choose from.
    """
    env = replace(environment(), layouts=tuple(layouts))
    with one_line_errors(env):
        config = load_importable(recipe, settings)
        needed = config.world_size or env.world_size
        check_world_size(needed, config.topology.name, shlex.join([recipe, *settings]), env)
        if config.coordinator.address == "off":
            check_alone(env)
    with one_line_errors(env, config.who(env.rank, env.world_size)):
        from switokd import worker

        worker.train(config, env)
