"""The commands `hold`, `release`, `scale`, `checkpoint`, `stop` and `drain`. Torch-free.

Each sends one command to a run, waits until the run has taken it, and prints from which step it
holds. If the coordinator is lost meanwhile, it is sent again to the next one; its id sees to it
that the run takes it once.

Not covered: asking what a run does (`operate.py`); when the ranks take a command
(`coordination/commands.py`).
"""

from __future__ import annotations

import shlex
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer

from switokd.cli.arguments import fail, number_between, number_option
from switokd.cli.operate import CoordinatorOption, RunArgument
from switokd.distillation.decision import Mode
from switokd.distillation.overrides import (
    LEAST_FACTOR,
    MOST_FACTOR,
    Action,
    Command,
    Stamped,
)
from switokd.errors import CoordinatorError, SwitokdError, UsageError

if TYPE_CHECKING:
    from switokd.cli.finding import Found

UNTIL_HELP = "The last step of the hold. Default: until 'switokd release'."
WAIT_HELP = "How long to wait until the run has taken the command; 0: not at all."
POLL_SECONDS = 0.2

EPILOG = (
    "RUN is a run folder, whose run.json has the run's secret, or a run's id, if you have an "
    "operator's token. Exit codes: 0 the run has taken the command, 2 a mistake in the arguments, "
    "no such run, or a refusal, 4 no coordinator answers, or the run has not taken it in time."
)

WaitOption = Annotated[
    float,
    typer.Option("--wait", metavar="SECONDS", parser=number_between(0, 86_400), help=WAIT_HELP),
]


def _mode(text: str) -> Mode:
    try:
        return Mode(text)
    except ValueError:
        allowed = ", ".join(mode.value for mode in Mode)
        raise typer.BadParameter(f"found {text}; allowed: {allowed}") from None


HoldMode = Annotated[
    Mode,
    typer.Argument(
        metavar="MODE", parser=_mode, help="expert: the teacher pauses; learning: it learns."
    ),
]
Teacher = Annotated[str, typer.Argument(metavar="TEACHER", help="Name of a teacher of the run.")]


def hold(
    run: RunArgument,
    teacher: Teacher,
    mode: HoldMode,
    until_step: Annotated[
        Optional[int],  # noqa: UP045, typer reads it at run time
        number_option(1, names=("--until-step",), help=UNTIL_HELP),
    ] = None,
    coordinator: CoordinatorOption = "",
    wait: WaitOption = 60.0,
) -> None:
    """Keep a teacher in a mode for all its students, whatever the gap is.

    For example:

    switokd hold runs/digits-2t1s-001 teacher1 expert --until-step 400

    The record marks these steps with "held": true. A continued run holds the teacher again at the
    same steps.
    """
    command = Command("", Action.HOLD, teacher, mode, until_step or 0)
    _tell(run, coordinator, wait, command)


def release(
    run: RunArgument, teacher: Teacher, coordinator: CoordinatorOption = "", wait: WaitOption = 60.0
) -> None:
    """End a hold: the teacher switches by its gap again.

    For example:

    switokd release runs/digits-2t1s-001 teacher1
    """
    _tell(run, coordinator, wait, Command("", Action.RELEASE, teacher))


def scale(
    run: RunArgument,
    factor: Annotated[
        float,
        typer.Argument(
            metavar="FACTOR",
            parser=number_between(LEAST_FACTOR, MOST_FACTOR),
            help="Above 0; 1 ends the scaling.",
        ),
    ],
    teacher: Annotated[
        str, typer.Argument(metavar="[TEACHER]", help="Only this teacher's pairs. Default: all.")
    ] = "",
    coordinator: CoordinatorOption = "",
    wait: WaitOption = 60.0,
) -> None:
    """Multiply the threshold: below 1 teachers pause sooner, above 1 later.

    For example:

    switokd scale runs/digits-2t1s-001 0.5

    switokd scale runs/digits-2t1s-001 2 teacher1

    The record has the factor as "delta_scale", and in "delta" the threshold after it.
    """
    _tell(run, coordinator, wait, Command("", Action.SCALE, teacher, factor=factor))


def checkpoint(
    run: RunArgument, coordinator: CoordinatorOption = "", wait: WaitOption = 60.0
) -> None:
    """Let a run save a checkpoint after its current step.

    For example:

    switokd checkpoint runs/digits-2t1s-001
    """
    _tell(run, coordinator, wait, Command("", Action.CHECKPOINT))


def stop(run: RunArgument, coordinator: CoordinatorOption = "", wait: WaitOption = 60.0) -> None:
    """Let a run save a checkpoint and end, with exit code 6.

    For example:

    switokd stop runs/digits-2t1s-001

    Nothing starts it again by itself. 'switokd train --resume RUN' continues it.
    """
    _tell(run, coordinator, wait, Command("", Action.STOP))


def drain(coordinator: CoordinatorOption = "") -> None:
    """Stop a coordinator as SIGTERM does; needs an operator's token.

    For example:

    switokd drain --coordinator HOST:50051

    Its runs go on: their ranks decide alone until the next coordinator answers there.
    """
    from switokd.cli.finding import addresses_of
    from switokd.coordination.operator_client import OperatorClient

    try:
        addresses = addresses_of(coordinator)
        if len(addresses) > 1:
            raise UsageError(f"--coordinator {coordinator}: name the one to drain")
        with OperatorClient(addresses[0]) as client:
            streams = client.drain()
    except SwitokdError as error:
        fail(error)
    print(f"the coordinator at {addresses[0]} stops; it had {streams} open streams")


def _tell(run: str, coordinator: str, seconds: float, command: Command) -> None:
    """Send a command and print what becomes of it; ends with an error's exit code."""
    from switokd.cli.finding import find_run

    command = replace(command, id=uuid.uuid4().hex[:12])
    try:
        found = find_run(run, coordinator)
        _check_goes_on(run, found)
        if found.address is None:
            _unreachable(run, found.silent)
        stamped = _send(found, command, seconds)
    except SwitokdError as error:
        fail(error)
    print(_outcome(command, stamped, found.folder))


def _check_goes_on(run: str, found: Found) -> None:
    """UsageError if the run has ended, as its coordinator says, or else its folder."""
    from switokd.runs.folder_status import folder_status

    view = found.status
    if view is None and found.folder is not None and found.silent is None:
        view = folder_status(found.folder)
    if view is None:
        return
    if view["state"] == "finished":
        raise UsageError(
            f"{run}: the run has finished, after step {view['last_step']:,}; it takes no commands"
        )
    ends = {
        "failed": "has failed",
        "stopped": "was stopped",
        "interrupted": "was interrupted or stopped",
    }
    if how := ends.get(view["state"]):
        folder = shlex.quote(str(found.folder or view["folder"] or "RUN"))
        why = f" ({view['failure']})" if view["failure"] else ""
        raise UsageError(
            f"{run}: the run does not go on: it {how}{why}; after 'switokd train --resume "
            f"{folder}' it takes commands again"
        )


def _unreachable(run: str, silent: CoordinatorError | None) -> NoReturn:
    if silent is not None:
        raise silent
    raise CoordinatorError(
        f"{run}: no coordinator that knows this run answers: is it running? Name its coordinator "
        "with --coordinator HOST:PORT"
    )


def _send(found: Found, command: Command, seconds: float) -> Stamped | None:
    """Send a command until the run has taken it; None: nobody waits for that.

    UsageError if coordinator or run refuse it, CoordinatorError if the run does not take it.
    """
    from switokd.coordination.operator_client import OperatorClient, UnknownRunError
    from switokd.runtime.waiting import waiting

    assert found.address is not None, "the caller has checked"
    secret = _secret(found.folder)
    deadline = time.monotonic() + seconds
    with OperatorClient(found.address) as client:
        client.send(found.run_id, command, secret)
        with waiting("the run to take the command", seconds):
            while time.monotonic() < deadline:
                try:
                    stamped = _noted(found.folder, command) or client.answer(found.run_id, command)
                    if stamped is None:  # a new coordinator, which has no journal
                        client.send(found.run_id, command, secret)
                    elif stamped.failure:
                        raise UsageError(f"the run refuses: {stamped.failure}")
                    elif stamped.first_step:
                        return stamped
                except (CoordinatorError, UnknownRunError):
                    pass
                time.sleep(POLL_SECONDS)
    if not seconds:
        return None
    raise CoordinatorError(
        f"the run has not taken the command within {seconds:g} s (--wait); it will if it goes on: "
        f"'switokd status {found.run_id}' lists it as {command.id}"
    )


def _secret(folder: Path | None) -> bytes:
    """Return the run's secret; empty if it is not known here."""
    from switokd.runs.folder_status import identity_of

    try:
        return bytes.fromhex(identity_of(folder).get("secret", "")) if folder else b""
    except (ValueError, TypeError):
        return b""


def _noted(folder: Path | None, command: Command) -> Stamped | None:
    """Return the command from the run folder, where it stays when its coordinator has ended."""
    from switokd.coordination.command_file import read_commands

    try:
        noted = read_commands(folder)
    except UsageError:  # somebody has changed the file
        return None
    return next((s for s in noted if s.command.id == command.id), None)


def _outcome(command: Command, stamped: Stamped | None, folder: Path | None) -> str:
    """Return the sentence that the command prints."""
    what = command.describe()
    if stamped is None:
        return f"{what}: sent as {command.id}"
    last = stamped.first_step - 1
    if command.action is Action.CHECKPOINT:
        return f"{what}: saved after step {last}"
    if command.action is Action.STOP:
        resume = shlex.join(["switokd", "train", "--resume", str(folder or "RUN")])
        return f"{what}: the run ends after step {last}; continue with: {resume}"
    return f"{what}: from step {stamped.first_step} on"
