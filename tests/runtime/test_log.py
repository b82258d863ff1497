"""Messages as objects, and --quiet, in real runs.

Not covered: torchrun's own messages.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
from datetime import datetime
from pathlib import Path

import pytest

from switokd.runtime import log
from switokd.runtime.lifecycle import print_error, print_warning
from tests.support import free_port, run, switokd_train

OWN = """\
import os, sys, warnings
from torch import nn

def net(num_classes=10):
    warnings.warn("odd")
    print("half a line, ", end=""); print("and the rest")
    os.write(2, b"from a C library\\n")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


def objects(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.timeout(100)
def test_all_that_a_run_says_is_objects(tmp_path: Path) -> None:
    (tmp_path / "own_log.py").write_text(OWN)
    settings = ["networks.student.model=own_log:net", "schedule.max_steps=3"]
    train = switokd_train(2, "digits-1t1s", "--log-format", "json", *settings)
    code, out, err = run(train, tmp_path)
    assert code == 0, err
    said = objects(out) + objects(err)
    for each in said:
        assert list(each)[:6] == ["time", "level", "run", "rank", "step", "message"]
        assert datetime.fromisoformat(str(each["time"])).utcoffset() is not None
    by_message = {str(each["message"]): each for each in said}
    (epoch,) = (each for words, each in by_message.items() if words.startswith("epoch   1/"))
    assert (epoch["rank"], epoch["step"], epoch["level"]) == (0, 3, "info")
    assert str(epoch["run"]).startswith("digits-1t1s-")
    assert by_message["half a line, and the rest"]["rank"] == 1
    assert by_message["from a C library"]["level"] == "warning"
    assert any("UserWarning: odd" in words for words in by_message)
    assert any(words.startswith("student: top-1 last") for words in by_message)


@pytest.mark.timeout(100)
def test_quiet_leaves_warnings_and_errors(tmp_path: Path) -> None:
    one = ["digits-1t1s", "placement=replicated", "coordinator=off", "schedule.max_steps=3"]
    assert run(switokd_train(1, "--quiet", *one), tmp_path) == (0, "", "")
    code, out, err = run(switokd_train(1, "--quiet", *one, "device=cuda"), tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("switokd: device: cuda, but")


def test_the_coordinator_logs_objects(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "switokd", "coordinator", "--port=0", "--http-port=0"]
    code, out, err = run([*command, "--follow-stdin"], tmp_path, SWITOKD_LOG_FORMAT="json")
    assert (code, err) == (0, "")
    assert "grpc" in json.loads(out)  # its result, as ever
    taken = ["--port", str(free_port()), "--host", "192.0.2.1", "--allow-plaintext"]
    code, _, err = run([*command, *taken], tmp_path, SWITOKD_LOG_FORMAT="json")
    assert code == 2
    said = str(objects(err)[-1]["message"])
    assert f"--port {taken[1]}: cannot listen on 192.0.2.1: " in said
    assert "GRPC_VERBOSITY" not in said


@pytest.mark.parametrize("option", ["--port", "--http-port"])
def test_a_port_in_use_is_named(option: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        ports = {"--port": "0", "--http-port": "0"} | {option: str(port)}
        words = [word for pair in ports.items() for word in pair]
        code, out, err = run([sys.executable, "-m", "switokd", "coordinator", *words], tmp_path)
    problem = f"switokd: {option} {port}: cannot listen on 127.0.0.1: another program listens there"
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == f"{problem}; choose another (0 chooses a free one)"


def test_levels_and_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    print_warning("one\ntwo", "rank 1")
    monkeypatch.setenv(log.LOG_FORMAT, "json")
    print_error("three", "rank 1")
    monkeypatch.setenv(log.QUIET, "1")
    log.say("left out", "info")
    *text, last = stream.getvalue().splitlines()
    assert text == ["switokd: rank 1: one", "switokd: rank 1: two"]
    said = json.loads(last)
    assert (said["level"], said["message"]) == ("error", "rank 1: three")


def test_an_error_that_nobody_catches_is_one_object(tmp_path: Path) -> None:
    program = "from switokd.runtime import log; log.set_up(); print(1 / 0)"
    code, _, err = run([sys.executable, "-c", program], tmp_path, SWITOKD_LOG_FORMAT="json")
    (said,) = objects(err)
    assert code == 1
    assert said["message"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in str(said["traceback"])


def test_processes_whose_output_is_read_write_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log.LOG_FORMAT, "json")
    monkeypatch.setenv(log.QUIET, "1")
    found = log.plain_environment()
    assert not {log.LOG_FORMAT, log.QUIET} & {*found}
    assert found["PATH"] == os.environ["PATH"]
