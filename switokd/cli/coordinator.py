"""The command `switokd coordinator`: the coordinator as a process of its own. Torch-free.

Not covered: the server itself (`services/coordinator/server.py`).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from switokd.cli.arguments import fail
from switokd.errors import SwitokdError

HOST_HELP = "Address to listen on; 0.0.0.0 listens on all interfaces."
PORT_HELP = "gRPC port; 0 chooses a free one."
HTTP_PORT_HELP = "HTTP port of /metrics and /healthz; 0 chooses a free one."
STRATEGY_HELP = "A strategy of your own that runs may use. May be given several times."
JOURNAL_HELP = "SQLite file that keeps the decisions; started with it again, its runs are known."
FOLLOW_STDIN_HELP = "Stop when standard input is closed."


def coordinator(
    host: Annotated[str, typer.Option(help=HOST_HELP)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help=PORT_HELP)] = 50051,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help=HTTP_PORT_HELP)] = 9464,
    strategy: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Option(metavar="PACKAGE.MODULE:CALLABLE", help=STRATEGY_HELP),
    ] = None,
    journal: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help=JOURNAL_HELP),
    ] = None,
    follow_stdin: Annotated[
        bool, typer.Option("--follow-stdin", hidden=True, help=FOLLOW_STDIN_HELP)
    ] = False,
) -> None:
    """Run the coordinator as a process of its own.

    For example:

    switokd coordinator --host 0.0.0.0 --port 50051

    switokd train digits-2t1s coordinator.address=HOST:50051

    Prints one line of JSON with its addresses when it is ready, and logs to standard error until
    it is stopped. It does not authenticate its peers: listen only on a network where every peer
    is trusted.
    """
    import asyncio

    from switokd.plugins import import_callable
    from switokd.services.coordinator.journal import NO_JOURNAL, SqliteJournal
    from switokd.services.coordinator.server import serve

    level = logging.ERROR if follow_stdin else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    try:
        sys.path.append(os.getcwd())  # for the user's own strategies, as in training
        for name in strategy or []:
            import_callable(name, "--strategy")
        kept = SqliteJournal(journal) if journal else NO_JOURNAL
        asyncio.run(serve(host, port, http_port, follow_stdin, strategy or [], kept))
    except SwitokdError as error:
        fail(error)
