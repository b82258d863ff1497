"""What a terminal shows of a run: how far it is.

Not covered: tables of pairs, networks and ranks (`test_operate.py`).
"""

from __future__ import annotations

import pytest

from switokd.cli.run_tables import console, status_group
from switokd.services.coordinator.run_view import status_view
from switokd.v1 import coordinator_pb2 as pb


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, "r training  step 150  here\n"),
        ({"planned_steps": 600}, "step 150 of 600 (25 %)  here\n"),
        ({"training_epoch": 2}, "step 150, epoch 2  here\n"),
        (
            {"planned_steps": 1200, "training_epoch": 2, "planned_epochs": 16},
            "step 150 of 1,200 (12 %), epoch 2 of 16  here\n",
        ),
    ],
)
def test_the_heading_says_how_far_a_run_is(
    known: dict[str, int], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = pb.GetRunStatusResponse(state=pb.RUN_STATE_TRAINING, recorded_step=150, **known)  # type: ignore[arg-type]
    console().print(status_group(status_view("r", status, "here")))
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
    assert words in printed
