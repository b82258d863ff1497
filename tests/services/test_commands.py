"""A run's commands at the coordinator: what it accepts, sends, keeps, and hears of the ranks."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from switokd.distillation.decision import Decision, InForce, Mode, decide
from switokd.distillation.overrides import Action, Command, Stamped
from switokd.services.coordinator.authorisation import CallerRole, may_command
from switokd.services.coordinator.commands import MOST_KEPT, MOST_WAITING, RunCommands
from switokd.services.coordinator.history import RunHistory
from switokd.services.coordinator.journal import Journal
from switokd.services.coordinator.limits import DEFAULTS
from switokd.services.coordinator.messages import status_to_wire
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.outbox import RunStreams
from switokd.services.coordinator.run_entry import RunEntry
from switokd.services.coordinator.status import RunTimes
from switokd.v1 import coordinator_pb2 as pb
from tests.coordination.test_lost_coordinator import coordinator
from tests.services.examples import EXPERT, LEARNING, PLAN, refusal, started
from tests.services.test_coordinator import Server, Stream, names, plan, sums
from tests.services.test_journal import RULE, opened, stored
from tests.support import wait_until

A, B = PLAN.topology.pairs
HOLD = Command("1", Action.HOLD, "a", Mode.EXPERT)
SECRET = b"a run's secret, in tests"


def test_a_command_waits_until_it_is_answered() -> None:
    commands = RunCommands(PLAN)
    stamped, is_new = commands.add(HOLD, last_step=5)
    assert (is_new, stamped.first_step, commands.waiting) == (True, 0, [HOLD])
    assert commands.answer(Stamped(HOLD, 9))
    assert not commands.answer(Stamped(HOLD, 12)), "the first answer stays"
    assert [s.first_step for s in commands.all] == [9]
    assert commands.waiting == []


def test_repeating_a_command_changes_nothing() -> None:
    commands = RunCommands(PLAN)
    asked = replace(HOLD, asked_by="operator")
    commands.add(asked, 5)
    commands.answer(Stamped(HOLD, 9))
    assert commands.add(replace(HOLD, asked_by="run"), 20) == (Stamped(asked, 9), False)
    kind, reason = refusal(lambda: commands.add(replace(HOLD, mode=Mode.LEARNING), 5))
    assert kind == "ALREADY_EXISTS"
    assert "belongs to another command: hold of a in expert mode" in reason


def test_commands_without_an_id_get_one_each() -> None:
    commands = RunCommands(PLAN)
    names = {commands.add(replace(HOLD, id=""), 0)[0].command.id for _ in range(3)}
    assert len(names) == 3


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (replace(HOLD, teacher="s"), "'s' is no teacher of this run: it has a, b"),
        (replace(HOLD, mode=None), "needs a mode"),
        (replace(HOLD, until_step=5), "step 5, the last one of the hold, is over"),
        (Command("1", Action.SCALE, factor=math.nan), "1e-06 to 1e+06"),
        (replace(HOLD, id="a b"), "letters, digits"),
        (replace(HOLD, id="x" * 65), "1 to 64"),
    ],
)
def test_what_the_plan_does_not_allow_is_refused(command: Command, words: str) -> None:
    commands = RunCommands(PLAN)
    kind, reason = refusal(lambda: commands.add(command, last_step=5))
    assert kind == "INVALID_ARGUMENT"
    assert words in reason
    assert not commands.all
    if "is over" not in words:  # rank 0 may tell of a hold that has ended
        assert words in refusal(lambda: commands.answer(Stamped(command, 6)))[1]
        assert not commands.all


def test_an_answer_does_not_change_what_was_asked() -> None:
    commands = RunCommands(PLAN)
    commands.add(HOLD, 0)
    commands.answer(Stamped(replace(HOLD, teacher="x" * 10_000, asked_by="boss"), 7))
    assert commands.all == (Stamped(HOLD, 7),)
    stranger = replace(HOLD, id="2", asked_by="x" * 10_000)
    assert "asked by" in refusal(lambda: commands.answer(Stamped(stranger, 7)))[1]


def test_few_commands_wait_and_few_answers_are_kept() -> None:
    commands = RunCommands(PLAN)
    for number in range(MOST_WAITING):
        commands.add(replace(HOLD, id=f"w{number}"), 0)
    assert "100 commands wait" in refusal(lambda: commands.add(HOLD, 0))[1]
    for number in range(MOST_KEPT + 50):
        commands.answer(Stamped(replace(HOLD, id=f"a{number}"), 7))
    assert len(commands.all) == MOST_KEPT
    assert len(commands.waiting) == MOST_WAITING, "one that waits is never forgotten"


def test_the_status_has_the_last_answers_and_what_waits() -> None:
    run = started()
    for number in range(300):
        run.commands.add(Command(f"c{number}", Action.CHECKPOINT), 0)
        if number != 5:
            run.commands.answer(Stamped(Command(f"c{number}", Action.CHECKPOINT), number + 1))
    shown = status_to_wire(run)
    ids = [status.command.command_id for status in shown.commands]
    assert ids == ["c5", *(f"c{number}" for number in range(200, 300))]
    assert shown.commands_truncated
    assert shown.ByteSize() < 5000
    few = started()
    few.commands.add(Command("1", Action.CHECKPOINT), 0)
    assert not status_to_wire(few).commands_truncated


def test_the_end_of_a_run_ends_its_waiting_commands() -> None:
    kept: list[Stamped] = []

    class Kept(Journal):
        def add_command(self, run_id: str, stamped: Stamped) -> None:
            kept.append(stamped)

    for failure in ("", "lost"):
        run = started()
        metrics = Metrics(DEFAULTS).add_run(run)
        entry = RunEntry(run, RunStreams(), metrics, Kept(), RunTimes(0.0), RunHistory(run.plan))
        entry.command(HOLD)
        kept.clear()
        for rank in range(3):
            run.leave(rank, failure, now=1.0)
        entry.note_end()
        # A run that has failed may start again, and takes the command then.
        reasons = [] if failure else ["the run had ended before it took the command"]
        assert [s.failure for s in run.commands.all if s.failure] == reasons
        assert [s.failure for s in kept] == reasons


@pytest.mark.parametrize("first", [True, False])
def test_the_first_rank_of_a_teacher_says_what_is_held(first: bool) -> None:
    shared = replace(PLAN, ranks=((0, 1), (1,), (2,)))
    run = started(shared)
    held = InForce({A: Mode.LEARNING}, {A: 2.0})
    run.report(2, 1, {}, 0.0)
    run.report(0, 1, {A: EXPERT}, 0.0, in_force=held if first else InForce())
    own = InForce({B: Mode.EXPERT}) if first else InForce({A: Mode.LEARNING, B: Mode.EXPERT})
    decided = run.report(1, 1, {A: EXPERT, B: LEARNING}, 0.0, in_force=own)
    assert decided is not None
    of_a, of_b = decided.decision.pairs
    assert (of_a.mode, of_a.held) == ((Mode.LEARNING, True) if first else (Mode.EXPERT, False))
    assert (of_b.mode, of_b.held) == (Mode.EXPERT, True)
    assert of_a.delta_scale == (2.0 if first else 1.0)
    assert decided.decision.paused == (("b",) if first else ("a", "b"))


def decision(step: int, in_force: InForce) -> Decision:
    return decide(step, {A: EXPERT.mean(), B: LEARNING.mean()}, RULE, in_force=in_force)


def test_the_journal_keeps_commands_and_what_they_change(tmp_path: Path) -> None:
    path = tmp_path / "j"
    held = decision(2, InForce({A: Mode.LEARNING}, {B: 0.3}))
    decisions = [decision(1, InForce()), held, decision(3, InForce())]
    waiting = Stamped(Command("2", Action.SCALE, factor=0.1, asked_by="run"), 0)
    with opened(path) as journal:
        journal.begin("r", 1, PLAN)
        journal.add_command("r", Stamped(HOLD, 0))
        journal.add_command("r", waiting)
        journal.add_command("r", Stamped(HOLD, 2, at=7.5))
        for each in decisions:
            journal.add("r", each)
        wait_until(lambda: journal.recorded("r", 1) == 3, 10, "step 3 on the disk")
    found = stored(path)
    assert list(found.commands) == [Stamped(HOLD, 2, at=7.5), waiting]
    assert list(found.decisions) == decisions
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE overridden SET held = 0 WHERE held = 1")
        connection.execute("UPDATE commands SET command = '{}' WHERE id = '2'")
    damaged = stored(path)
    assert [d.step for d in damaged.decisions] == [1], "a damaged row ends what is restored"
    assert [s.command.id for s in damaged.commands] == ["1"]


def test_a_new_start_takes_out_what_commands_changed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    held = [decision(step, InForce({A: Mode.LEARNING})) for step in (1, 2, 3)]
    free = [decision(step, InForce()) for step in (2, 3)]
    with opened(path) as journal:
        journal.begin("r", 1, PLAN)
        for each in held:
            journal.add("r", each)
        journal.begin("r", 2, replace(PLAN, first_step=2))
        for each in free:
            journal.add("r", each)
        wait_until(lambda: journal.recorded("r", 2) == 3, 10, "step 3 on the disk")
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT step, place, held FROM overridden").fetchall()
    assert rows == [(1, 0, 1)]
    assert list(stored(path).decisions) == free


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with coordinator(None) as served:
        found = Server(served.address, "", served.child.pid)
        yield found
        found.channel.close()


def joined(server: Server, secret: bytes = SECRET) -> str:
    run_id = f"commanded{next(names)}"
    for rank in (0, 1):
        request = pb.JoinRequest(run_id=run_id, rank=rank, plan=plan(), secret=secret)
        server.stub.Join(request)
    return run_id


def attached(server: Server, run_id: str, rank: int, attempt: int = 1) -> Stream:
    stream = Stream(server)
    attach = pb.Attach(run_id=run_id, rank=rank, client="c", attempt=attempt, secret=SECRET)
    stream.send(attach=attach)
    assert next(stream.call).WhichOneof("event") == "attached"
    return stream


def send(server: Server, run_id: str, command: pb.Command, secret: bytes = SECRET) -> str:
    request = pb.SendCommandRequest(run_id=run_id, command=command, secret=secret)
    return str(server.stub.SendCommand(request, timeout=5).command_id)


def status_of(server: Server, run_id: str) -> list[pb.CommandStatus]:
    status = server.stub.GetRunStatus(pb.GetRunStatusRequest(run_id=run_id), timeout=5)
    return list(status.commands)


HELD = pb.Command(command_id="h", hold=pb.Hold(teacher="t", mode=pb.MODE_LEARNING))


def test_a_command_goes_to_rank_0_on_every_stream_until_it_is_answered(server: Server) -> None:
    run_id = joined(server)
    teacher, student = attached(server, run_id, 0), attached(server, run_id, 1)
    assert send(server, run_id, HELD) == "h"
    sent = next(teacher.call).command
    assert (sent.command_id, sent.hold.teacher, sent.asked_by) == ("h", "t", "run")
    again = attached(server, run_id, 0, attempt=2)
    assert next(again.call).command == sent
    student.report(1)
    again.send(
        report=pb.Report(
            step=1,
            pairs=[
                pb.PairSums(
                    **{f.name: v for f, v in sums(2.0, 2.0, 0.2, n=2).ListFields()},
                )
            ],
        )
    )
    decided = again.decision()
    assert (decided.step, list(decided.paused), decided.pairs[0].held) == (1, ["t"], False)
    again.send(command_taken=pb.CommandTaken(command_id="h", first_step=2, command=sent))
    held = sums(2.0, 2.0, 0.2, n=2)
    held.mode, held.held, held.delta_scale = pb.MODE_LEARNING, True, 3.0
    student.report(2)
    again.report(2, held)
    (pair,) = again.decision().pairs
    assert (pair.mode, pair.held, pair.delta_scale) == (pb.MODE_LEARNING, True, 3.0)
    assert pair.delta == 3.0 * decided.pairs[0].delta
    (found,) = status_of(server, run_id)
    assert (found.command, found.first_step, found.failure) == (sent, 2, "")
    assert attached_events(attached(server, run_id, 0, attempt=3)) == []


def attached_events(stream: Stream) -> list[str]:
    """Leave; return what had come before the end of the stream."""
    stream.send(leave=pb.Leave())
    return [str(message.WhichOneof("event")) for message in stream.call]


def test_rank_0_tells_a_coordinator_that_knows_nothing(server: Server) -> None:
    run_id = joined(server)
    first = attached(server, run_id, 0)
    first.send(command_taken=pb.CommandTaken(command_id="h", first_step=40, command=HELD))
    first.send(command_taken=pb.CommandTaken(command_id="?", failure="an unknown action"))
    wait_until(lambda: status_of(server, run_id), 5, "the command is known")
    (found,) = status_of(server, run_id)
    assert (found.command, found.first_step) == (HELD, 40)
    long = pb.CommandTaken(command_id="l", failure="f" * 20_000, command=HELD)
    long.command.command_id = "l"
    first.send(command_taken=long)
    wait_until(lambda: len(status_of(server, run_id)) == 2, 5, "the refused one is known")
    assert len(status_of(server, run_id)[1].failure) < 1100, "--max-sentence-length, and (cut)"
    second = attached(server, run_id, 1)
    second.send(command_taken=pb.CommandTaken(command_id="h", first_step=1, command=HELD))
    assert second.end() == ("INVALID_ARGUMENT", "only rank 0 may say what the ranks have taken")


@pytest.mark.parametrize("scale", [-1.0, math.inf, math.nan])
def test_an_impossible_scale_in_a_report_is_refused(server: Server, scale: float) -> None:
    stream = attached(server, joined(server), 0)
    report = sums(2.0, 2.0, 0.2, n=2)
    report.delta_scale = scale
    stream.report(1, report)
    code, details = stream.end()
    assert code == "INVALID_ARGUMENT"
    assert details == (
        f"rank 0 (t) scales the threshold of t and s by {scale}; allowed: 1e-06 to 1e+06"
    )


@pytest.mark.parametrize(
    ("secret", "shown", "code"),
    [
        (SECRET, b"", "PERMISSION_DENIED"),
        (SECRET, SECRET + b"x", "PERMISSION_DENIED"),
        (b"", b"", "PERMISSION_DENIED"),
        (b"", SECRET, "PERMISSION_DENIED"),
        (SECRET, SECRET, "OK"),
    ],
)
def test_who_may_command_a_run(server: Server, secret: bytes, shown: bytes, code: str) -> None:
    run_id = joined(server, secret)
    assert outcome(server, run_id, HELD, shown)[0] == code
    assert len(status_of(server, run_id)) == (code == "OK")


def outcome(
    server: Server, run_id: str, command: pb.Command, secret: bytes = SECRET
) -> tuple[str, str]:
    try:
        send(server, run_id, command, secret)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (pb.Command(), "without an action"),
        (pb.Command(hold=pb.Hold(teacher="s", mode=pb.MODE_EXPERT)), "'s' is no teacher"),
        (pb.Command(hold=pb.Hold(teacher="t")), "a hold needs a mode"),
        (pb.Command(scale_threshold=pb.ScaleThreshold(factor=-2)), "1e-06 to 1e+06"),
        (pb.Command(command_id="a\nb", stop=pb.Stop()), "letters, digits and ._-"),
        (pb.Command(release=pb.Release(teacher="\x1b" * 60_000)), "... (cut)"),
    ],
)
def test_a_wrong_command_is_refused_in_one_sentence(
    server: Server, command: pb.Command, words: str
) -> None:
    code, details = outcome(server, joined(server), command)
    assert code == "INVALID_ARGUMENT"
    assert words in details
    assert "\n" not in details


def test_unknown_and_ended_runs_take_no_command(server: Server) -> None:
    assert outcome(server, "nobody", HELD)[0] == "NOT_FOUND"
    run_id = joined(server)
    for rank in (0, 1):
        attached_events(attached(server, run_id, rank))
    code, details = outcome(server, run_id, HELD)
    assert (code, details) == ("FAILED_PRECONDITION", f"run '{run_id}' has finished")


def test_only_an_operator_drains_a_coordinator(server: Server) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.stub.Drain(pb.DrainRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "SIGTERM" in str(caught.value.details())


def test_an_operator_is_asked_first() -> None:
    assert may_command(has_secret=True, is_operator=True) is CallerRole.OPERATOR
    assert may_command(has_secret=True, is_operator=False) is CallerRole.RUN
    assert refusal(lambda: may_command(False, False))[0] == "PERMISSION_DENIED"
