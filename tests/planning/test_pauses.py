"""Expected pauses: from shares, and from the decision log of an earlier run.

Not covered: the effect of pauses on a step (`test_cost_model.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from switokd.distillation.couplings import Couplings
from switokd.distillation.method import Method
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Role, Topology
from switokd.errors import UsageError
from switokd.planning.pauses import Pauses, parse_shares

TOPOLOGY = Topology((("large", Role.TEACHER), ("small", Role.TEACHER), ("student", Role.STUDENT)))


def test_pauses_by_shares() -> None:
    pauses = Pauses.independent({"a": 0.5, "b": 0.2, "c": 0.0})
    assert dict(pauses.patterns) == pytest.approx(
        {
            frozenset(): 0.4,
            frozenset("a"): 0.4,
            frozenset("b"): 0.1,
            frozenset("ab"): 0.1,
        }
    )
    assert [pauses.share(t) for t in "abc"] == pytest.approx([0.5, 0.2, 0])


def test_pauses_of_many_teachers_are_a_reproducible_sample() -> None:
    shares = {f"t{i}": 0.5 for i in range(12)}
    pauses = Pauses.independent(shares)
    assert pauses == Pauses.independent(shares)
    assert len(pauses.patterns) <= 64
    assert sum(p for _, p in pauses.patterns) == pytest.approx(1)


def test_default_pauses() -> None:
    def default(strategy: str) -> Pauses:
        return Pauses.default(Method(Couplings(TOPOLOGY), make_strategy(strategy)))

    assert default("dml") == Pauses.none()
    assert default("switokd").share("large") == pytest.approx(0.3)
    assert default("kd").share("large") == 1.0


def write_log(folder: Path, *steps: dict[str, str]) -> Path:
    """Write decisions.jsonl. steps: one dict {"TEACHER STUDENT": mode} per step."""
    lines = [
        json.dumps(
            {"step": i, "teacher": pair.split()[0], "student": pair.split()[1], "mode": mode}
        )
        for i, pairs in enumerate(steps, 1)
        for pair, mode in pairs.items()
    ]
    (folder / "decisions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_teacher_of_an_earlier_run_is_paused_if_it_is_for_all_students(tmp_path: Path) -> None:
    topology = Topology(
        (("a", Role.TEACHER), ("b", Role.TEACHER), ("s", Role.STUDENT), ("u", Role.STUDENT))
    )
    run = write_log(
        tmp_path,
        {"a s": "expert", "a u": "expert", "b s": "expert", "b u": "expert"},
        {"a s": "expert", "a u": "learning", "b s": "learning", "b u": "learning"},
        {"a s": "expert", "a u": "expert", "b s": "expert", "b u": "expert"},
        {"a s": "learning", "a u": "learning", "b s": "expert", "b u": "expert"},
    )
    pauses = Pauses.of_run(run, topology)
    assert dict(pauses.patterns) == {
        frozenset("ab"): 0.5,
        frozenset(): 0.25,
        frozenset("b"): 0.25,
    }
    assert "the 4 steps" in pauses.source


def test_shares_on_the_command_line() -> None:
    topology = TOPOLOGY
    assert parse_shares(["0.5"], topology) == {"large": 0.5, "small": 0.5}
    assert parse_shares(["small=0.25", "0.5"], topology) == {"large": 0.5, "small": 0.25}
    assert parse_shares(["small=0.25"], topology) == {"large": 0, "small": 0.25}


def test_errors_are_one_line(tmp_path: Path) -> None:
    topology = TOPOLOGY
    other = write_log(tmp_path, {"x y": "expert"})
    for folder, line in (
        ("1", '{"step": 1, "teacher": "x", "mode": [1]}'),
        ("2", '{"step": 1, "teacher": 5, "mode": "expert"}'),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "decisions.jsonl").write_text(line + "\n")
    cases: dict[str, Callable[[], object]] = {
        "no teacher 'larg'; did you mean 'large'": lambda: parse_shares(["larg=1"], topology),
        "from 0 to 1": lambda: parse_shares(["1.5"], topology),
        "a share is a number": lambda: parse_shares(["large=x"], topology),
        "has the teachers x; the run file has": lambda: Pauses.of_run(other, topology),
        "1/decisions.jsonl is not the decision log": lambda: Pauses.of_run(
            tmp_path / "1", topology
        ),
        "2/decisions.jsonl is not the decision log": lambda: Pauses.of_run(
            tmp_path / "2", topology
        ),
        "cannot be read": lambda: Pauses.of_run(tmp_path / "none", topology),
    }
    for words, call in cases.items():
        with pytest.raises(UsageError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
