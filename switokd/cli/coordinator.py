"""The command `switokd coordinator`: the coordinator as a process of its own. Torch-free.

Not covered: the server itself (`services/coordinator/server.py`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from switokd.cli.access_options import access_options
from switokd.cli.arguments import fail, number_option
from switokd.cli.limit_options import options_of
from switokd.cli.option_groups import option_groups
from switokd.errors import SwitokdError
from switokd.runtime.log import format_records
from switokd.services.coordinator.limits import Limits

if TYPE_CHECKING:
    from switokd.services.coordinator.access import Access
    from switokd.services.coordinator.journal import Journal
    from switokd.services.coordinator.round_spans import RoundSpans

HOST_HELP = "Address to listen on; 0.0.0.0 listens on all interfaces, with TLS."
PORT_HELP = "gRPC port; 0 chooses a free one."
HTTP_PORT_HELP = "HTTP port of /metrics and /healthz; 0 chooses a free one."
STRATEGY_HELP = "A strategy of your own that runs may use. May be given several times."
JOURNAL_HELP = "SQLite file that keeps the decisions; started with it again, its runs are known."
KEEP_FINISHED_HELP = "Days for which the journal keeps a finished run."
KEEP_RUNS_HELP = "The most finished runs that the journal keeps; the oldest go first."
TRACES_HELP = (
    "Steps per OpenTelemetry trace of a round, as tracking.traces_every of the run; 0: none."
)
FOLLOW_STDIN_HELP = "Stop when standard input is closed."


def journal_options(
    journal: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help=JOURNAL_HELP),
    ] = None,
    keep_finished: Annotated[int, number_option(0, 36500, help=KEEP_FINISHED_HELP)] = 30,
    keep_runs: Annotated[int, number_option(0, 1_000_000, help=KEEP_RUNS_HELP)] = 1000,
) -> Journal:
    """Return the journal that the options name; errors as `SqliteJournal`."""
    from switokd.services.coordinator.finished import Retention
    from switokd.services.coordinator.journal import NO_JOURNAL, SqliteJournal

    return SqliteJournal(journal, Retention(keep_finished, keep_runs)) if journal else NO_JOURNAL


@contextmanager
def round_spans_of(traces_every: int) -> Iterator[RoundSpans]:
    """Yield what receives the rounds; UsageError if traces are wanted and cannot be sent."""
    from switokd.services.coordinator.round_spans import NO_SPANS, RoundSpans
    from switokd.tracing.opening import open_sender

    if not traces_every:
        yield NO_SPANS
        return
    warn = logging.getLogger("switokd.services.coordinator").warning
    with open_sender("switokd-coordinator", "--traces-every", warn) as sink:
        yield RoundSpans(sink, traces_every)


@option_groups(journal=journal_options, access=access_options, limits=options_of(Limits, "Limits"))
def coordinator(
    host: Annotated[str, typer.Option(help=HOST_HELP)] = "127.0.0.1",
    port: Annotated[int, number_option(0, 65535, help=PORT_HELP)] = 50051,
    http_port: Annotated[int, number_option(0, 65535, help=HTTP_PORT_HELP)] = 9464,
    strategy: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Option(metavar="PACKAGE.MODULE:CALLABLE", help=STRATEGY_HELP),
    ] = None,
    traces_every: Annotated[int, number_option(0, help=TRACES_HELP)] = 0,
    follow_stdin: Annotated[
        bool, typer.Option("--follow-stdin", hidden=True, help=FOLLOW_STDIN_HELP)
    ] = False,
    *,
    journal: Callable[[], Journal],
    access: Callable[[], Access],
    limits: Callable[[], Limits],
) -> None:
    """Run the coordinator as a process of its own.

    For example, on this machine, and for others:

    switokd coordinator

    switokd certificates certs --host HOST

    switokd coordinator --host 0.0.0.0 --tls-certificate certs/server.crt --tls-key certs/server.key

    Prints one line of JSON with its addresses when it is ready, and logs to standard error until
    it is stopped. The limits keep strangers from hurting it.
    """
    import asyncio

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else strangers write lines of its core
    from switokd.plugins import import_callable
    from switokd.services.coordinator.logs import configure_log
    from switokd.services.coordinator.server import serve

    bounds = limits()
    configure_log(logging.ERROR if follow_stdin else logging.INFO, bounds.log_rate)
    format_records()
    try:
        protection = access()
        protection.check(host)
        sys.path.append(os.getcwd())  # for the user's own strategies, as in training
        for name in strategy or []:
            import_callable(name, "--strategy")
        with round_spans_of(traces_every) as round_spans:
            more = (follow_stdin, strategy or [], journal(), protection, bounds, round_spans)
            asyncio.run(serve(host, port, http_port, *more))
    except SwitokdError as error:
        fail(error)
