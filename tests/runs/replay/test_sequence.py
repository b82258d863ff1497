"""Rows that are missing, doubled, renamed or out of order are named, and nothing else is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from switokd.errors import UsageError
from switokd.runs.replay.record import FolderRecord
from switokd.runs.replay.replay import replay
from tests.runs.replay.records import Line, change, make_run, named, replayed

Edit = Callable[[list[Line]], object]


def swap(found: list[Line], first: slice, second: slice) -> None:
    found[first], found[second] = found[second], found[first]


ONCE = ("doubled", "once")
EDITS: dict[str, tuple[Edit, list[tuple[object, ...]]]] = {
    # Lines 20 and 21 are those of step 11.
    "a row is missing": (
        lambda found: found.pop(20),
        [(11, "teacher1", "row", "missing", "a row")],
    ),
    "a step is missing": (
        lambda found: found.__delitem__(slice(20, 22)),
        [(11, "", "row", "missing", "step 11")],
    ),
    "parts of three steps are missing": (
        lambda found: found.__delitem__(slice(21, 25)),
        [
            (11, "teacher2", "row", "missing", "a row"),
            (12, "", "row", "missing", "step 12"),
            (13, "teacher1", "row", "missing", "a row"),
        ],
    ),
    "the beginning is missing": (
        lambda found: found.__delitem__(slice(0, 10)),
        [(1, "", "row", "missing", "steps 1 to 5")],
    ),
    "a row is doubled": (
        lambda found: found.insert(20, found[20]),
        [(11, "teacher1", "row", *ONCE)],
    ),
    "a step is doubled": (
        lambda found: found.__setitem__(slice(22, 22), found[20:22]),
        [(11, "teacher1", "row", *ONCE), (11, "teacher2", "row", *ONCE)],
    ),
    "the record is doubled from a step on": (
        lambda found: found.__setitem__(slice(80, 80), found[76:80]),
        [(step, f"teacher{n}", "row", *ONCE) for step in (39, 40) for n in (1, 2)],
    ),
    "two steps have changed places": (
        lambda found: swap(found, slice(20, 22), slice(22, 24)),
        [(11, f"teacher{n}", "order", "after step 12", "after step 10") for n in (1, 2)],
    ),
    "a step comes much later": (
        lambda found: found.__setitem__(slice(20, 40), [*found[22:40], *found[20:22]]),
        [(11, f"teacher{n}", "order", "after step 20", "after step 10") for n in (1, 2)],
    ),
    "a step has another number": (
        lambda found: [found[i].update(step=91) for i in (20, 21)],
        [(11, "teacher1", "step", 91, 11), (11, "teacher2", "step", 91, 11)],
    ),
    "a row has the number of a later step": (
        lambda found: found[20].update(step=17),
        [(11, "teacher1", "step", 17, 11)],
    ),
    "a row has another teacher": (
        lambda found: found[21].update(teacher="tescher2"),
        [(11, "teacher2", "teacher", "tescher2", "teacher2")],
    ),
    "a row has the other teacher": (
        lambda found: found[20].update(teacher="teacher2"),
        [(11, "teacher1", "teacher", "teacher2", "teacher1")],
    ),
    "a row belongs to no pair": (
        lambda found: found.insert(20, {**found[20], "student": "nobody"}),
        [(11, "teacher1", "row", "a row that the run cannot have", None)],
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_rows_that_are_not_in_their_places_are_named(case: str, tmp_path: Path) -> None:
    edit, expected = EDITS[case]
    folder = make_run(tmp_path / "run")
    change(folder, edit)
    assert named(replayed(folder)) == expected


def test_two_rows_of_a_step_in_the_wrong_order_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    change(folder, lambda found: swap(found, slice(20, 21), slice(21, 22)))
    result = replayed(folder)
    assert {(d.step, d.field) for d in result.differences} == {(11, "order")}
    assert result.rows == 80  # also derived


def test_a_step_that_comes_late_is_derived_as_well(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")

    def edit(found: list[Line]) -> None:
        found[20]["delta"] = 7.0
        found[20:40] = [*found[22:40], *found[20:22]]

    change(folder, edit)
    assert (11, "teacher1", "delta") in [row[:3] for row in named(replayed(folder))]


def finish(folder: Path, steps: int) -> None:
    networks = {"student": {"steps": steps}}
    (folder / "summary.json").write_text(json.dumps({"networks": networks}))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (40, []),
        (43, [(41, "", "row", "missing", "steps 41 to 43")]),
        (38, [(39, "", "row", "up to step 40", None)]),
    ],
)
def test_the_record_of_a_finished_run_ends_where_the_run_did(
    steps: int, expected: list[object], tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run")
    finish(folder, steps)
    assert named(replayed(folder)) == expected


def test_the_last_row_of_a_finished_run_may_be_renamed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    finish(folder, 40)
    change(folder, lambda found: found[-1].update(step=90))
    assert named(replayed(folder)) == [(40, "teacher2", "step", 90, 40)]


@pytest.mark.parametrize(("cut", "steps"), [(-1, 39), (-100, 39), (-300, 39), (-450, 38)])
def test_a_run_that_goes_on_may_have_a_torn_end(cut: int, steps: int, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "decisions.jsonl"
    path.write_text(path.read_text()[:cut])
    result = replayed(folder)
    assert (named(result), result.recorded.steps) == ([], steps)
    assert any("not complete: it is being written" in note for note in result.notes)
    finish(folder, 40)
    missing = replayed(folder).differences
    assert {(d.field, d.recorded) for d in missing} == {("row", "missing")}


DAMAGED = {
    "not JSON": ('{"step": 11,', "it is not JSON"),
    "two objects": ("{} {}", "something follows the JSON object"),
    "a list": ("[1, 2]", "it is no JSON object"),
    "a number": ("11", "it is no JSON object"),
    "no gap": ('{"step": 11, "teacher": "t", "student": "s"}', "it has no 'gap'"),
    "empty": ("", "it is not JSON"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_line_is_named_by_its_number(case: str, tmp_path: Path) -> None:
    line, message = DAMAGED[case]
    folder = make_run(tmp_path / "run")
    text = (folder / "decisions.jsonl").read_text().splitlines()
    text[20] = line
    (folder / "decisions.jsonl").write_text("\n".join([*text, ""]))
    with pytest.raises(UsageError, match=f"line 21 is damaged: {message}"):
        replayed(folder)


@pytest.mark.parametrize(
    ("change_to", "message"),
    [
        ({"gap": "0.3"}, "gap is '0.3'"),
        ({"gap": True}, "gap is True"),
        ({"step": 1.5}, "step is 1.5"),
        ({"n": None}, "n is None"),
        ({"helt": True}, "it has an unknown field 'helt'; did you mean 'held'?"),
    ],
)
def test_a_value_of_another_type_is_damage(change_to: Line, message: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    change(folder, lambda found: found[20].update(change_to))
    with pytest.raises(UsageError, match="line 21 is damaged") as caught:
        replayed(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_never_ends_in_a_traceback(seed: int, tmp_path: Path) -> None:
    folder, rng = make_run(tmp_path / "run", seed=seed, steps=10), random.Random(seed)
    path, record = folder / "decisions.jsonl", FolderRecord(folder)
    whole = path.read_bytes()
    found = 0
    for _ in range(300):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        count = 1
        with suppress(UsageError):
            count = replay(record).difference_count
        assert count < 8
        found += count > 0
    assert found > 200  # a digit of a distance may change without a trace


def test_the_part_that_was_read_ends_at_the_whole(tmp_path: Path) -> None:
    record = FolderRecord(make_run(tmp_path / "run"))
    parts = [record.part_read for _ in record.read()]
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1.0)
