"""The command `switokd coordinator`: the coordinator as a process of its own. Torch-free.

Not covered: the server itself (`services/coordinator/server.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Annotated, Optional

import typer

from switokd.cli.arguments import fail
from switokd.errors import SwitokdError
from switokd.plugins import import_callable


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
        fail(error)
