"""Records of real runs follow from their distances; each changed value is named.

Not covered: rows that are missing or in the wrong order (`test_sequence.py`).
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

import switokd
from switokd.distillation.decision import decide
from switokd.distillation.gap import Distances, delta, epsilon
from switokd.distillation.topology import Pair
from switokd.errors import UsageError
from switokd.runs.replay.derive import Deriver
from switokd.runs.replay.record import FolderRecord
from tests.runs.replay.records import Line, change, command, distances, make_run, named, replayed
from tests.support import lines

SMALL = {
    "schedule.max_steps": 12,
    "data.train_samples": 400,
    "placement": "replicated",
    "coordinator": {"address": "off"},
}
RUNS = {
    "2T1S": ["digits-2t1s"],
    "2T1S published, threshold": ["digits-2t1s", "published", "threshold"],
    "1T2S published": ["digits-1t2s", "published"],
    "1T1S vanilla": ["digits-1t1s", "paper", "vanilla"],
}


def train(folder: Path, recipe: str, semantics: str = "paper", strategy: str = "switokd") -> Path:
    """Train a few steps in this process, with networks that take milliseconds."""
    networks = {
        "digits-2t1s": ("teacher1", "teacher2", "student"),
        "digits-1t1s": ("teacher", "student"),
    }
    names = networks.get(recipe, ("teacher", "student1", "student2"))
    small = "tests.training.test_training:small"
    kwargs = {"delta": 0.3} if strategy == "threshold" else {}
    settings = {
        **SMALL,
        **{f"networks.{name}.model": small for name in names},
        "run_dir": str(folder),
        "distillation.strategy": strategy,
        "distillation.strategy_kwargs": kwargs,
        "distillation.semantics": semantics,
    }
    return switokd.train(recipe, settings).path


@pytest.mark.parametrize("case", RUNS)
def test_a_real_run_follows_from_its_distances(case: str, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", *RUNS[case])
    result = replayed(folder)
    assert named(result) == []
    assert result.is_exact
    count = len(result.deciding.topology.pairs)
    assert (result.recorded.steps, result.rows) == (12, 12 * count)
    found = lines(folder / "decisions.jsonl")
    expert = [line["mode"] == "expert" for line in found]
    assert sum(result.recorded.expert) == sum(expert)
    summary = json.loads((folder / "summary.json").read_text())["networks"]
    paused = {name: n["steps_paused"] for name, n in summary.items() if n["role"] == "teacher"}
    assert result.recorded.paused == paused


def flip(number: float, rng: random.Random) -> float:
    """The number with one digit of its text changed."""
    text = repr(number)
    digits = [i for i, c in enumerate(text) if c.isdigit() and "e" not in text[:i]]
    while True:
        i = rng.choice(digits)
        other = float(text[:i] + rng.choice("0123456789") + text[i + 1 :])
        if other != number:
            return other


@pytest.mark.parametrize("field", ["epsilon", "delta", "mode", "n", "e_s", "e_t", "gap"])
@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_digit_is_named(field: str, seed: int, tmp_path: Path) -> None:
    folder, rng = make_run(tmp_path / "run", seed=seed), random.Random(seed)
    assert replayed(folder).is_exact
    clear = [
        i
        for i, line in enumerate(lines(folder / "decisions.jsonl"))
        if abs(line["gap"] - line["delta"]) > 1e-3 < abs(line["e_s"] - line["e_t"])
    ]
    at = rng.choice(clear)  # a mode that rounding may change is no difference
    old: Line = {}

    def edit(found: list[Line]) -> None:
        old.update(found[at])
        new = {"mode": {"expert": "learning", "learning": "expert"}[old["mode"]], "n": -1}
        found[at][field] = new.get(field) or flip(old[field], rng)

    change(folder, edit)
    new = lines(folder / "decisions.jsonl")[at]
    result = replayed(folder)
    assert {(d.step, d.teacher, d.place) for d in result.differences} <= {
        (old["step"], old["teacher"], at + 1)
    }
    if field in ("epsilon", "delta", "mode"):
        (difference,) = result.differences
        assert (difference.field, difference.recorded, difference.derived) == (
            *(field, new[field], old[field]),
        )
    elif field == "gap":  # a distance follows from nothing: only what is impossible is seen
        d = Distances(new["gap"], new["e_s"], new["e_t"], 32)
        is_expert = d.gap > new["delta"] and d.e_t < d.e_s
        low, high = abs(d.e_s - d.e_t) - 1e-4, min(d.e_s + d.e_t + 1e-4, 2.00002)
        is_seen = is_expert != (new["mode"] == "expert") or not low <= d.gap <= high
        assert bool(result.differences) == is_seen
    else:
        assert result.differences


def test_the_sign_of_a_zero_counts(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run",
        "distillation.strategy=threshold",
        "distillation.strategy_kwargs={delta: 0}",
        recipe="digits-1t1s",
        steps=3,
    )
    change(folder, lambda found: found[1].update(delta=-0.0))
    assert [
        (d.step, d.field, str(d.recorded), str(d.derived)) for d in replayed(folder).differences
    ] == [(2, "delta", "-0.0", "0.0")]


def test_all_differences_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    change(folder, lambda found: [line.update(epsilon=0.1) for line in found])
    result = replayed(folder, shown=3)
    assert result.difference_count == 80
    assert [d.place for d in result.differences] == [1, 2, 3]


@pytest.mark.parametrize("semantics", ["paper", "published"])
@pytest.mark.parametrize("recipe", ["digits-2t1s", "digits-1t2s", "digits-1t1s"])
def test_the_derived_steps_are_those_of_the_decision(
    recipe: str, semantics: str, tmp_path: Path
) -> None:
    """On random distances, with ties and corners, both ways through the code agree with it."""
    record = FolderRecord(
        make_run(
            tmp_path / "run",
            f"distillation.semantics={semantics}",
            recipe=recipe,
            steps=300,
            seed=9,
        )
    )
    told: list[object] = []
    deriver, rule, rng = Deriver(record, told.append), record.deciding.rule, random.Random(9)
    pairs, rows = record.deciding.topology.pairs, list(record.read())
    for step in range(1, 301):
        of_step = {pair: distances(rng) for pair in pairs}
        decision = decide(step, of_step, rule)
        mine = dict(enumerate(rows[(step - 1) * len(pairs) : step * len(pairs)]))
        for derived in (deriver.derive(mine), deriver._compared(mine)):
            assert derived is not None
            assert tuple(derived.distances) == tuple(of_step.values())
            assert tuple(derived.deltas) == tuple(p.delta for p in decision.pairs)
            assert derived.modes == tuple(p.mode.value == "expert" for p in decision.pairs)
    assert told == []


def near_threshold() -> tuple[Line, float]:
    """A line whose gap is its threshold but for rounding, and the threshold."""
    d = Distances(0.0, 1.0, 0.8, 32)
    threshold = delta(d, epsilon(d))
    gap = math.nextafter(threshold, 2.0)
    return {
        "step": 1,
        "teacher": "teacher",
        "student": "student",
        "gap": gap,
        "e_s": 1.0,
        "e_t": 0.8,
        "epsilon": epsilon(d),
        "delta": threshold,
        "mode": "expert",
        "n": 32,
    }, threshold


@pytest.mark.parametrize("mode", ["expert", "learning"])
def test_a_mode_that_rounding_decides_is_no_difference(mode: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", recipe="digits-1t1s", steps=1)
    line, _ = near_threshold()
    change(folder, lambda found: found[0].update(line, mode=mode))
    result = replayed(folder)
    assert result.is_exact
    assert [(r.step, r.recorded, r.derived) for r in result.rounded] == (
        [(1, "learning", "expert")] if mode == "learning" else []
    )
    assert result.recorded.expert == [mode == "expert"]
    change(folder, lambda found: found[0].update(gap=line["gap"] + 1e-4, mode="learning"))
    assert named(replayed(folder)) == [(1, "teacher", "mode", "learning", "expert")]


def test_commands_of_an_operator_are_followed_and_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", recipe="digits-1t1s", steps=4)
    other = {"expert": "learning", "learning": "expert"}
    held = other[lines(folder / "decisions.jsonl")[0]["mode"]]
    hold = {"action": "hold", "teacher": "teacher", "mode": held, "first_step": 1, "until_step": 1}
    scale = {"action": "scale", "factor": 2.5, "first_step": 4}

    def edit(found: list[Line]) -> None:
        found[0].update(held=True, mode=held)
        scaled = found[3]["delta"] * 2.5
        is_expert = found[3]["gap"] > scaled and found[3]["e_t"] < found[3]["e_s"]
        found[3].update(delta_scale=2.5, delta=scaled, mode=["learning", "expert"][is_expert])

    command(folder, hold, scale)
    missing = replayed(folder)
    assert {(d.step, d.field) for d in missing.differences} == {(1, "held"), (4, "delta_scale")}
    change(folder, edit)
    result = replayed(folder)
    assert (named(result), result.held, result.scaled) == ([], 1, 1)
    command(folder)
    assert named(replayed(folder)) == [
        (1, "teacher", "held", True, False),
        (4, "teacher", "delta_scale", 2.5, 1.0),
    ]
    command(folder, {**hold, "mode": other[held]}, scale)
    assert named(replayed(folder)) == [(1, "teacher", "mode", held, other[held])]
    command(folder, hold, scale)
    change(folder, lambda found: found[3].update(delta_scale=2.0))
    assert {d.field for d in replayed(folder).differences} >= {"delta"}
    change(folder, lambda found: found[0].update(mode="away"))
    assert replayed(folder).differences[0].field == "mode"


def test_the_paused_steps_of_the_metrics_are_compared(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    found = lines(folder / "decisions.jsonl")
    rows = [
        {
            "step": step,
            "role": "teacher",
            "network": name,
            "steps_paused": sum(
                line["mode"] == "expert" and line["teacher"] == name and line["step"] <= step
                for line in found
            ),
        }
        for step in (20, 40)
        for name in ("teacher1", "teacher2")
    ]
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert replayed(folder).is_exact
    right = rows[3]["steps_paused"]
    rows[3]["steps_paused"] = 99
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert named(replayed(folder)) == [(40, "teacher2", "steps_paused", 99, right)]


def test_from_python(tmp_path: Path) -> None:
    run = switokd.load_run(make_run(tmp_path / "run", recipe="digits-1t1s"))
    result = run.replay(deltas=[0.5], strategies=["dml"], scales=[0.5])
    assert result.is_exact
    assert [tally.label for tally in result.alternatives] == ["delta 0.5", "dml", "scale 0.5"]
    with pytest.raises(UsageError, match="--delta 3: an L1 distance is from 0 to 2"):
        run.replay(deltas=[3])


def test_a_strategy_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ours.py").write_text(
        "from switokd.distillation.decision import Mode\n"
        "from switokd.distillation.strategies import Strategy\n"
        "class Own(Strategy):\n"
        "    pauses = True\n"
        "    def __init__(self, least=1.0): self.least = least\n"
        "    def switch(self, d, delta):\n"
        "        return Mode.EXPERT if d.gap + delta > self.least else Mode.LEARNING\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ("distillation.strategy=ours:Own", "distillation.strategy_kwargs={least: 0.7}")
    run = switokd.load_run(make_run(tmp_path / "run", *own))
    result = run.replay(strategies=["ours:Own:least=0.7,ours:Own:least=9"])
    assert result.is_exact
    same, never = result.alternatives
    assert (same.expert, same.differing) == (result.recorded.expert, 0)
    assert never.expert == [0, 0]
    assert 0 < sum(same.expert) < 80


def test_a_pair_that_is_switched_off_has_no_decisions(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "pairs.teacher1.student.enabled=true")
    change(folder, lambda found: found.append({**found[-1], "step": 41, "teacher": "student"}))
    assert Pair("teacher1", "student") in FolderRecord(folder).deciding.topology.pairs
    assert named(replayed(folder)) == [
        (41, "student", "row", "a row that the run cannot have", None)
    ]
