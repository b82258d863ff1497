"""Other rules on recorded distances, against counts by hand and by the decision itself.

Not covered: how the counts are printed (`tests/cli/test_replay.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from switokd.distillation.decision import Decision, Mode, decide
from switokd.distillation.gap import Distances
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair
from switokd.errors import UsageError
from switokd.runs.replay.alternatives import MOST_BINS, alternatives
from switokd.runs.replay.record import FolderRecord
from switokd.runs.replay.replay import Replay, replay
from tests.runs.replay.records import Line, change, command, make_run
from tests.support import lines


def what_if(
    folder: Path,
    deltas: Sequence[float] = (),
    strategies: Sequence[str] = (),
    scales: Sequence[float] = (),
) -> Replay:
    record = FolderRecord(folder)
    return replay(record, alternatives(record.deciding, deltas, strategies, scales))


def test_a_record_of_four_steps_by_hand(tmp_path: Path) -> None:
    """e_s = 1, e_t = 0.5: epsilon is exp(-1/3), so delta = 1 - 0.7165 * 0.5 = 0.6417."""
    folder = make_run(tmp_path / "run", recipe="digits-1t1s", steps=4)
    threshold = 1 - math.exp(-0.5 / 1.5) * 0.5

    def edit(found: list[Line]) -> None:
        for line, gap in zip(found, (0.6, 0.7, 0.8, 0.55), strict=True):
            mode = "expert" if gap > threshold else "learning"
            line.update(gap=gap, e_s=1.0, e_t=0.5, epsilon=math.exp(-0.5 / 1.5), mode=mode)
            line["delta"] = threshold

    change(folder, edit)
    result = what_if(folder, [0.75, 0.5, 2.0], ["dml", "kd"], [0.9, 1.2])
    assert result.is_exact
    shown = {
        tally.label: (tally.expert[0], tally.paused["teacher"], tally.switches[0], tally.differing)
        for tally in (result.recorded, *result.alternatives)
    }
    assert shown == {
        "recorded": (2, 2, 2, 0),  # L E E L
        "delta 0.75": (1, 1, 2, 1),  # L L E L
        "delta 0.5": (4, 4, 0, 2),  # E E E E
        "delta 2": (0, 0, 0, 2),  # L L L L
        "dml": (0, 0, 0, 2),
        "kd": (4, 4, 0, 2),
        "scale 0.9": (3, 3, 1, 1),  # threshold 0.5775: E E E L
        "scale 1.2": (1, 1, 2, 1),  # threshold 0.7700: L L E L
    }
    rows = [tally.as_dict() for tally in result.alternatives]
    assert rows[0] == {
        "label": "delta 0.75",
        "expert": {"teacher-student": 0.25},
        "paused": {"teacher": 0.25},
        "switches": {"teacher-student": 2},
        "differing": 0.25,
    }


@pytest.mark.parametrize("semantics", ["paper", "published"])
@pytest.mark.parametrize("recipe", ["digits-2t1s", "digits-1t2s"])
def test_the_counts_are_those_of_whole_decisions(
    recipe: str, semantics: str, tmp_path: Path
) -> None:
    folder = make_run(
        tmp_path / "run", f"distillation.semantics={semantics}", recipe=recipe, steps=200, seed=3
    )
    result = what_if(folder, [0.4, 1.1], ["threshold:delta=0.6"], [0.5])
    rule = FolderRecord(folder).deciding.rule
    half = replace(rule, switch=lambda d, delta: rule.switch(d, delta * 0.5))
    rules = [
        *(replace(rule, fixed_delta=delta) for delta in (0.4, 1.1)),
        replace(rule, fixed_delta=0.6),
        half,
    ]
    found = lines(folder / "decisions.jsonl")
    of_step: dict[int, dict[Pair, Distances]] = {}
    for x in found:
        pair = Pair(x["teacher"], x["student"])
        of_step.setdefault(x["step"], {})[pair] = Distances(x["gap"], x["e_s"], x["e_t"], x["n"])
    recorded = [decide(step, d, rule) for step, d in of_step.items()]
    for tally, other in zip(result.alternatives, rules, strict=True):
        decisions = [decide(step, d, other) for step, d in of_step.items()]
        pairs = result.deciding.topology.pairs
        assert tally.expert == [count(decisions, pair) for pair in pairs]
        assert tally.paused == {
            teacher: sum(teacher in decision.paused for decision in decisions)
            for teacher in result.deciding.topology.teachers
        }
        assert sum(tally.switches) == sum(
            a.mode(pair) is not b.mode(pair) for pair in pairs for a, b in pairwise(decisions)
        )
        assert tally.differing == sum(
            a.mode(pair) is not b.mode(pair)
            for pair in pairs
            for a, b in zip(decisions, recorded, strict=True)
        )


def count(decisions: list[Decision], pair: Pair) -> int:
    return sum(decision.mode(pair) is Mode.EXPERT for decision in decisions)


def test_a_held_teacher_stays_held_and_a_scaled_threshold_scaled(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", recipe="digits-1t1s", steps=2)
    base = {"gap": 0.6, "e_s": 1.0, "e_t": 0.5, "epsilon": math.exp(-0.5 / 1.5)}
    threshold = 1 - math.exp(-0.5 / 1.5) * 0.5

    def edit(found: list[Line]) -> None:
        found[0].update(base, delta=threshold, mode="expert", held=True)
        found[1].update(base, delta=threshold * 0.5, mode="expert", delta_scale=0.5)

    change(folder, edit)
    hold = {"action": "hold", "teacher": "teacher", "mode": "expert", "until_step": 1}
    scale = {"action": "scale", "factor": 0.5, "first_step": 2}
    command(folder, {**hold, "first_step": 1}, scale)
    result = what_if(folder, [0.61], ["dml", "switokd"], [1.5, 2.0])
    assert result.is_exact
    experts = {tally.label: tally.expert[0] for tally in result.alternatives}
    # A fixed threshold holds as it is; other rules get the operator's factor as well.
    assert experts == {"delta 0.61": 1, "dml": 1, "switokd": 2, "scale 1.5": 2, "scale 2": 1}


def test_a_run_with_published_semantics_is_compared_with_any_strategy(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "distillation.semantics=published", recipe="digits-1t2s")
    result = what_if(folder, strategies=["switokd,dml,kd"])
    same, dml, kd = result.alternatives
    assert (same.differing, dml.expert, kd.expert) == (0, [0, 0], [40, 40])
    assert (same.paused, kd.paused) == ({"teacher": 0}, {"teacher": 40})  # published: by zero
    assert make_strategy("dml").pauses is False


def test_a_long_record_has_few_bins_and_the_same_sums(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3 * MOST_BINS + 7)
    found = lines(folder / "decisions.jsonl")
    bins = what_if(folder).recorded.bins
    assert MOST_BINS <= len(bins) <= 2 * MOST_BINS
    assert {b.steps for b in bins[:-1]} == {2}
    assert sum(b.steps for b in bins) == 3 * MOST_BINS + 7
    assert sum(sum(b.expert) for b in bins) == sum(x["mode"] == "expert" for x in found)
    assert sum(b.gap[0] for b in bins) == pytest.approx(sum(x["gap"] for x in found[::2]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"deltas": [2.5]}, "--delta 2.5: an L1 distance is from 0 to 2"),
        ({"deltas": [math.nan]}, "--delta nan"),
        ({"scales": [0]}, "--scale 0: a factor of the threshold is above 0"),
        ({"scales": [math.inf]}, "--scale inf"),
        ({"strategies": ["swit"]}, "strategy 'swit' is not one of"),
        ({"strategies": ["threshold"]}, "strategy threshold cannot be created"),
        ({"strategies": ["threshold:delta=1:x"]}, "--strategy threshold:delta=1:x: found 'x'"),
        ({"deltas": [0.1] * 101}, "101 alternatives; at most 100"),
    ],
)
def test_a_wrong_alternative_is_one_line(
    wrong: dict[str, list[object]], message: str, tmp_path: Path
) -> None:
    deciding = FolderRecord(make_run(tmp_path / "run", steps=1)).deciding
    with pytest.raises(UsageError, match=r"^[^\n]*$") as caught:
        alternatives(deciding, **wrong)  # type: ignore[arg-type]
    assert message in str(caught.value)
