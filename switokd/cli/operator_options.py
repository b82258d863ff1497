"""Options of the commands for operators: TLS and the token's file, instead of the environment.

An option comes before its variable. A token itself is never given on a command line, which other
users of the machine can read.

Not covered: what the files are for (`coordination/credentials.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

import typer

from switokd.cli.commands import CliCommand
from switokd.coordination.tokens import CA, CERTIFICATE, KEY, TOKEN_FILE

CA_HELP = f"CA of the coordinator's certificate, in PEM format. Default: {CA}; without it no TLS."
CERTIFICATE_HELP = f"Your certificate, if the coordinator asks for one. Default: {CERTIFICATE}."
KEY_HELP = f"Private key of --tls-certificate. Default: {KEY}."
TOKEN_HELP = f"File with your token. Default: {TOKEN_FILE}, else the token in SWITOKD_TOKEN."


def _sets(variable: str) -> Callable[[str], None]:
    def put(path: str) -> None:
        if path:
            try:
                os.close(os.open(path, os.O_RDONLY))
            except OSError as error:
                raise typer.BadParameter(f"{path} cannot be read: {error.strerror}") from None
            os.environ[variable] = path

    return put


def _file(variable: str, help: str) -> Any:
    return typer.Option(
        metavar="FILE",
        callback=_sets(variable),
        expose_value=False,
        help=help,
        show_default=False,
    )


@cache
def _options() -> tuple[Any, ...]:
    """Return the options as Typer makes them."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def options(
        tls_ca: Annotated[str, _file(CA, CA_HELP)] = "",
        tls_certificate: Annotated[str, _file(CERTIFICATE, CERTIFICATE_HELP)] = "",
        tls_key: Annotated[str, _file(KEY, KEY_HELP)] = "",
        token_file: Annotated[str, _file(TOKEN_FILE, TOKEN_HELP)] = "",
    ) -> None:
        pass

    return tuple(p for p in typer.main.get_command(app).params if p.name != "help")


class OperatorCommand(CliCommand):
    """A command for operators, with the options of all of these."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.params += _options()
