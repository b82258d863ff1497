"""The command `switokd train`: starts one process per rank on this machine.

Not covered: what a rank does (`cli/worker.py`); several machines (torchrun starts the ranks).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from switokd.cli.arguments import RunFile, Settings, fail
from switokd.errors import SwitokdError
from switokd.runtime.environment import ProcessLayout

if TYPE_CHECKING:
    from switokd.config.config import Config

PROCESSES_HELP = (
    "Number of processes, for placement=replicated or placement=auto. Any other placement fixes "
    "the number."
)


def train(
    recipe: RunFile,
    settings: Settings = None,
    processes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--processes", "-n", min=1, help=PROCESSES_HELP),
    ] = None,
) -> None:
    """Train the networks of a recipe or run file on this machine.

    For example:

    switokd train digits-2t1s schedule.epochs=5 run_dir=runs/first

    Starts one process per network, or as many as placement and networks.NAME.ranks need.
    placement=replicated starts one process per GPU, and a single one without GPUs;
    placement=auto chooses the fastest number. Prints a line per epoch with the test accuracies and
    a table at the end. Writes weights, curves and decisions into the run folder.

    On several machines, or to choose the processes yourself, use torchrun:

    torchrun --nproc-per-node=N -m switokd.train RECIPE_OR_FILE [KEY.KEY=VALUE]...
    """
    # Imported here: `switokd --help` needs none of these.
    from switokd.cli.worker import run_rank
    from switokd.config.run_file import load_importable
    from switokd.planning.processes import processes_for
    from switokd.runtime.environment import check_alone, check_world_size, environment

    env = environment()
    if env.under_torchrun:
        run_rank(recipe, settings or [])
        return
    layouts: Sequence[ProcessLayout] = ()
    try:
        config = load_importable(recipe, settings or [])
        needed = config.world_size
        if needed and processes:
            command = shlex.join([recipe, *(settings or [])])
            requested = replace(env, world_size=processes)
            check_world_size(needed, config.topology.name, command, requested)
        count = needed or processes
        if count is None:
            count, layouts = processes_for(config)
        if config.coordinator.address == "off":
            check_alone(replace(env, world_size=count))
        config.check_batch(count)
    except SwitokdError as error:
        fail(error)
    if count == 1:
        run_rank(recipe, settings or [])
        return
    try:
        raise typer.Exit(_launch(config, count, [recipe, *(settings or [])], layouts))
    except SwitokdError as error:
        fail(error)


def _launch(
    config: Config, processes: int, arguments: Sequence[str], layouts: Sequence[ProcessLayout]
) -> int:
    """Start the coordinator and the ranks; return the exit code of the run."""
    from switokd.coordination.process import coordinator_process
    from switokd.runs.curves import draw_curves
    from switokd.runtime.environment import Environment
    from switokd.runtime.launcher import launch

    env = Environment(world_size=processes, local_world_size=processes)
    with ExitStack() as stack:
        coordinator = None
        if config.coordinator.address == "auto":
            coordinator = stack.enter_context(coordinator_process(config, env))

        def while_importing() -> Mapping[str, object]:
            import matplotlib.figure  # noqa: F401 needed at the end, and this process is idle

            return asdict(coordinator()) if coordinator else {}

        return launch(processes, arguments, layouts, while_importing, draw_curves)
