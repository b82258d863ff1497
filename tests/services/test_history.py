"""What is kept of a run for the status page: few bytes for any length, and nothing made up."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from switokd.distillation.decision import NOTHING, Decision, InForce, Mode, Rule, decide
from switokd.distillation.gap import Distances
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Role, Topology
from switokd.services.coordinator.columns import Columns
from switokd.services.coordinator.history import (
    LEAST_ROWS,
    MOST_EVENTS,
    MOST_MARKS,
    MOST_ROWS,
    HistoryMemory,
    RunHistory,
)
from switokd.services.coordinator.journal import SqliteJournal
from switokd.services.coordinator.journal_history import (
    fill_history,
    history_from,
    history_statements,
)
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.reasons import REASONS, reasons
from switokd.services.coordinator.status_page.streams import cursor_of

ROLES = (("t1", Role.TEACHER), ("t2", Role.TEACHER), ("s", Role.STUDENT))
PLAN = Plan(Topology(ROLES, frozenset()), ((0,), (1,), (2,)), "switokd", "d", 60.0)
PAIRS = PLAN.topology.pairs
RULE = Rule(make_strategy("switokd").switch)
LEARNS, PAUSES, NOT_BETTER = (0.1, 1.0, 0.9), (1.5, 1.0, 0.1), (1.5, 0.5, 0.6)


def decision(step: int, *distances: tuple[float, float, float], **more: Any) -> Decision:
    """A decision for the pairs; the last distances count for all further pairs."""
    found = [Distances(*distances[min(i, len(distances) - 1)], 8) for i in range(len(PAIRS))]
    return decide(step, dict(zip(PAIRS, found, strict=True)), RULE, **more)


def total(column: dict[str, list[int]]) -> dict[str, int]:
    return {reason: sum(counts) for reason, counts in column.items()}


def test_a_reader_of_the_earlier_coordinator_misses_no_event_of_the_next() -> None:
    """Also if the earlier one has kept nothing of what it has told."""
    earlier = RunHistory(PLAN)
    earlier.note("new", "")
    known = cursor_of(earlier.document()["cursor"])
    news = history_from(None, "r", PLAN, HistoryMemory(2**30)).document(known)["events"]
    assert [event["kind"] for event in news] == ["coordinator"]


def test_each_step_is_counted_once_however_long_the_run_is() -> None:
    history = RunHistory(PLAN)
    generator = random.Random(0)
    gaps = [generator.uniform(0.0, 2.0) for _ in range(20_000)]
    for step, gap in enumerate(gaps, 1):
        history.add(decision(step, (gap, 1.0, 0.1)))
    document = history.document()
    assert LEAST_ROWS < len(document["step"]) <= MOST_ROWS
    assert sum(document["count"]) == len(gaps)
    pair = document["pairs"][0]
    weighted = sum(g * n for g, n in zip(pair["gap"], document["count"], strict=True))
    assert weighted / len(gaps) == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    assert (min(pair["low"]), max(pair["high"])) == pytest.approx((min(gaps), max(gaps)), abs=1e-6)
    learned = sum(decide_mode(gap) is Mode.LEARNING for gap in gaps)
    assert sum(pair["learning"]) == learned
    assert total(document["teachers"][0]["reasons"]) == {
        "gap_within_threshold": learned,
        "gap_too_large": len(gaps) - learned,
    }
    assert document["stride"] == 32
    assert history.size < 2**18


def decide_mode(gap: float) -> Mode:
    return decision(1, (gap, 1.0, 0.1)).pairs[0].mode


@pytest.mark.parametrize(
    ("distances", "in_force", "expected"),
    [
        (LEARNS, NOTHING, "gap_within_threshold"),
        (PAUSES, NOTHING, "gap_too_large"),
        (NOT_BETTER, NOTHING, "not_better"),
        (LEARNS, InForce(dict.fromkeys(PAIRS, Mode.EXPERT)), "held_paused"),
        (PAUSES, InForce(dict.fromkeys(PAIRS, Mode.LEARNING)), "held_learning"),
    ],
)
def test_why_a_teacher_learns_or_pauses(
    distances: tuple[float, float, float], in_force: InForce, expected: str
) -> None:
    made = decision(1, distances, in_force=in_force)
    assert reasons(made, ("t1", "t2")) == [expected, expected]
    assert expected in REASONS


@pytest.mark.parametrize(
    ("strategy", "distances", "expected"),
    [("dml", PAUSES, "strategy_learning"), ("kd", LEARNS, "strategy_paused")],
)
def test_a_strategy_with_another_rule(
    strategy: str, distances: tuple[float, float, float], expected: str
) -> None:
    rule = Rule(make_strategy(strategy).switch, pauses=strategy == "kd")
    made = decide(1, dict.fromkeys(PAIRS, Distances(*distances, 8)), rule)
    assert set(reasons(made, ("t1", "t2"))) == {expected}


def test_a_late_step_finds_its_place() -> None:
    columns = Columns(("sum", "mean", "low", "high"), 8)
    for step in (1, 2, 5, 6):
        columns.add(step, 0.0, (1, step, step, step))
    generation = columns.generation
    columns.add(3, 0.0, (1, 3, 3, 3))
    assert columns.generation > generation
    assert columns.arrays[0].tolist() == [1, 2, 3, 5, 6]
    for step in range(7, 40):
        columns.add(step, 0.0, (1, step, step, step))
    columns.add(4, 0.0, (1, 4, 4, 4))
    columns.flush()
    assert sum(columns.arrays[2]) == sum(columns.arrays[3]) == 39
    assert (min(columns.arrays[5]), max(columns.arrays[6])) == (1, 39)
    mean = sum(m * n for m, n in zip(columns.arrays[4], columns.arrays[2], strict=True)) / 39
    assert mean == pytest.approx(20.0)


def test_steps_that_a_new_start_does_again_are_taken_out() -> None:
    history = RunHistory(PLAN)
    for step in range(1, 21):
        history.add(decision(step, LEARNS))
        history.measure("s", step, test_accuracy=0.5)
    before = history.version
    history.cut(11)
    document = history.document(before)
    assert document["from"] == document["marks_from"] == 0, "the reader must take all again"
    assert document["step"] == list(range(1, 11))
    assert document["marks"]["step"] == list(range(1, 11))


def test_a_reader_gets_what_is_new_and_ends_with_the_whole() -> None:
    history, generator = RunHistory(PLAN), random.Random(1)
    rows: list[int] = []
    counts: list[int] = []
    marks: list[float] = []
    events: dict[int, str] = {}
    cursor: tuple[int, ...] = ()
    sent = 0
    for step in range(1, 4001):
        history.add(decision(step, (generator.uniform(0.0, 2.0), 1.0, 0.1)))
        if step % 50 == 0:
            history.measure("t1", step, test_accuracy=step / 4000)
            history.note("notice", f"step {step}")
        if step % 37 == 0 or step == 4000:
            part = history.document(cursor)
            sent += len(part["step"])
            rows = rows[: part["from"]] + part["step"]
            counts = counts[: part["from"]] + part["count"]
            marks = marks[: part["marks_from"]] + part["marks"]["value"]
            events.update({event["number"]: event["text"] for event in part["events"]})
            cursor = tuple(map(int, part["cursor"].split(".")))
    whole = history.document()
    assert (rows, counts) == (whole["step"], whole["count"])
    assert marks == whole["marks"]["value"] == pytest.approx([n / 80 for n in range(1, 81)])
    assert list(events.values()) == [f"step {step}" for step in range(50, 4001, 50)]
    assert sent < 8 * len(rows), "nearly everything was sent again and again"


@pytest.mark.parametrize("cursor", [(), (0, 99, 0, 99, 99), (9, 9, 9, 9, 9), (0, 0, 0, 0, 0)])
def test_an_id_of_another_history_gets_the_whole(cursor: tuple[int, ...]) -> None:
    history = RunHistory(PLAN)
    history.note("new", "")
    for step in range(1, 6):
        history.add(decision(step, LEARNS))
    part = history.document(cursor)
    assert (part["from"], part["step"], len(part["events"])) == (0, [1, 2, 3, 4, 5], 1)


def test_marks_and_events_are_bounded_and_the_newest_stay() -> None:
    history = RunHistory(PLAN)
    for step in range(3 * MOST_MARKS):
        history.measure("s", step, test_accuracy=0.25)
    for number in range(MOST_EVENTS + 50):
        history.note("notice", f"{number} " + "x" * 5000 + "\n")
    document = history.document()
    assert MOST_MARKS // 3 < len(document["marks"]["step"]) <= MOST_MARKS
    assert document["marks"]["step"][-1] == 3 * MOST_MARKS - 1
    assert len(document["events"]) == MOST_EVENTS
    assert document["events"][-1]["text"].startswith(f"{MOST_EVENTS + 49} ")
    assert max(len(event["text"]) for event in document["events"]) < 400
    assert "\n" not in document["events"][-1]["text"]


def test_many_ranks_that_connect_at_once_are_one_event() -> None:
    history = RunHistory(PLAN)
    for rank in range(300):
        history.note("connected", "", rank)
    (event,) = history.document()["events"]
    assert event["ranks"] == list(range(300))


def test_all_runs_together_keep_to_the_limit() -> None:
    memory = HistoryMemory(100_000)
    runs = [RunHistory(PLAN, memory) for _ in range(10)]
    for step in range(1, 3000):
        for history in runs:
            history.add(decision(step, LEARNS))
            history.take_in()
    assert memory.used == sum(len(h.columns) * h.columns.row_bytes for h in runs)
    assert memory.used < 2 * memory.limit
    assert all(len(h.columns) >= LEAST_ROWS // 2 for h in runs)
    for history in runs:
        history.close()
    assert (memory.used, memory.runs) == (0, 0)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal that has a run with 300 decisions, and the history of the first 200."""
    path = tmp_path / "journal.db"
    written = SqliteJournal(path)
    written.begin("r", 1, PLAN, 1.0)
    history = RunHistory(PLAN)
    history.note("new", "")
    history.measure("s", 7, loss=2.0, accuracy=0.5, test_accuracy=0.75)
    for step in range(1, 301):
        made = decision(step, PAUSES if step > 250 else LEARNS)
        written.add("r", made)
        if step <= 200:
            history.add(made)
    written.run_later(lambda: history_statements("r", 1, history))
    written.close()
    return path


def test_a_history_comes_back_from_the_journal_with_what_is_missing(journal: Path) -> None:
    history = RunHistory(PLAN)
    fill_history(journal, "r", history)
    document = history.document()
    assert document["step"] == list(range(1, 301))
    assert document["marks"]["value"] == [2.0, 0.5, 0.75]
    assert [event["kind"] for event in document["events"]] == ["new"]
    assert total(document["teachers"][1]["reasons"])["gap_too_large"] == 50


@pytest.mark.parametrize("damage", ["history = x'00'", "crc = crc + 1", "history = zeroblob(9)"])
def test_a_damaged_history_is_made_again_from_the_decisions(journal: Path, damage: str) -> None:
    with closing(sqlite3.connect(journal)) as connection, connection:
        connection.execute(f"UPDATE histories SET {damage}")
    history = RunHistory(PLAN)
    fill_history(journal, "r", history)
    document = history.document()
    assert document["step"] == list(range(1, 301))
    assert not document["events"]


def test_a_run_of_a_million_steps_is_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    SqliteJournal(path).close()
    columns = "run, step, teacher, student, gap, e_s, e_t, epsilon, delta, mode, n, paused"
    with closing(sqlite3.connect(path)) as connection, connection:
        # Rows at even distances are enough: the reader looks for steps, not for rows.
        connection.execute(
            f"""WITH RECURSIVE steps(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM steps
            WHERE n < 200000), pairs(place, t) AS (VALUES (0, 't1'), (1, 't2'))
            INSERT INTO decisions ({columns}, place, pairs, crc) SELECT
            'r', n * 5, t, 's', 0.25, 1.0, 0.5, 0.5, 0.75, 'learning', 8, 0, place, 2, 0
            FROM steps, pairs"""
        )
        connection.execute("UPDATE decisions SET crc = 1")
    history = RunHistory(PLAN)
    read: list[int] = []
    connect = sqlite3.connect

    class Counting(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> Any:
            cursor = super().execute(sql, *values)
            if "FROM decisions" in sql and "ORDER BY" in sql:
                rows = cursor.fetchall()
                read.append(len(rows))
                return super().execute("SELECT 1 WHERE 0")
            return cursor

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Counting, **k))
        fill_history(path, "r", history)
    assert 1_000 < sum(read) < 60_000
    assert max(read) < 2_001


def test_the_document_is_json_of_a_bounded_size() -> None:
    history = RunHistory(PLAN)
    for step in range(1, 5000):
        history.add(decision(step, LEARNS))
    text = json.dumps(history.document(), allow_nan=False)
    assert len(text) < 500_000


def test_a_pair_that_is_switched_off_has_no_column() -> None:
    off = frozenset({Pair("t2", "s")})
    plan = Plan(Topology(ROLES, off), ((0,), (1,), (2,)), "switokd", "d", 60.0)
    history = RunHistory(plan)
    found = {PAIRS[0]: Distances(*LEARNS, 8)}
    history.add(decide(1, found, RULE))
    assert [pair["teacher"] for pair in history.document()["pairs"]] == ["t1"]
