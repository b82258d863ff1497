"""The end of a coordinator whose standard input ends."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from pathlib import Path
from typing import IO

import pytest

from switokd.services.coordinator import server as server_module
from tests.support import free_port, process

COMMAND = [sys.executable, "-m", "switokd", "coordinator"]


def test_stops_when_standard_input_closes(tmp_path: Path) -> None:
    command = [*COMMAND, "--follow-stdin", "--port", "0", "--http-port", str(free_port())]
    with process(command, tmp_path) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline()
        child.stdin.close()
        assert child.wait(10) == 0


def test_stops_when_standard_input_is_at_its_end(tmp_path: Path) -> None:
    """The event loop cannot wait for /dev/null."""
    command = [*COMMAND, "--follow-stdin", "--port", "0", "--http-port", "0"]
    with process(["sh", "-c", f"exec {shlex.join(command)} </dev/null"], tmp_path) as child:
        out, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (0, "")
    assert json.loads(out)["pid"] == child.pid


def at_its_end(kind: str, folder: Path) -> IO[str] | None:
    """A standard input that ends."""
    if kind == "pipe":
        reader, writer = os.pipe()
        os.close(writer)
        return os.fdopen(reader)
    (folder / "file").write_text("some text")
    path = folder / "file" if kind == "file" else os.devnull
    stdin = os.fdopen(os.open(path, os.O_RDONLY))
    if kind in ("closed", "none"):
        stdin.close()
    return None if kind == "none" else stdin


@pytest.mark.parametrize("kind", ["pipe", "null", "file", "closed", "none"])
def test_every_kind_of_standard_input_ends(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = at_its_end(kind, tmp_path)
    monkeypatch.setattr(sys, "stdin", stdin)
    asyncio.run(asyncio.wait_for(server_module._until_stdin_closes(asyncio.Event()), 10))
    if stdin:
        stdin.close()
