"""The command `switokd`: registers its subcommands.

The subcommands' modules import what they need when they run. `switokd --help` therefore imports
neither torch nor the configuration.

Not covered: what a subcommand does (the module of its name).
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from switokd.cli.arguments import EPILOG
from switokd.cli.certificates import certificates
from switokd.cli.check import check
from switokd.cli.commands import CliCommand, Group
from switokd.cli.compare import compare
from switokd.cli.coordinator import coordinator
from switokd.cli.export import export, predict
from switokd.cli.k8s import k8s
from switokd.cli.networks import networks
from switokd.cli.operate import EPILOG as OPERATE_EPILOG
from switokd.cli.operate import runs, status, watch
from switokd.cli.operator_options import OperatorCommand
from switokd.cli.plan import plan
from switokd.cli.replay import EPILOG as REPLAY_EPILOG
from switokd.cli.replay import replay
from switokd.cli.report import report
from switokd.cli.settings import recipes, settings
from switokd.cli.tell import EPILOG as TELL_EPILOG
from switokd.cli.tell import checkpoint, drain, hold, release, scale, stop
from switokd.cli.train import train
from switokd.errors import OwnCodeError, UsageError, own_code_errors
from switokd.runtime.console import accept_any_console, lead_nowhere, quiet_grpc
from switokd.runtime.lifecycle import print_error, print_warning, told
from switokd.runtime.log import set_up
from switokd.runtime.threads import drop_unusable_threads, wait_briefly

LEFT_OUT = ("torch", "torchvision", "numpy", "matplotlib", "yaml", "joblib", "PIL", "sklearn")
"""Dependencies of training, which the distribution switokd-coordinator does not install."""

app = typer.Typer(
    cls=Group,
    help="Train networks that teach each other: switchable online knowledge distillation.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_WITH_EXIT_CODES: list[Callable[..., None]] = [
    *(train, plan, check, compare, report, export, predict)
]
for _command in _WITH_EXIT_CODES:
    app.command(epilog=EPILOG, cls=CliCommand)(_command)
app.command(epilog=REPLAY_EPILOG, cls=CliCommand)(replay)
_OF_OPERATORS: list[Callable[..., None]] = [runs, status, watch]
for _command in _OF_OPERATORS:
    app.command(epilog=OPERATE_EPILOG, cls=OperatorCommand)(_command)
_TO_RUNS: list[Callable[..., None]] = [hold, release, scale, checkpoint, stop, drain]
for _command in _TO_RUNS:
    app.command(epilog=TELL_EPILOG, cls=OperatorCommand)(_command)
_OTHERS: list[Callable[..., None]] = [networks, coordinator, certificates, recipes, settings]
for _command in _OTHERS:
    app.command(cls=CliCommand)(_command)
app.add_typer(k8s, name="k8s")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from switokd import __version__

        print(f"switokd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command `switokd`."""
    accept_any_console()
    quiet_grpc()
    set_up(sys.argv)
    drop_unusable_threads(print_warning)
    wait_briefly()
    try:
        with own_code_errors():
            try:
                app()
            finally:
                sys.stdout.flush()
    except OwnCodeError as error:
        print_error(told(error))
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        lead_nowhere(sys.stdout)  # else Python fails again at its end
        print_error(f"the output cannot be written: {error.strerror}")
        raise SystemExit(UsageError.exit_code) from None
    except ModuleNotFoundError as error:
        if error.name not in LEFT_OUT:
            raise
        print_error(
            f"this command needs {error.name}, which switokd-coordinator leaves out; "
            "pip uninstall switokd-coordinator, then pip install switokd"
        )
        raise SystemExit(UsageError.exit_code) from None
