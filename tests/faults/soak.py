"""Many short runs with random faults: `python -m tests.faults.soak --faults 1000 --seed 0`.

Each run has one to four faults, drawn from the seed and the run's number, and must end in the bits
of the undisturbed run. Prints every difference with the command that replays it, and what the runs
and the coordinator used. The exit code is 1 if anything was wrong.

Not covered: several machines (`hosts.py`); faults of a data set's own files.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psutil

from tests.faults.moments import PHASES, PHASES_OF_RANK_0
from tests.faults.outside import CONNECTION, COORDINATOR, Outside
from tests.faults.plan import Fault
from tests.faults.survive import Survival, check, remove, survive, undisturbed
from tests.support import lines

ENDING = ("kill", "terminate", "kill-launcher", "terminate-launcher", "flip-bit", "tear")
"""Kinds that end the start of a run."""
DURING = ("stop", "delay", "hold-gil", "double", "limit-files", "nan-images", "nan-gradient")
KINDS = (*ENDING, *DURING, *sorted(CONNECTION), *sorted(COORDINATOR))
LAST_STEP = 44


def draw(seed: int, run: int) -> list[Fault]:
    """Draw the faults of one run."""
    rng = random.Random(f"{seed}/{run}")
    return [_draw_fault(rng) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))]


def _draw_fault(rng: random.Random) -> Fault:
    kind = rng.choice(KINDS)
    phase = rng.choice((*PHASES, *PHASES_OF_RANK_0))
    if kind.startswith("nan"):
        phase = "loading"  # later, the flag would hit the images of the next step
    elif phase == "starting" and kind in COORDINATOR | CONNECTION:
        phase = "exchange"
    at_rank_0 = phase in PHASES_OF_RANK_0 or kind in ("limit-files", "flip-bit", "tear")
    return Fault(
        kind,
        phase,
        step=0 if phase == "starting" else rng.randint(1, LAST_STEP),
        rank=0 if at_rank_0 else rng.randrange(2),
        seconds=round(rng.uniform(0.1, 1.0), 2),
        start=rng.choice((1, 1, 1, 2)),
    )


@dataclass
class Soak:
    """What came of all runs."""

    happened: Counter[str] = field(default_factory=Counter)
    """Number of faults by kind."""
    phases: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    starts: int = 0
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    rank_bytes: list[int] = field(default_factory=list)
    rank_descriptors: list[int] = field(default_factory=list)
    coordinator: list[tuple[int, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, result: Survival, outside: Outside) -> None:
        """Add one run."""
        self.runs, self.starts = self.runs + 1, self.starts + len(result.codes)
        self.happened.update(fault.kind for fault in result.used)
        self.phases.update(fault.phase for fault in result.used)
        self.seconds.append(result.seconds)
        if result.codes[-1] == 0:
            self.ratios.append(result.summary["effective_training_ratio"])
        resources = result.folder / "plan" / "resources.jsonl"
        for line in lines(resources) if resources.exists() else []:
            self.rank_bytes.append(line["rss"])
            self.rank_descriptors.append(line["descriptors"])
        with suppress(psutil.Error):  # it was killed a moment ago
            self.coordinator.append(outside.resources)

    def report(self) -> str:
        """Return all figures as lines of text."""
        total = self.happened.total()
        text = [
            f"{total} faults in {self.runs} runs with {self.starts} starts, "
            f"{sum(self.seconds):.0f} s: {len(self.wrong)} runs with a difference or problem",
            f"effective training time ratio: {_spread(self.ratios, '.2f')}",
            f"seconds per run: {_spread(self.seconds, '.1f')}",
            "memory of a rank in step 40, MiB: "
            + _spread([n / 2**20 for n in self.rank_bytes], ".0f"),
            f"open descriptors of a rank in step 40: {_spread(self.rank_descriptors, 'd')}",
        ]
        if len(self.coordinator) > 1:
            for index, what, unit in (
                (0, "memory of the coordinator, MiB", 2**20),
                (1, "open descriptors of the coordinator", 1),
            ):
                values = [round(sample[index] / unit) for sample in self.coordinator]
                text.append(f"{what}: first {values[0]}, last {values[-1]}, most {max(values)}")
        text += ["faults by kind:"] + [f"  {k:22}{n}" for k, n in self.happened.most_common()]
        text += ["faults by phase:"] + [f"  {k:22}{n}" for k, n in self.phases.most_common()]
        return "\n".join(text + self.wrong)


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "none"
    middle = statistics.median_low(values)
    return f"least {min(values):{form}}, median {middle:{form}}, most {max(values):{form}}"


def soak(
    top: Path, seed: int, faults: int, first: int = 0, runs: int | None = None, minutes: float = 1e9
) -> Soak:
    """Train until so many faults have happened, so many runs are done or the time is over.

    first: number of the first run. Folders of runs with a problem stay.
    """
    total = Soak()
    deadline = time.monotonic() + 60 * minutes
    expected = undisturbed(top / "undisturbed")
    outside = Outside(top / "coordinator")
    try:
        for run in count(first):
            is_enough = total.happened.total() >= faults or total.runs == runs
            if is_enough or time.monotonic() > deadline:
                break
            planned = draw(seed, run)
            result = survive(top / f"run-{run}", planned, outside)
            total.add(result, outside)
            found = check(result, expected)
            if found:
                command = f"python -m tests.faults.soak --seed {seed} --run {run}"
                total.wrong.append(f"run {run}: {'; '.join(found)}; {planned}; replay: {command}")
                print(total.wrong[-1], file=sys.stderr, flush=True)
            else:
                remove(result)
            if total.runs % 10 == 0:
                print(total.report(), file=sys.stderr, flush=True)
    finally:
        outside.close()
    return total


def main() -> int:
    """Soak as the command line asks for; the exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="number of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--run", type=int, help="replay the run with this number")
    parser.add_argument("--folder", type=Path, help="new folder for the runs")
    arguments = parser.parse_args()
    top = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"runs are in {top}", file=sys.stderr)
    first, runs = (0, None) if arguments.run is None else (arguments.run, 1)
    total = soak(top.resolve(), arguments.seed, arguments.faults, first, runs, arguments.minutes)
    print(total.report())
    return 1 if total.wrong else 0


if __name__ == "__main__":  # a fork server imports this file again
    sys.exit(main())
