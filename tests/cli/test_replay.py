"""`switokd replay`: exit codes, tables, JSON, picture, and a journal that a coordinator writes.

Not covered: what is derived, and from what (`tests/runs/replay/`).
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
from PIL import Image
from typer.testing import CliRunner

from switokd.cli.main import app
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.runs.replay.records import change, distances, make_run, write
from tests.support import process, wait_until

STATEMENT = "a statement about the recorded distances, not about how training would have gone on"


def replay(*arguments: object) -> tuple[int, str, str]:
    """Run the command in this process: exit code, standard output, standard error."""
    result = CliRunner().invoke(app, ["replay", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.stdout, result.stderr


def test_a_record_without_differences(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    code, out, err = replay(folder)
    assert (code, err) == (0, "")
    assert "2T1S, switokd; 40 steps with 2 pairs" in out
    assert "every decision follows from the recorded distances, bit for bit" in out
    assert STATEMENT not in out


def test_differences_are_a_table_with_a_count_and_an_exit_code(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    change(folder, lambda found: [line.update(epsilon=0.25) for line in found[4:10]])
    code, out, _ = replay(folder, "--show", 2)
    assert code == 7
    (row,) = [line for line in out.splitlines() if "│    3 │ teacher1" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")][3:5] == ["epsilon", "0.25"]
    assert "6 differences; 4 of them are not shown (--show N)" in out
    code, out, _ = replay(folder, "--json", "--show", 1)
    found = json.loads(out)
    assert (code, found["difference_count"], len(found["differences"])) == (7, 6, 1)
    difference = found["differences"][0]
    derived = difference.pop("derived")
    assert 0.3 < derived <= 1
    assert difference == {
        "step": 3,
        "teacher": "teacher1",
        "student": "student",
        "place": 5,
        "field": "epsilon",
        "recorded": 0.25,
    }


def test_what_if_as_table_json_and_picture(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    picture = tmp_path / "what-if.png"
    options = ("--delta", "0.2:0.6:0.2", "--delta", "2", "--strategy", "kd,dml", "--scale", "0.5")
    code, out, _ = replay(folder, *options, "--picture", picture)
    assert code == 0
    assert STATEMENT in " ".join(out.replace("│", " ").split())
    rows = ("recorded", "delta 0.2", "delta 0.4", "delta 0.6", "delta 2", "kd", "dml", "scale 0.5")
    shares = {
        name: line.split("│")[2:]
        for line in out.splitlines()
        for name in rows
        if line.startswith(f"│ {name} ")
    }
    assert tuple(shares) == rows
    assert [cell.strip() for cell in shares["kd"][:4]] == ["100.0%"] * 4
    assert [cell.strip() for cell in shares["dml"][:5]] == [*["0.0%"] * 4, "0"]
    assert shares["recorded"][5].strip() == "0.0%"
    with Image.open(picture) as image:
        assert min(image.size) > 500
    code, out, _ = replay(folder, *options, "--json")
    found = json.loads(out)
    assert [a["label"] for a in found["alternatives"]] == list(rows[1:])
    assert STATEMENT in found["statement"]
    assert f"{found['recorded']['expert']['teacher1-student']:.1%}" == shares["recorded"][0].strip()


def test_the_picture_needs_no_more_than_one_step_and_may_be_svg(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    many = [word for i in range(8) for word in ("--delta", f"0.{i}")]
    assert replay(folder, "--picture", tmp_path / "p.svg", *many)[0] == 0
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_many_pairs_become_one_column(tmp_path: Path) -> None:
    networks = {
        name: {"role": role, "model": "wrn-10-1"}
        for role, names in (("teacher", "abc"), ("student", "xyz"))
        for name in names
    }
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps({"name": "g", "data": {"dataset": "digits"}, "networks": networks}))
    folder = make_run(tmp_path / "run", recipe=str(file), steps=3)
    code, out, _ = replay(folder, "--scale", "0.5")
    assert code == 0
    assert "all pairs" in out
    assert "all teachers" in out


def test_all_wrong_alternatives_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2)
    code, out, err = replay(folder, "--delta", "3", "--strategy", "foo", "--scale", "0")
    assert (code, out) == (2, "")
    for line, words in zip(err.splitlines(), ("--delta 3:", "'foo'", "--scale 0:"), strict=True):
        assert words in line


MISTAKES = {
    "no folder": (["ran"], "ran: there is no such folder; did you mean 'run'?"),
    "a file": (["run/config.yaml"], "run/config.yaml is a file; name a run folder"),
    "folder of runs": (
        ["."],
        "no config.yaml in it; it holds the runs run",
    ),
    "no decisions": (
        ["empty"],
        "empty: the run has no decisions yet, so there",
    ),
    "damaged": (["torn"], "torn/decisions.jsonl: line 2 is damaged: it is not JSON"),
    "summary": (["half"], "half/summary.json is damaged: it cannot be read"),
    "not a number": (["run", "--delta", "x"], "--delta x: write a number, or FROM:TO:STEP"),
    "no step": (["run", "--delta", "0.1:0.2"], "--delta 0.1:0.2: write a number, or FROM:TO:STEP"),
    "step of 0": (["run", "--delta", "0:1:0"], "--delta 0:1:0: write a number"),
    "long range": (["run", "--delta", "0:2:1e-9"], "more than 1000 numbers"),
    "delta": (["run", "--delta", "3"], "--delta 3: an L1 distance is from 0 to 2"),
    "scale": (["run", "--scale", "0"], "--scale 0: a factor of the threshold is above 0"),
    "strategy": (["run", "--strategy", "swithokd"], "did you mean 'switokd'?"),
    "picture": (["run", "--picture", "a.bmp"], "--picture a.bmp: the name must end with .png"),
    "picture's folder": (
        ["run", "--picture", "no/a.png"],
        "there is no folder no",
    ),
    "journal": (["r", "--journal", "j"], "--journal j: there is no such file"),
    "journal's folder": (["r", "--journal", "run"], "--journal run: this is a folder; name the"),
    "no journal": (["r", "--journal", "run/config.yaml"], "--journal run/config.yaml: "),
    "not sqlite's": (["r", "--journal", "other.db"], "the file is no journal of switokd"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[case]
    for name in {"run", *(w for w in arguments if w in ("empty", "torn", "half"))}:
        make_run(Path(name), steps=2)
    if case == "no decisions":
        write(Path("empty"), [])
    if case == "damaged":
        text = Path("torn/decisions.jsonl").read_text().splitlines()
        Path("torn/decisions.jsonl").write_text("\n".join([text[0], text[1][:-9], *text[2:], ""]))
    if case == "summary":
        Path("half/summary.json").write_text('{"networks"')
    with closing(sqlite3.connect("other.db")) as connection:
        connection.execute("CREATE TABLE runs (a)")
    code, out, err = replay(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("switokd: ")
    assert message in err


class Rank:
    """One rank's stream to a real coordinator."""

    def __init__(self, stub: pb_grpc.CoordinatorServiceStub, run_id: str, rank: int) -> None:
        self.outgoing: SimpleQueue[pb.TrainRequest | None] = SimpleQueue()
        self.call = stub.Train(iter(self.outgoing.get, None), timeout=60)
        self.send(attach=pb.Attach(run_id=run_id, rank=rank))
        assert next(self.call).WhichOneof("event") == "attached"

    def send(self, **event: object) -> None:
        self.outgoing.put(pb.TrainRequest(**event))  # type: ignore[arg-type]


@contextmanager
def driven(address: str, run_id: str, steps: int) -> Iterator[None]:
    """Let a coordinator decide steps of two teachers and a student; yield before they leave."""
    rng, roles = random.Random(run_id), ("a", "b", "s")
    kinds = (pb.ROLE_TEACHER, pb.ROLE_TEACHER, pb.ROLE_STUDENT)
    plan = pb.RunPlan(
        networks=[
            pb.Network(name=name, role=kind, ranks=[number])
            for number, (name, kind) in enumerate(zip(roles, kinds, strict=True))
        ],
        strategy="switokd",
        config_digest="d",
        round_timeout_seconds=60,
        semantics="published",
    )
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.CoordinatorServiceStub(channel)
        for number in range(3):
            stub.Join(pb.JoinRequest(run_id=run_id, rank=number, plan=plan))
        ranks = [Rank(stub, run_id, number) for number in range(3)]
        for step in range(1, steps + 1):
            for teacher, rank in zip("ab", ranks, strict=False):
                d = distances(rng)
                sums = pb.PairSums(
                    teacher=teacher, student="s", gap=d.gap * 3, e_s=d.e_s * 3, e_t=d.e_t * 3, n=3
                )
                rank.send(report=pb.Report(step=step, pairs=[sums]))
            ranks[2].send(report=pb.Report(step=step))
            assert next(ranks[0].call).decision.step == step
        yield
        for rank in ranks:
            rank.send(leave=pb.Leave())
            rank.outgoing.put(None)


def test_the_journal_of_a_real_coordinator(tmp_path: Path) -> None:
    """Read while it is written, after the run, and after a digit of it was changed."""
    journal = tmp_path / "journal.db"
    command = [sys.executable, "-m", "switokd", "coordinator", "--port=0", "--http-port=0"]
    with process([*command, "--journal", str(journal)], tmp_path) as child:
        assert child.stdout is not None
        address = json.loads(child.stdout.readline())["grpc"]
        with driven(address, "first-run", 300):
            wait_until(
                lambda: "300 steps" in replay("first-run", "--journal", journal)[1],
                20,
                "all steps in the journal",
            )
            code, out, _ = replay("first-run", "--journal", journal, "--scale", "0.5")
            assert code == 0
            assert "2T1S, switokd, semantics published; 300 steps" in out
            assert "note: the run has not ended" in out
        with driven(address, "second-run", 1):
            pass
        code, _, err = replay("fist-run", "--journal", journal)
        assert (code, "there is no run 'fist-run'; did you mean 'first-run'?" in err) == (2, True)
        assert "the last of 2 are" in replay("x", "--journal", journal)[2]
    code, out, _ = replay("first-run", "--journal", journal, "--json")
    assert (code, json.loads(out)["steps"]) == (0, 300)
    with closing(sqlite3.connect(journal)) as connection, connection:
        where = "run = 'first-run' AND step = 70 AND teacher = 'b'"
        connection.execute(f"UPDATE decisions SET paused = 1 - paused WHERE {where}")
        connection.execute("DELETE FROM decisions WHERE run = 'first-run' AND step IN (80, 81)")
    code, out, _ = replay("first-run", "--journal", journal, "--json")
    found = json.loads(out)["differences"]
    assert code == 7
    assert [(d["step"], d["teacher"], d["field"]) for d in found] == [
        (80, "", "row"),
        (70, "b", "checksum"),
        (70, "b", "paused"),
    ]
    assert found[0]["derived"] == "steps 80 to 81"
    with closing(sqlite3.connect(journal)) as connection, connection:
        connection.execute("UPDATE decisions SET gap = 'far' WHERE step = 7")
    assert "row 13 of the journal is damaged" in replay("first-run", "--journal", journal)[2]
