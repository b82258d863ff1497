"""The command `switokd certificates`: a CA, certificates and tokens for a trial. Torch-free.

Not covered: the certificates themselves (`coordination/certificates.py`).
"""

from __future__ import annotations

import secrets
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from switokd.cli.arguments import fail, number_option
from switokd.errors import SwitokdError, UsageError

if TYPE_CHECKING:
    from switokd.coordination.certificates import Authority, Issued

FOLDER_HELP = "Folder for the files; it is made if it is not there."
HOST_HELP = (
    "Name or IP address at which the coordinator is reached. May be given several times; localhost "
    "and 127.0.0.1 are always among them."
)
DAYS_HELP = "How many days the certificates of coordinator and ranks are valid."
LOCAL = ("localhost", "127.0.0.1", "::1")
MOST_DAYS = 3650
CA_DAYS = 3650
TOKENS = ("worker.token", "operator.token")


def certificates(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help=FOLDER_HELP)],
    host: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Option(metavar="NAME", help=HOST_HELP),
    ] = None,
    days: Annotated[int, number_option(1, MOST_DAYS, help=DAYS_HELP)] = 365,
) -> None:
    """Make certificates and tokens with which a coordinator serves other machines.

    For example:

    switokd certificates certs --host gpu1.example.org

    Writes a CA (ca.crt, ca.key), and certificates of the coordinator (server.crt, server.key) and
    of the ranks (client.crt, client.key). Makes a token for workers, and one for operators. If the
    folder has a CA, it issues the certificates again: a coordinator that runs reads them without a
    restart. An existing token stays.

    Prints the commands that use the files.
    """
    if folder.exists() and not folder.is_dir():
        fail(UsageError(f"{folder} is a file; name a new folder for the certificates"))
    try:
        _make(folder, [*dict.fromkeys([*(host or []), *LOCAL])], days)
    except SwitokdError as error:
        fail(error)
    except OSError as error:
        fail(UsageError(f"{folder} cannot be written: {error.strerror}"))
    for line in _commands(folder, (host or ["127.0.0.1"])[0]):
        print(line)


def _make(folder: Path, hosts: list[str], days: int) -> None:
    from switokd.coordination.certificates import check_hosts

    check_hosts(hosts)  # before anything is written
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = _authority(folder, days)
    server, client = authority.server(hosts, days), authority.client("switokd rank", days)
    _write(folder, "server", server)
    _write(folder, "client", client)
    for name in TOKENS:
        if not (folder / name).exists():
            _replace(folder / name, f"{secrets.token_hex(32)}\n".encode(), 0o600)


def _authority(folder: Path, days: int) -> Authority:
    """Return the CA of a folder, which is made if the folder has none."""
    from switokd.coordination.certificates import Authority, Issued

    certificate, key = folder / "ca.crt", folder / "ca.key"
    if not certificate.exists() and not key.exists():
        authority = Authority.new(max(days, CA_DAYS))
        _write(folder, "ca", authority.made)
        return authority
    try:
        return Authority(Issued(certificate.read_bytes(), key.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{folder}: ca.crt and ca.key are not a CA that this command has made ({reason}); "
            "choose another folder"
        ) from None


def _write(folder: Path, name: str, issued: Issued) -> None:
    _replace(folder / f"{name}.key", issued.key, 0o600)
    _replace(folder / f"{name}.crt", issued.certificate, 0o644)


def _replace(path: Path, content: bytes, mode: int) -> None:
    from switokd.runtime.durable import replace_file

    replace_file(path, content, mode)


def _commands(folder: Path, host: str) -> list[str]:
    """Return the lines that say how to use the files."""

    def at(name: str) -> str:
        return shlex.quote(str(folder / name))

    return [
        "on the coordinator's machine:",
        f"  switokd coordinator --host 0.0.0.0 --tls-certificate {at('server.crt')} "
        f"--tls-key {at('server.key')} --tls-client-ca {at('ca.crt')} "
        f"--worker-token-file {at('worker.token')} --operator-token-file {at('operator.token')}",
        "on the machines of the ranks, which need ca.crt, client.crt, client.key and worker.token:",
        f"  switokd train RECIPE coordinator.address={shlex.quote(host)}:50051 "
        f"coordinator.tls.ca={at('ca.crt')} coordinator.tls.certificate={at('client.crt')} "
        f"coordinator.tls.key={at('client.key')} coordinator.token_file={at('worker.token')}",
        "on an operator's machine, which needs ca.crt, client.crt, client.key and operator.token:",
        f"  switokd runs --coordinator {shlex.quote(host)}:50051 --tls-ca {at('ca.crt')} "
        f"--tls-certificate {at('client.crt')} --tls-key {at('client.key')} "
        f"--token-file {at('operator.token')}",
        f"{folder / 'ca.key'} makes new certificates: keep it away from all other machines.",
    ]
