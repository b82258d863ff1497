"""The message of a run that was asked to stop says how it goes on.

Not covered: the signal (`tests/training/test_resume.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from switokd.runs.checkpoints import write
from switokd.runtime.lifecycle import Preempted
from switokd.worker import how_to_continue


@pytest.mark.parametrize("is_saved", [True, False])
def test_the_command_is_named_and_whether_there_is_a_checkpoint(
    is_saved: bool, tmp_path: Path
) -> None:
    if is_saved:
        write(tmp_path, 3, {"step": 3}, {})
    verb = "continue" if is_saved else "there is no checkpoint; start again"
    with pytest.raises(Preempted) as stopped, how_to_continue(tmp_path):
        raise Preempted("stopped by SIGTERM after step 3")
    assert str(stopped.value) == (
        f"stopped by SIGTERM after step 3; {verb} with: switokd train --resume {tmp_path}"
    )
