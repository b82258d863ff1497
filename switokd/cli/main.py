"""The command `switokd`, and the worker behind `python -m switokd.train`.

Torch is imported only by what trains, so that `switokd coordinator` needs none of it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, NoReturn, Optional

import typer

from switokd import __version__
from switokd.cli.check import check
from switokd.cli.compare import compare
from switokd.cli.export import export, predict
from switokd.cli.networks import networks
from switokd.cli.plan import plan
from switokd.config.base import Section
from switokd.config.config import known_settings
from switokd.config.recipes import recipe_text, recipes
from switokd.config.run_file import load, load_importable
from switokd.errors import SwitokdError
from switokd.plugins import import_callable
from switokd.runtime.environment import ProcessLayout
from switokd.runtime.threads import wait_briefly

EPILOG = (
    "Exit codes: 0 done, 2 a mistake in run file, arguments or data, 3 a network diverged, "
    "4 a process of the run was lost."
)

app = typer.Typer(
    help="Networks that train each other by switchable online knowledge distillation.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunFile = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE_OR_FILE", help="A recipe's name (see 'switokd recipes') or a run file."
    ),
]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045, typer reads it at run time, on Python 3.10 as well
    typer.Argument(
        metavar="KEY.KEY=VALUE",
        help="Settings on top of the file, such as schedule.epochs=3 or "
        "networks.student.model=wrn-16-1; see 'switokd settings'.",
    ),
]


@app.command(epilog=EPILOG)
def train(
    recipe: RunFile,
    settings: Settings = None,
    processes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--processes", "-n", min=1, help="How many, for placement=replicated or auto."
        ),
    ] = None,
) -> None:
    """Train a recipe or run file: starts the processes that it needs on this machine.

    That is one per network, unless placement or networks.NAME.ranks say otherwise; for
    placement=replicated or auto one per GPU, without GPUs a single one (replicated) or as many as
    are fastest (auto). On several machines, or to choose the processes yourself, use torchrun:
    torchrun --nproc-per-node=N -m switokd.train RECIPE_OR_FILE [KEY.KEY=VALUE]...
    """
    from switokd.runtime.environment import check_alone, check_world_size, environment
    from switokd.runtime.launcher import launch, processes_for

    env = environment()
    if env.under_torchrun:
        _work(recipe, settings or [])
        return
    layouts: Sequence[ProcessLayout] = ()
    try:
        config = load_importable(recipe, settings or [])
        needed = config.world_size
        if needed and processes:
            command = shlex.join([recipe, *(settings or [])])
            found = replace(env, world_size=processes)
            check_world_size(needed, config.topology.name, command, found)
        count = needed or processes
        if count is None:
            count, layouts = processes_for(config)
        if config.coordinator.address == "off":
            check_alone(replace(env, world_size=count))
        config.check_batch(count)
    except SwitokdError as error:
        _fail(error)
    if count == 1:
        _work(recipe, settings or [])
        return
    raise typer.Exit(launch(config, count, [recipe, *(settings or [])], layouts))


app.command(epilog=EPILOG)(plan)
app.command(epilog=EPILOG)(check)
app.command(epilog=EPILOG)(export)
app.command(epilog=EPILOG)(predict)
app.command()(networks)
app.command(epilog=EPILOG)(compare)


@app.command()
def coordinator(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0: a free one.")] = 50051,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of /metrics and /healthz; 0: a free one.")
    ] = 9464,
    strategy: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="PACKAGE.MODULE:CALLABLE",
            help="A strategy of your own that runs may name; may be given several times.",
        ),
    ] = None,
    follow_stdin: Annotated[
        bool,
        typer.Option("--follow-stdin", hidden=True, help="Stop when standard input is closed."),
    ] = False,
) -> None:
    """Run the coordinator alone, for runs with coordinator.address=HOST:PORT.

    Prints one JSON line with its addresses when it is ready. It asks nobody who they are: listen
    only where every peer is trusted.
    """
    from switokd.services.coordinator.server import serve

    level = logging.ERROR if follow_stdin else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    try:
        sys.path.append(os.getcwd())  # your own strategies, as in training
        for name in strategy or []:
            import_callable(name, "--strategy")
        asyncio.run(serve(host, port, http_port, follow_stdin, strategy or []))
    except SwitokdError as error:
        _fail(error)


@app.command("recipes")
def list_recipes(
    name: Annotated[Optional[str], typer.Argument(help="Print this recipe's run file.")] = None,  # noqa: UP045
) -> None:
    """List the run files that ship with switokd, or print one to start your own from."""
    try:
        if name is not None:
            print(recipe_text(name), end="")
            return
        width = max(len(each) for each in recipes())
        for each in recipes():
            config = load(each)
            print(f"{each:<{width}}  {config.topology.name}  {config.description}")
    except SwitokdError as error:
        _fail(error)


@app.command()
def settings() -> None:
    """List every setting of a run file with its default and meaning."""
    for key, field in known_settings():
        if isinstance(field.default, Section) or key in ("networks", "pairs"):
            print(f"\n# {field.description or key}")
            continue
        default = "" if field.is_required() else json.dumps(field.default)
        print(f"{key:<37} {default:<14} {field.description or ''}".rstrip())


def _version(wanted: bool) -> None:
    if wanted:
        print(f"switokd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the command `switokd`."""
    wait_briefly()
    app()


def worker_main() -> None:
    """Entry point of `python -m switokd.train`, one rank."""
    wait_briefly()
    worker = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @worker.command(epilog=EPILOG)
    def rank(
        recipe: RunFile,
        settings: Settings = None,
        layouts: Annotated[str, typer.Option(hidden=True)] = "",  # by `switokd train`
    ) -> None:
        """Train one rank's networks; started once per rank by torchrun.

        torchrun --standalone --nproc-per-node=3 -m switokd.train digits-2t1s [KEY.KEY=VALUE]...

        A run of one process needs no torchrun:
        python -m switokd.train digits-2t1s placement=replicated coordinator=off
        """
        _work(
            recipe, settings or [], [ProcessLayout.of(code) for code in layouts.split(",") if code]
        )

    worker(prog_name="torchrun ... -m switokd.train")


def _work(recipe: str, settings: list[str], layouts: Sequence[ProcessLayout] = ()) -> None:
    """One rank, from arguments to exit code."""
    from switokd.runtime.environment import check_alone, check_world_size, environment
    from switokd.runtime.lifecycle import one_line_errors

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


def _fail(error: SwitokdError) -> NoReturn:
    print(f"switokd: {error}", file=sys.stderr)
    raise typer.Exit(error.exit_code)
