"""All runs of a coordinator, without a server: hung runs end, ended runs are forgotten."""

from __future__ import annotations

from dataclasses import replace

from switokd.services.coordinator.journal import Journal
from switokd.services.coordinator.journal_file import StoredRun
from switokd.services.coordinator.limits import Limits
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.registry import RunRegistry
from tests.services.examples import PLAN, refusal
from tests.services.test_metrics import scraped


def test_a_run_that_hangs_is_ended_and_forgotten_later() -> None:
    metrics = Metrics()
    runs = RunRegistry(metrics, forget_after=100.0)
    for run_id in ("hung", "other"):
        runs.join(run_id, 0, PLAN, now=0.0)
    runs.find("other").run.fail("stopped", now=50.0)
    runs.check(now=60.0)
    assert runs.find("hung").run.failure == ""
    runs.check(now=61.0)
    assert "no stream from rank 0 (a), rank 1 (b)" in runs.find("hung").run.failure
    runs.check(now=160.0)
    assert refusal(lambda: runs.find("other"))[0] == "NOT_FOUND"
    shown = scraped(metrics)
    assert 'switokd_expected_ranks{run="hung"}' in shown
    assert 'switokd_expected_ranks{run="other"}' not in shown
    runs.check(now=162.0)
    assert refusal(lambda: runs.find("hung"))[0] == "NOT_FOUND"
    assert not scraped(metrics)


def test_a_run_that_never_attached_makes_room_after_ended_ones() -> None:
    runs = RunRegistry(Metrics(), limits=Limits(max_runs=3))
    for name in ("old", "absent", "present"):
        runs.join(name, 0, PLAN, now=0.0)
    runs.find("old").run.fail("stopped", now=0.0)
    runs.find("present").run.attach(0)
    runs.join("one", 0, PLAN, now=1.0)
    assert refusal(lambda: runs.find("old"))[0] == "NOT_FOUND"
    kind, reason = refusal(lambda: runs.join("two", 0, PLAN, now=1.5))
    assert (kind, "limit is 3 (--max-runs)" in reason) == ("RESOURCE_EXHAUSTED", True)
    runs.join("two", 0, PLAN, now=2.5)
    assert refusal(lambda: runs.find("absent"))[0] == "NOT_FOUND"
    assert runs.find("present").run.connected == {0}


def test_the_id_of_a_forgotten_run_can_be_used_again() -> None:
    runs = RunRegistry(Metrics(), forget_after=1.0)
    first = runs.join("r", 0, PLAN, now=0.0)
    first.fail("stopped", now=0.0)
    assert refusal(lambda: runs.join("r", 1, PLAN, now=0.5))[0] == "FAILED_PRECONDITION"
    runs.check(now=2.0)
    assert runs.join("r", 1, PLAN, now=3.0) is not first


class Stored(Journal):
    """A journal with one run. strategy: its strategy."""

    def __init__(self, strategy: str) -> None:
        self._run = StoredRun("r", 1, replace(PLAN, strategy=strategy), 3, (), (1, 2, 3))

    def stored(self) -> list[StoredRun]:
        return [self._run]


def test_a_run_of_the_journal_that_nobody_continues_is_ended() -> None:
    runs = RunRegistry(Metrics(), journal=Stored("switokd"), clock=lambda: 0.0)
    runs.check(now=60.0)
    assert runs.find("r").run.failure == ""
    runs.check(now=61.0)
    assert "no stream from rank 0 (a)" in runs.find("r").run.failure


def test_a_run_of_the_journal_that_may_not_be_decided_is_left_out() -> None:
    runs = RunRegistry(Metrics(), journal=Stored("mine:Own"))
    assert refusal(lambda: runs.find("r"))[0] == "NOT_FOUND"


def test_a_rank_of_an_earlier_start_that_the_run_does_not_have_is_refused() -> None:
    runs = RunRegistry(Metrics())
    runs.join("r", 0, PLAN, now=0.0, epoch=2)
    kind, reason = refusal(lambda: runs.join("r", -1, PLAN, now=1.0, epoch=1))
    assert (kind, "rank -1 belongs to start 1 of run" in reason) == ("FAILED_PRECONDITION", True)
