"""A run's secret: without it nobody takes part in the run, ends it or takes it over.

Not covered: tokens and TLS (`test_security.py`, `test_tls.py`).
"""

from __future__ import annotations

import sqlite3
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from switokd.services.coordinator.identity import RunSecret
from switokd.services.coordinator.journal import SqliteJournal
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.registry import RunRegistry
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.certificates import Served, serving
from tests.services.examples import PLAN, refusal
from tests.services.test_coordinator import plan, sums

SECRET, OTHER = b"secret of the ranks of one run!!", b"what a stranger has made up.....!"


def registry(journal: SqliteJournal | None = None) -> RunRegistry:
    return RunRegistry(Metrics(), journal=journal) if journal else RunRegistry(Metrics())


def join(runs: RunRegistry, rank: int, secret: bytes, epoch: int = 1) -> None:
    runs.join("r", rank, PLAN, runs.now(), epoch, secret)


def test_a_secret_is_kept_as_its_digest_only() -> None:
    kept = RunSecret.of(SECRET)
    assert kept.proves(SECRET)
    assert not kept.proves(OTHER)
    assert not kept.proves(b"")
    assert SECRET not in kept.digest
    assert not RunSecret().proves(b"")


@pytest.mark.parametrize("length", [1, 15, 257, 1 << 20])
def test_a_secret_of_a_wrong_length_is_refused(length: int) -> None:
    kind, reason = refusal(lambda: join(registry(), 0, bytes(length)))
    assert kind == "INVALID_ARGUMENT"
    assert reason == f"a run's secret has 16 to 256 bytes, found {length}"


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        (OTHER, "this is not the run's secret"),
        (b"", "this run has a secret, and the call has none"),
    ],
)
@pytest.mark.parametrize("epoch", [0, 1, 2, 2**62])
def test_the_first_rank_sets_the_secret(secret: bytes, words: str, epoch: int) -> None:
    """A lower epoch is refused for the same reason: a stranger learns nothing of the epoch."""
    runs = registry()
    join(runs, 0, SECRET)
    kind, reason = refusal(lambda: join(runs, 1, secret, epoch))
    assert kind == "PERMISSION_DENIED"
    assert reason.startswith(f"run 'r': {words}")
    run = runs.find("r").run
    assert (run.epoch, run.joined, run.failure) == (1, {0}, "")
    join(runs, 1, SECRET)
    join(runs, 0, SECRET, epoch=2)
    assert runs.find("r").run.epoch == 2


def test_a_run_may_go_without_a_secret_until_its_next_start() -> None:
    runs = registry()
    join(runs, 0, b"")
    kind, reason = refusal(lambda: join(runs, 1, SECRET))
    assert (kind, "joined without a secret" in reason) == ("PERMISSION_DENIED", True)
    join(runs, 1, b"")
    join(runs, 0, SECRET, epoch=2)
    assert refusal(lambda: join(runs, 1, b"", epoch=2))[0] == "PERMISSION_DENIED"


@pytest.fixture
def journal_path(tmp_path: Path) -> Path:
    return tmp_path / "j"


def restarted(path: Path, call: Callable[[RunRegistry], object]) -> None:
    """Let a coordinator with a journal do something."""
    journal = SqliteJournal(path)
    try:
        call(registry(journal))
    finally:
        journal.close()


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_restarted_coordinator_still_asks_for_the_secret(
    has_ended: bool, journal_path: Path
) -> None:
    def begin(runs: RunRegistry) -> None:
        join(runs, 0, SECRET)
        if has_ended:
            runs.find("r").journal.end("r", 1, "it was stopped")

    def attack(runs: RunRegistry) -> None:
        for epoch, secret in ((1, OTHER), (2, OTHER), (2, b"")):
            attempt = refusal(lambda e=epoch, s=secret: join(runs, 0, s, e))  # type: ignore[misc]
            assert attempt[0] == "PERMISSION_DENIED"
        join(runs, 0, SECRET, epoch=2)

    restarted(journal_path, begin)
    restarted(journal_path, attack)
    assert SECRET not in journal_path.read_bytes()
    assert SECRET.hex().encode() not in journal_path.read_bytes()


def test_a_journal_of_an_older_coordinator_has_no_secrets(journal_path: Path) -> None:
    """Its run is that of the first rank that comes back, which may have a secret."""
    restarted(journal_path, lambda runs: join(runs, 0, b""))
    with closing(sqlite3.connect(journal_path)) as connection, connection:
        connection.execute("DROP TABLE secrets")
    restarted(journal_path, lambda runs: join(runs, 0, SECRET))

    def attack(runs: RunRegistry) -> None:
        assert refusal(lambda: join(runs, 1, OTHER))[0] == "PERMISSION_DENIED"

    restarted(journal_path, attack)


def test_a_damaged_secret_is_set_again(
    journal_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    restarted(journal_path, lambda runs: join(runs, 0, SECRET))
    with closing(sqlite3.connect(journal_path)) as connection, connection:
        connection.execute("UPDATE secrets SET digest = zeroblob(32)")
    restarted(journal_path, lambda runs: join(runs, 0, SECRET))
    assert "the secret of run r is damaged" in caplog.text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("c")) as coordinator:
        yield coordinator


def code_and_reason(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name, caught.value.details() or ""


class Ranks:
    """The two ranks of a run, in this process, with the contract alone."""

    def __init__(self, channel: grpc.Channel, run_id: str) -> None:
        self.stub, self.run_id = pb_grpc.CoordinatorServiceStub(channel), run_id

    def join(self, rank: int, secret: bytes = SECRET, epoch: int = 1) -> None:
        request = pb.JoinRequest(
            run_id=self.run_id, rank=rank, plan=plan(), epoch=epoch, secret=secret
        )
        self.stub.Join(request, timeout=20)

    def attach(self, rank: int, *events: pb.TrainRequest, **attach: object) -> list[str]:
        """Open a stream, send an attach and other events, and return what comes back."""
        values = {"secret": SECRET, "epoch": 1, **attach}
        first = pb.Attach(run_id=self.run_id, rank=rank, **values)  # type: ignore[arg-type]
        messages = [pb.TrainRequest(attach=first), *events]
        answers = self.stub.Train(iter(messages), timeout=20)
        return [str(answer.WhichOneof("event")) for answer in answers]


LEAVE = pb.TrainRequest(leave=pb.Leave())
SENTENCE = pb.TrainRequest(leave=pb.Leave(failure="a stranger's sentence"))


def test_a_stranger_neither_takes_a_seat_nor_ends_the_run(served: Served) -> None:
    """The attacks before the ranks attach, and after they have."""
    with grpc.insecure_channel(served.grpc) as channel:
        ranks = Ranks(channel, "attacked")
        for rank in (0, 1):
            ranks.join(rank)
        for _ in range(2):
            for secret in (OTHER, b"", SECRET[:-1]):
                for epoch in (0, 1, 2):
                    attempt = code_and_reason(
                        lambda s=secret, e=epoch: ranks.join(0, s, e)  # type: ignore[misc]
                    )
                    assert attempt[0] == "PERMISSION_DENIED"
                    code, reason = code_and_reason(
                        lambda s=secret, e=epoch: ranks.attach(  # type: ignore[misc]
                            0, SENTENCE, secret=s, epoch=e, client="other", attempt=99
                        )
                    )
                    assert code == "PERMISSION_DENIED"
                    assert "secret" in reason
            status = ranks.stub.GetRunStatus(pb.GetRunStatusRequest(run_id="attacked"))
            assert (status.failure, status.epoch) == ("", 1)
            reports = [pb.TrainRequest(report=pb.Report(step=1, pairs=[sums(2.0, 2.0, 0.2)]))]
            if status.last_decision.step == 0:
                student = pb.TrainRequest(report=pb.Report(step=1))
                assert ranks.attach(1, student, LEAVE)[0] == "attached"
                assert ranks.attach(0, *reports, LEAVE)[0] == "attached"
        assert status.state == pb.RUN_STATE_FINISHED
        assert status.last_decision.step == 1


def test_nothing_that_anyone_may_read_has_the_secret(served: Served) -> None:
    with grpc.insecure_channel(served.grpc) as channel:
        ranks = Ranks(channel, "secretive")
        ranks.join(0)
        code_and_reason(lambda: ranks.join(1, OTHER))
        status = ranks.stub.GetRunStatus(pb.GetRunStatusRequest(run_id="secretive"))
    with urllib.request.urlopen(f"http://{served.http}/metrics", timeout=5) as page:
        seen = [page.read(), status.SerializeToString(), served.log.read_bytes()]
    digest = RunSecret.of(SECRET).digest
    for text in seen:
        for secret in (SECRET, OTHER, digest):
            assert secret not in text
            assert secret.hex().encode() not in text


def test_a_plan_of_the_registry_is_replaced_only_with_the_secret() -> None:
    runs = registry()
    join(runs, 0, SECRET)
    other = replace(PLAN, config_digest="a stranger's")
    attempt = refusal(lambda: runs.join("r", 0, other, runs.now(), 5, OTHER))
    assert attempt[0] == "PERMISSION_DENIED"
    assert runs.find("r").run.plan == PLAN
