"""The command `switokd train`: starts one process per rank on this machine.

Not covered: what a rank does (`cli/worker.py`); several machines (torchrun starts the ranks).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from switokd.cli.arguments import OptionalRunFile, Settings, Verbose, fail, number_option
from switokd.config.run_folders import config_file
from switokd.errors import SwitokdError, UsageError
from switokd.runtime.environment import Environment, ProcessLayout
from switokd.runtime.lifecycle import end_with_parent
from switokd.runtime.log import identify, log_output

if TYPE_CHECKING:
    from switokd.config.config import Config

PROCESSES_HELP = (
    "Number of processes, for placement=replicated or placement=auto. Any other placement fixes "
    "the number."
)

MAX_RESTARTS_HELP = (
    "How often a run that has lost a process starts again by itself, from its last checkpoint."
)


def train(
    recipe: OptionalRunFile = None,
    settings: Settings = None,
    processes: Annotated[
        Optional[int],  # noqa: UP045
        number_option(1, names=("--processes", "-n"), help=PROCESSES_HELP),
    ] = None,
    resume: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="RUN", help="Continue the run in this folder from its checkpoint."),
    ] = None,
    max_restarts: Annotated[int, number_option(0, help=MAX_RESTARTS_HELP)] = 3,
    verbose: Verbose = False,
) -> None:
    """Train the networks of a recipe or run file on this machine.

    For example:

    switokd train digits-2t1s schedule.epochs=5 run_dir=runs/first

    Starts one process per network, or as many as placement and networks.NAME.ranks need.
    placement=replicated starts one process per GPU, and a single one without GPUs;
    placement=auto chooses the fastest number. Prints a line per epoch with the test accuracies and
    a table at the end. Writes weights, curves and decisions into the run folder.

    To continue a run that was interrupted, or to train it for longer:

    switokd train --resume runs/first schedule.epochs=10

    On several machines, or to choose the processes yourself, use torchrun:

    torchrun --nproc-per-node=N -m switokd.train RECIPE_OR_FILE [KEY.KEY=VALUE]...
    """
    # Imported here: `switokd --help` needs none of these.
    from switokd.cli.worker import run_rank
    from switokd.runtime.console import outlive_console
    from switokd.runtime.environment import environment

    log_output()
    outlive_console()
    end_with_parent()
    try:
        env = environment()
        recipe, settings = _to_resume(recipe, settings or [], resume)
        if env.under_torchrun:
            run_rank(recipe, settings)
            return
        config, world_size, layouts = _check(recipe, settings, processes, env)
        if world_size > 1:
            arguments = [recipe, *settings]
            raise typer.Exit(_launch(config, world_size, arguments, layouts, max_restarts))
    except SwitokdError as error:
        fail(error)
    run_rank(recipe, settings)


def _check(
    recipe: str, settings: list[str], processes: int | None, env: Environment
) -> tuple[Config, int, Sequence[ProcessLayout]]:
    """Return the configuration, the number of ranks and what `placement: auto` may choose from.

    UsageError if these do not fit together.
    """
    from switokd.config.run_file import load_importable
    from switokd.data.catalog import check_present
    from switokd.planning.processes import processes_for
    from switokd.runs.run_dir import check_run_dir
    from switokd.runtime.environment import check_alone, check_world_size
    from switokd.runtime.threads import fix_threads

    layouts: Sequence[ProcessLayout] = ()
    config = load_importable(recipe, settings)
    if config.compute.micro_batches > 1:
        fix_threads()  # before the number of processes decides about the threads of each
    needed = config.world_size
    if needed and processes:
        command = shlex.join([recipe, *settings])
        check_world_size(needed, config.topology.name, command, replace(env, world_size=processes))
    world_size = needed or processes
    if world_size is None:
        world_size, layouts = processes_for(config)
    if config.coordinator.address == "off":
        check_alone(replace(env, world_size=world_size))
    config.check_batch(world_size)
    check_run_dir(config)
    check_present(config.data)
    return config, world_size, layouts


def _to_resume(
    recipe: str | None, settings: list[str], resume: Path | None
) -> tuple[str, list[str]]:
    """Return run file and settings; with --resume, those that continue the run in this folder."""
    if resume is None:
        if recipe is None:
            raise UsageError("name a recipe (see 'switokd recipes') or a run file, or --resume RUN")
        return recipe, settings
    if recipe is not None and "=" not in recipe:
        raise UsageError(f"--resume takes the run file from {resume}: leave {recipe!r} out")
    try:
        file = config_file(resume)
    except UsageError as error:
        raise UsageError(f"--resume {error}") from None
    given = [recipe] if recipe else []
    return str(file), [*given, *settings, *_settings_to_continue(resume)]


def _settings_to_continue(folder: Path) -> list[str]:
    """Return the settings with which a run goes on in its folder."""
    return [f"run_dir={json.dumps(str(folder))}", "resume=auto"]


def _launch(
    config: Config,
    processes: int,
    arguments: Sequence[str],
    layouts: Sequence[ProcessLayout],
    max_restarts: int,
) -> int:
    """Start the coordinator and the ranks, again if the job loses one; return the exit code."""
    from switokd.coordination.probe import probing
    from switokd.coordination.process import coordinator_process
    from switokd.runs.curves import draw_curves
    from switokd.runtime.launcher import Job, launch

    env = Environment(world_size=processes, local_world_size=processes)
    identify(run=config.name)
    with ExitStack() as stack:
        stack.enter_context(probing(config.coordinator))
        coordinator = None
        if config.coordinator.address == "auto":
            coordinator = stack.enter_context(coordinator_process(config, env))

        def while_importing() -> Mapping[str, object]:
            import matplotlib.figure  # noqa: F401 needed at the end, and this process is idle

            return asdict(coordinator()) if coordinator else {}

        job = Job(
            world_size=processes,
            arguments=arguments,
            layouts=layouts,
            wait_for_coordinator=cache(while_importing),  # the same one for every start
            draw=draw_curves,
            settings_to_continue=_settings_to_continue,
            max_restarts=max_restarts,
        )
        return launch(job)
