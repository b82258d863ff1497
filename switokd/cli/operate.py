"""The commands `runs`, `status` and `watch`: asking a coordinator. Torch-free.

Not covered: telling a coordinator something; finding it (`finding.py`); tables (`run_tables.py`).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switokd.cli.arguments import fail, number_between, number_option
from switokd.errors import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    CoordinatorError,
    RunFailedError,
    SwitokdError,
)
from switokd.runtime.lifecycle import print_error

if TYPE_CHECKING:
    from switokd.cli.finding import Found

FINISHED_HELP = "Also runs that have ended and are only in the coordinator's journal."
MOST_HELP = "The most runs to list, those that started last first."
COORDINATOR_HELP = (
    "HOST:PORT of the coordinator, or several separated by commas. Default: that of the run "
    "folder, else SWITOKD_COORDINATOR, else 127.0.0.1:50051."
)
RUN_HELP = "A run folder, the id of a run, or the beginning of its id."
RUNS_JSON_HELP = "Print one JSON document."
WATCH_JSON_HELP = "Print one JSON document per update, each on a line."
INTERVAL_HELP = "Seconds between two updates, 0.1 or more."
RETRY_SECONDS = 10.0
"""How long `watch` looks for a coordinator that has gone away, such as one that is replaced."""
PAUSE_SECONDS = 0.3
SETTLE_SECONDS = 2.0
"""How long a folder without a process counts as that of a run that is just ending."""

View = dict[str, Any]

EPILOG = (
    "Exit codes: 0 success, 2 a mistake in the arguments, or no such run, 4 no coordinator "
    "answers, 5 the run that is watched has failed, 6 it was stopped before its last step."
)

CoordinatorOption = Annotated[
    str, typer.Option("--coordinator", metavar="HOST:PORT", help=COORDINATOR_HELP)
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)]


def runs(
    coordinator: CoordinatorOption = "",
    finished: Annotated[bool, typer.Option("--finished", help=FINISHED_HELP)] = False,
    most: Annotated[int, number_option(1, 1000, ("--most",), help=MOST_HELP)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help=RUNS_JSON_HELP)] = False,
) -> None:
    """List the runs of a coordinator.

    For example:

    switokd runs

    switokd runs --coordinator HOST:50051 --finished --json

    Prints one row per run. Of several coordinators, all are asked; one that does not answer is
    named, and the exit code is 4.
    """
    from switokd.cli.finding import addresses_of
    from switokd.coordination.operator_client import OperatorClient
    from switokd.services.coordinator.run_view import summary_view

    listed, silent, is_truncated = [], [], False
    try:
        for address in addresses_of(coordinator):
            try:
                with OperatorClient(address) as client:
                    answer = client.runs(finished, most)
            except CoordinatorError as error:
                silent.append((address, error))
                continue
            listed += [summary_view(run, address) for run in answer.runs]
            is_truncated |= answer.truncated
    except SwitokdError as error:
        fail(error)
    listed.sort(key=lambda run: -(run["started_at"] or 0.0))
    if as_json:
        missing = [address for address, _ in silent]
        print(json.dumps({"runs": listed, "truncated": is_truncated, "unreachable": missing}))
    elif listed or not silent:
        from switokd.cli.run_tables import console, runs_table

        hint = "" if finished else "; --finished also lists those that only a journal has"
        console().print(runs_table(listed) if listed else f"no runs{hint}")
        if is_truncated:
            print_error("there are more runs; --most N shows more of them")
    for _, reason in silent:
        print_error(str(reason))
    if silent:
        raise typer.Exit(CoordinatorError.exit_code)


def status(
    run: RunArgument,
    coordinator: CoordinatorOption = "",
    as_json: Annotated[bool, typer.Option("--json", help=RUNS_JSON_HELP)] = False,
) -> None:
    """Show what a run does: its pairs, networks and ranks.

    For example:

    switokd status digits-2t1s-3f9c21

    switokd status runs/digits-2t1s-001 --json

    A finished run is found in the coordinator's journal. A run folder whose coordinator is gone
    answers by itself.
    """
    try:
        view = _view(run, coordinator)
    except SwitokdError as error:
        fail(error)
    if as_json:
        print(json.dumps(view))
        return
    from switokd.cli.run_tables import console, status_group

    console().print(status_group(view))


def watch(
    run: RunArgument,
    coordinator: CoordinatorOption = "",
    interval: Annotated[
        float,
        typer.Option(metavar="SECONDS", parser=number_between(0.1, 3600.0), help=INTERVAL_HELP),
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help=WATCH_JSON_HELP)] = False,
) -> None:
    """Show what a run does until it ends: a live table. Without a terminal, a line per update.

    For example:

    switokd watch runs/digits-2t1s-001

    switokd watch digits-2t1s-3f9c21 --coordinator HOST:50051 --json

    Ends with the run. Exit code 0: it has finished; 5: it has failed; 6: it was stopped before its
    last step.
    """
    try:
        view = _watch(run, coordinator, interval, as_json)
        if view["state"] == "stopped":
            raise typer.Exit(EXIT_STOPPED)
        if view["state"] != "finished":
            reason = view["failure"] or "it was interrupted"
            raise RunFailedError(f"run {view['run_id']} has failed: {reason}")
    except SwitokdError as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # `switokd watch RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _view(run: str, coordinator: str) -> View:
    """Return the document of a run; errors as `find_run`."""
    from switokd.cli.finding import find_run
    from switokd.runs.folder_status import folder_status
    from switokd.runtime.lifecycle import print_warning

    found = find_run(run, coordinator)
    if found.status is not None:
        return found.status
    assert found.folder is not None, "a run without a coordinator has a folder"
    view = folder_status(found.folder)
    if found.silent is not None and view["state"] == "training":
        print_warning(f"{found.silent}; this is what the run folder says")
    return view


def _watch(run: str, coordinator: str, interval: float, as_json: bool) -> View:
    """Show a run until it has ended; return its last document."""
    from switokd.cli.run_tables import console, status_group, status_line

    screen = console()
    if as_json or not screen.is_terminal:

        def show(view: View) -> None:
            print(json.dumps(view) if as_json else status_line(view), flush=True)

        return _follow(run, coordinator, interval, show)
    from rich.live import Live

    with Live(console=screen, auto_refresh=False) as live:
        return _follow(
            run, coordinator, interval, lambda view: live.update(status_group(view), refresh=True)
        )


def _follow(run: str, coordinator: str, interval: float, show: Callable[[View], None]) -> View:
    """Hand every status of a run to `show`, until the run has ended; return the last one.

    A coordinator, or a run, that has gone away is looked for again for `RETRY_SECONDS`.
    """
    from switokd.cli.finding import find_run
    from switokd.coordination.operator_client import UnknownRunError
    from switokd.runs.folder_status import folder_status

    seen, lost_at, interrupted_at = False, math.inf, math.inf
    while True:
        now = time.monotonic()
        try:
            found = find_run(run, coordinator)
            for view in _updates(found, interval):
                seen, lost_at = True, math.inf
                run = run if found.folder else found.run_id
                show(view)
            if found.address is not None:
                return view
        except (CoordinatorError, UnknownRunError):
            lost_at = min(lost_at, now)
            if not seen or now - lost_at > RETRY_SECONDS:
                raise
            time.sleep(PAUSE_SECONDS)
            continue
        assert found.folder is not None, "a run without a coordinator has a folder"
        view = folder_status(found.folder)
        interrupted_at = min(interrupted_at, now) if view["state"] == "interrupted" else math.inf
        # Between the end of the steps and the summary, the folder looks like that of a lost run.
        if view["state"] == "finished" or now - interrupted_at > SETTLE_SECONDS:
            show(view)
            return view
        if view["state"] == "training":
            seen = True
            show(view)
        time.sleep(min(interval, PAUSE_SECONDS))


def _updates(found: Found, interval: float) -> Iterator[View]:
    """Yield what the coordinator says of a run until the run has ended; nothing without one."""
    from switokd.coordination.operator_client import OperatorClient
    from switokd.services.coordinator.run_view import status_view

    if found.address is not None:
        with OperatorClient(found.address) as client:
            for status in client.watch(found.run_id, interval):
                yield status_view(found.run_id, status, found.address)
