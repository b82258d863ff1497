"""Loader processes that die are started again, and the same batches follow.

Not covered: a whole training whose loader process is killed (`tests/training/test_resume.py`).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from switokd.data import loader
from switokd.data.loader import Batches, Undelivered
from switokd.errors import PeerError

# The DataLoader warns on machines with fewer processors than loader processes.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
POSITIONS = [[(0, 2 * i), (0, 2 * i + 1)] for i in range(6)]


class Deadly:
    """A data set that kills the loader process which reads a sample, while `lives` has a byte."""

    def __init__(self, lives: Path, sample: int) -> None:
        self.lives, self.sample = lives, sample

    def __getitems__(self, positions: list[tuple[int, int]]) -> Any:
        if (0, self.sample) in positions and (left := self.lives.read_bytes()):
            self.lives.write_bytes(left[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        indices = torch.tensor([index for _, index in positions])
        return indices, indices


def test_the_batches_of_a_dead_loader_process_follow_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lives = tmp_path / "lives"
    lives.write_bytes(b"x")
    batches = Batches(Deadly(lives, 5), POSITIONS, workers=2)  # type: ignore[arg-type]
    for _ in range(2):
        assert [x.tolist() for x, _ in batches] == [[2 * i, 2 * i + 1] for i in range(6)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("switokd: data loader process ")
    assert line.endswith(" is gone: killed, or out of memory (data.workers); it starts again")


def test_a_loader_process_that_always_dies_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "MOST_DEATHS", 1)
    lives = tmp_path / "lives"
    lives.write_bytes(b"xxx")
    batches = Batches(Deadly(lives, 0), POSITIONS, workers=1)  # type: ignore[arg-type]
    with pytest.raises(PeerError, match=r"is gone: .* 2 times without a batch between$"):
        next(iter(batches))
    assert lives.read_bytes() == b"x"


def test_what_was_given_out_but_not_delivered_is_given_out_again() -> None:
    undelivered = Undelivered([[(0, i)] for i in range(6)])
    for _ in range(2):
        undelivered.begin()
        asked = iter(undelivered)
        assert [next(asked)[0][1] for _ in range(4)] == [0, 1, 2, 3]
        undelivered.delivered()
        undelivered.delivered()
        assert [batch[0][1] for batch in undelivered] == [2, 3, 4, 5]
