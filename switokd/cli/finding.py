"""Which coordinator, and which run, a command for operators means.

RUN is a run folder, the id of a run, or the beginning of an id that no other run has. The
coordinator is that of --coordinator, else that of the run folder, else that of the environment
variable SWITOKD_COORDINATOR, else the default port on this machine.

Not covered: what the coordinator answers (`coordination/operator_client.py`).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from switokd.coordination.addresses import choose_address, split_addresses
from switokd.coordination.operator_client import (
    OperatorClient,
    RefusedConnectionError,
    UnknownRunError,
)
from switokd.errors import CoordinatorError, UsageError
from switokd.runs.folder_status import identity_of, is_run_folder
from switokd.services.coordinator.run_view import View, status_view

VARIABLE = "SWITOKD_COORDINATOR"
DEFAULT = "127.0.0.1:50051"
NEAREST = 3
"""Ids that an error names, at most."""


@dataclass(frozen=True)
class Found:
    """A run, and who knows of it."""

    run_id: str
    address: str | None
    """The coordinator that has it; None: only the folder is there."""
    folder: Path | None
    status: View | None
    """What this coordinator says of it."""
    silent: CoordinatorError | None = None
    """Why the coordinator that the folder names is there, and could not be asked."""


def addresses_of(option: str, of_folder: str = "") -> list[str]:
    """Return the addresses to ask; UsageError if one is not HOST:PORT."""
    for text, where in (
        (option, "--coordinator"),
        (of_folder, "run.json"),
        (os.environ.get(VARIABLE), VARIABLE),
    ):
        if text:
            try:
                return split_addresses(text)
            except ValueError as error:
                raise UsageError(f"{where} {text}: allowed are {error}") from None
    return [DEFAULT]


def find_run(run: str, option: str = "") -> Found:
    """Return the run that RUN means. option: the value of --coordinator, if there is one.

    UsageError if there is no such run, or if several begin so. CoordinatorError if no coordinator
    answers and RUN is no run folder.
    """
    folder = Path(run)
    if is_run_folder(folder):
        return _of_folder(folder, option)
    addresses = addresses_of(option)
    first = choose_address(",".join(addresses), run)
    addresses.sort(key=lambda address: address != first)
    return _of_coordinators(run, addresses)


def _of_folder(folder: Path, option: str) -> Found:
    identity = identity_of(folder)
    silent: CoordinatorError | None = None
    run_id, noted = str(identity.get("run_id", "")), identity.get("coordinator")
    if run_id and (option or noted or os.environ.get(VARIABLE)):
        for address in addresses_of(option, str(noted or "")):
            try:
                status = _ask(address, run_id)
            except UnknownRunError:
                continue
            except CoordinatorError as error:
                if option:
                    raise
                if isinstance(error, RefusedConnectionError):
                    silent = error
                continue
            return Found(run_id, address, folder, status)
    return Found(run_id, None, folder, None, silent)


def _ask(address: str, run_id: str) -> View:
    with OperatorClient(address) as client:
        return status_view(run_id, client.status(run_id), address)


def _of_coordinators(run: str, addresses: Sequence[str]) -> Found:
    """Ask the coordinators for an id, then for all ids that begin so."""
    silent: list[CoordinatorError] = []
    there: list[str] = []
    for address in addresses:
        try:
            return Found(run, address, None, _ask(address, run))
        except UnknownRunError:  # noqa: PERF203
            there.append(address)
        except CoordinatorError as error:
            silent.append(error)
    if not there:
        raise type(silent[0])(f"{run} is no run folder, and {silent[0]}")
    homes: dict[str, str] = {}
    for address in there:
        with OperatorClient(address) as client:
            homes.update({r.run_id: address for r in client.runs(finished=True).runs})
    matches = sorted(run_id for run_id in homes if run_id.startswith(run))
    if len(matches) == 1:
        run_id, address = matches[0], homes[matches[0]]
        return Found(run_id, address, None, _ask(address, run_id))
    if matches:
        shown = ", ".join(matches[:NEAREST]) + (", ..." if len(matches) > NEAREST else "")
        raise UsageError(f"{run}: {len(matches)} runs begin so: {shown}; name one of them")
    folder = "there is no such run folder, and " if os.sep in run else ""
    raise UnknownRunError(f"{folder}no run {run} at {', '.join(there)}{_nearest(run, homes)}")


def _nearest(run: str, homes: dict[str, str]) -> str:
    close = difflib.get_close_matches(run, homes, n=NEAREST, cutoff=0.4)
    if close:
        return f"; the nearest: {', '.join(close)}"
    return "; 'switokd runs --finished' lists them" if homes else "; it has no runs"
