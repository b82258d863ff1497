"""The starts of a run: when each began, where it continued, and what the interruptions cost.

The file attempts.jsonl of the run folder has one line per start, and one when the run finishes:

    {"started": SECONDS, "after_step": N, "steps_lost": M}
    {"finished": SECONDS, "step": N}

Seconds are those of `time.time`, because they span processes. The file is replaced as a whole, so
it has no torn line. Time between the end of a finished run and the next start is nobody's loss.

Not covered: steps of a run that was lost before it had recorded a decision.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from switokd.runs.json_lines import read_lines
from switokd.runtime.durable import replace_file

NAME = "attempts.jsonl"


def restarts_in(lines: Sequence[Mapping[str, Any]]) -> int:
    """Return how many starts in attempts.jsonl followed an interruption."""
    return sum("started" in line and "started" in before for before, line in pairwise(lines))


class Attempts:
    """All starts of the run in one folder, this one included.

    Methods that write raise OSError if the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        try:
            self._lines = read_lines(self._path)
        except ValueError:  # damaged: the run matters more than its statistics
            self._lines = []
        self._kept_at: float | None = None
        """When the state was complete from which this start continues; None: at the beginning."""
        self._lost_before = 0.0
        """Seconds that had been lost by then."""
        self._seconds_lost = 0.0

    def start(self, after_step: int, steps_lost: int, started: float | None = None) -> None:
        """Write down that this process continues after a step, with so many steps to do again.

        started: when the command was started; None: now.
        """
        at = time.time() if started is None else started
        if not self._lines and (after_step or steps_lost):  # a run of an earlier version
            self._lines.append({"started": at, "after_step": 0, "steps_lost": 0})
        line = {"started": at, "after_step": after_step, "steps_lost": steps_lost}
        self._write([*self._lines, line])

    def finish(self, step: int) -> None:
        """Write down that the run is complete after `step`."""
        self._write([*self._lines, {"finished": time.time(), "step": step}])

    def kept(self) -> dict[str, float]:
        """Return what a checkpoint that is taken now remembers, for `restore`."""
        return {"at": time.time(), "seconds_lost": self._seconds_lost}

    def restore(self, kept: Mapping[str, float]) -> None:
        """Continue from a checkpoint that remembers `kept`."""
        self._kept_at, self._lost_before = kept["at"], kept["seconds_lost"]

    def begin_training(self) -> None:
        """Note that steps follow from now on: what lies before, back to the checkpoint, is lost."""
        if len(self._starts) > 1:
            kept_at = self._first if self._kept_at is None else self._kept_at
            self._seconds_lost = self._lost_before + self._seconds_since(kept_at)

    @property
    def restarts(self) -> int:
        """Number of starts after an interruption; a finished run that is trained on is none."""
        return restarts_in(self._lines)

    def summary(self, training_seconds: float) -> dict[str, float]:
        """Return what the interruptions cost, for summary.json.

        training_seconds: duration of the steps that count.
        """
        seconds = self._seconds_since(self._first)
        return {
            "restarts": self.restarts,
            "steps_lost": sum(line["steps_lost"] for line in self._starts),
            "seconds_lost": self._seconds_lost,
            "seconds_since_first_start": seconds,
            "effective_training_ratio": min(training_seconds / max(seconds, 1e-9), 1.0),
        }

    @property
    def _starts(self) -> list[dict[str, Any]]:
        return [line for line in self._lines if "started" in line]

    @property
    def _first(self) -> float:
        return float(self._starts[0]["started"]) if self._starts else time.time()

    def _seconds_since(self, moment: float) -> float:
        """Return the seconds from a moment until now, without those in which the run was over."""
        seconds = time.time() - moment
        for line, after in zip(self._lines, self._lines[1:], strict=False):
            if "finished" in line and "started" in after and line["finished"] >= moment:
                seconds -= after["started"] - line["finished"]
        return max(seconds, 0.0)  # a clock may have been set back

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._lines = lines
        replace_file(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())
