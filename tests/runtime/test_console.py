"""A run whose console is gone trains to its end; SIGHUP ends it as SIGTERM does.

Not covered: a terminal that is really closed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from switokd.runtime.console import accept_any_console
from tests.support import environment, process, wait_until

ONE = ["placement=replicated", "coordinator=off", "schedule.epochs=1", "run_dir=out"]
COMMANDS = {
    "one process": [sys.executable, "-m", "switokd.train", "digits-1t1s", *ONE],
    "launcher": [sys.executable, "-m", "switokd", "train", "digits-1t1s", *ONE[2:]],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_goes_away_costs_no_training(command: str, tmp_path: Path) -> None:
    with process(COMMANDS[command], tmp_path) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(1)  # it has begun to print
        child.stdout.close()
        child.stderr.close()
        assert child.wait(60) == 0
    assert (tmp_path / "out/summary.json").exists()
    assert (tmp_path / "out/weights/student.pt").exists()


def test_a_full_disk_behind_the_output_costs_no_training(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            COMMANDS["one process"], cwd=tmp_path, env=environment(), stdout=full, timeout=60
        )
    assert done.returncode == 0
    assert (tmp_path / "out/summary.json").exists()


@pytest.mark.parametrize("words", ["settings", "--version"])  # more than a buffer, and less
def test_a_full_disk_behind_a_commands_output_is_one_line(words: str, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "switokd", words],
            cwd=tmp_path,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    said = "switokd: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize("command", COMMANDS)
def test_sighup_ends_a_run_as_sigterm_does(command: str, tmp_path: Path) -> None:
    words = [*COMMANDS[command], "schedule.epochs=500"]
    with process(words, tmp_path) as child:
        record = tmp_path / "out/decisions.jsonl"
        wait_until(lambda: record.exists() and record.stat().st_size > 500, 60, "some steps")
        for _ in range(2):  # one by the system, one by the shell
            child.send_signal(signal.SIGHUP)
        assert child.wait(30) == 143
        assert child.stderr is not None
        assert "continue with: switokd train --resume out" in child.stderr.read()


CLOSED = """
import os, sys
from switokd.runtime.console import accept_any_console

accept_any_console()
with open("config.yaml", "w") as file:
    assert file.fileno() > 2
    print("épée")
    print("épée", file=sys.stderr)
    sys.stdout.flush()
    os.write(1, b"of a library")
    os.write(2, b"of a library")
sys.exit(int(os.path.getsize("config.yaml") > 0))
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere_and_never_into_a_file(closed: str, tmp_path: Path) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", CLOSED]
    assert subprocess.run(command, cwd=tmp_path, env=environment(), timeout=30).returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "ascii:surrogateescape", "utf-8"])
def test_a_console_that_lacks_a_character_shows_its_number(encoding: str) -> None:
    code = (
        "from switokd.runtime.console import accept_any_console as a; a(); print('\\xe9 \\udcff')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(PYTHONIOENCODING=encoding),
        stdout=subprocess.PIPE,
        timeout=30,
    )
    seen = "é" if encoding == "utf-8" else "\\xe9"
    assert (done.returncode, done.stdout.decode()) == (0, f"{seen} \\udcff\n")


@pytest.mark.parametrize(("given", "kept"), [("0", False), ("", False), ("20", True)])
def test_a_width_of_no_columns_hides_nothing(
    given: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", given)
    accept_any_console()
    assert ("COLUMNS" in os.environ) is kept
