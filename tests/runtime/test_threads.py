"""The commands set the spinning time of threads before PyTorch is loaded.

Not covered: the time that it saves (see the reason in `switokd/runtime/threads.py`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from switokd.runtime.threads import THREADS, drop_unusable_threads
from tests.support import BIN, run

TORCH = """
import os
from pathlib import Path

Path("found.txt").write_text(os.environ.get("GOMP_SPINCOUNT", "not set"))
os._exit(0)  # not an error of the user's module
"""
ONE_STEP = [
    "digits-1t1s",
    "placement=replicated",
    "coordinator=off",
    "schedule.epochs=1",
    "schedule.max_steps=1",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "command", [[str(BIN / "switokd"), "train"], [sys.executable, "-m", "switokd.train"]]
)
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "not set")],
)
def test_commands_say_how_threads_wait(
    tmp_path: Path, command: list[str], given: dict[str, str], expected: str
) -> None:
    """In the place of PyTorch is a module that writes what it finds when it is loaded."""
    (tmp_path / "torch.py").write_text(TORCH)
    code, _, err = run([*command, *ONE_STEP], tmp_path, 60, PYTHONPATH=str(tmp_path), **given)
    assert code == 0, err
    assert (tmp_path / "found.txt").read_text() == expected


def test_torch_is_not_loaded_for_it(tmp_path: Path) -> None:
    code = "import sys, switokd.runtime.threads; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("given", "kept", "lines"),
    [
        *[(text, True, 0) for text in ("1", "16", " 4 ", "4,2")],
        *[(text, False, 1) for text in ("0", "-1", "abc", "4,", "1.5", "10000000000000000000")],
        ("", False, 0),
        (None, False, 0),
    ],
)
def test_a_number_of_threads_that_openmp_cannot_use_is_left_out(
    given: str | None, kept: bool, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(THREADS, raising=False)
    if given is not None:
        monkeypatch.setenv(THREADS, given)
    said: list[str] = []
    drop_unusable_threads(said.append)
    assert os.environ.get(THREADS) == (given if kept else None)
    assert len(said) == lines
