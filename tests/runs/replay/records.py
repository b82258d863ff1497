"""Run folders with made-up distances, decided as a run decides them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switokd.config.run_file import load
from switokd.distillation.decision import decide
from switokd.distillation.gap import Distances
from switokd.runs.replay.record import FolderRecord
from switokd.runs.replay.replay import Replay, replay
from tests.support import lines

Line = dict[str, Any]


def distances(rng: random.Random) -> Distances:
    """Distances that obey the triangle inequality; some are at a corner of what is possible."""
    e_s, e_t = (rng.choice([0.0, 2.0, rng.uniform(0, 2)]) for _ in range(2))
    low, high = abs(e_s - e_t), min(e_s + e_t, 2.0)
    return Distances(rng.choice([low, high, rng.uniform(low, high)]), e_s, e_t, 32)


def make_run(
    folder: Path, *settings: str, recipe: str = "digits-2t1s", steps: int = 40, seed: int = 0
) -> Path:
    """Write config.yaml and decisions.jsonl of a run that is still going on; return the folder."""
    config, rng = load(recipe, settings), random.Random(seed)
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump())
    found: list[Line] = []
    for step in range(1, steps + 1):
        of_step = {pair: distances(rng) for pair in config.topology.pairs}
        found += (
            {
                "step": step,
                "teacher": p.pair.teacher,
                "student": p.pair.student,
                "gap": p.distances.gap,
                "e_s": p.distances.e_s,
                "e_t": p.distances.e_t,
                "epsilon": p.epsilon,
                "delta": p.delta,
                "mode": p.mode.value,
                "n": 32,
            }
            for p in decide(step, of_step, config.method.rule).pairs
        )
    write(folder, found)
    return folder


def write(folder: Path, found: list[Line]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in found)
    (folder / "decisions.jsonl").write_text(text)


def command(folder: Path, *given: Line) -> None:
    """Write the file of the commands that the run has taken."""
    (folder / "commands.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))


def change(folder: Path, edit: Callable[[list[Line]], object]) -> None:
    """Let `edit` change the lines of a record in place."""
    found = lines(folder / "decisions.jsonl")
    edit(found)
    write(folder, found)


def replayed(folder: Path, shown: int = 20) -> Replay:
    return replay(FolderRecord(folder), (), shown)


def named(result: Replay) -> list[tuple[object, ...]]:
    """Step, teacher, field, recorded and derived value of each difference."""
    assert result.difference_count >= len(result.differences)
    return [(d.step, d.teacher, d.field, d.recorded, d.derived) for d in result.differences]
