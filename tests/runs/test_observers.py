"""Observers of the user: by import string and from Python, their events, and what errors do.

Not covered: the trackers that come with the package (`trackers/test_trackers.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import switokd
from switokd.config.run_file import load
from switokd.errors import OwnCodeError, UsageError
from switokd.runs.observers import GuardedObserver, make_observers
from switokd.runs.trackers import tracker
from tests.preloaded import call, train_ranks
from tests.support import lines

FEW = {"schedule.max_steps": 4, "checkpoint.every_steps": 2, "tracking.every_steps": 2}
ONE = "digits-1t1s"
OWN = """
import switokd

class Noted(switokd.Observer):
    def __init__(self, file="events.txt", fails=""):
        self.file, self.fails = file, fails

    def note(self, event):
        with open(self.file, "a") as file:
            file.write(f"{event}\\n")
        if event == self.fails:
            raise KeyError("what is missing")

    def on_run(self, run):
        self.note(f"run {run.config.name} {run.step}/{run.steps} {run.folder.name}")

    def on_begin(self):
        self.note("begin")

    def on_decision(self, decision):
        self.note(f"decision {decision.step}")

    def on_step(self, step, epoch, result):
        self.note(f"step {step} {sorted(result.logits)}")

    def on_epoch(self, metrics):
        self.note(f"epoch {metrics.epoch} {sorted(metrics.test_top1)}")

    def on_checkpoint(self, step, state):
        self.note(f"checkpoint {step}")

    def on_weights(self, folder, states):
        self.note(f"weights {folder}")

    def on_end(self, error):
        self.note(f"end {error!r}")

def number():
    return 7
"""
EVENTS = """\
run digits-1t1s 0/4 out
begin
decision 1
step 1 ['student', 'teacher']
decision 2
step 2 ['student', 'teacher']
checkpoint 2
decision 3
step 3 ['student', 'teacher']
decision 4
step 4 ['student', 'teacher']
checkpoint 4
epoch 0 ['student', 'teacher']
weights weights/best
weights weights
end None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of the user's, which is the current one."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(observers: list[Any], **settings: Any) -> switokd.Run:
    names = [each for each in observers if isinstance(each, str)]
    objects = [each for each in observers if not isinstance(each, str)]
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    given = {**FEW, "run_dir": "out", "observers": names, **dotted}
    return switokd.train(ONE, given, observers=objects)


class Noting(switokd.Observer):
    """Notes the end, and may raise something in a step."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.steps = error, 0
        self.ends: list[BaseException | None] = []

    def on_step(self, step: int, epoch: int, result: Any) -> None:
        self.steps = step
        if self.error:
            raise self.error

    def on_end(self, error: BaseException | None) -> None:
        self.ends.append(error)


def test_an_observer_named_in_the_run_file_receives_all_events(own: Path) -> None:
    kwargs = {"own:Noted": {"file": "noted.txt"}}
    run = train(["own:Noted"], tracking__kwargs=kwargs)
    assert (own / "noted.txt").read_text() == EVENTS
    assert str(own) in run.config.import_from  # 'switokd train --resume' finds it from anywhere
    assert run.config.observers == ("own:Noted",)


def test_objects_of_the_program_watch_as_well(own: Path) -> None:
    noting = Noting()
    run = train([noting])
    assert (noting.steps, noting.ends) == (4, [None])
    assert run.config.observers == ()


def test_an_error_is_one_line_and_the_training_goes_on(
    own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    noting = Noting()
    failing = {"own:Noted": {"fails": "decision 2"}}
    run = train(["own:Noted", noting], tracking__kwargs=failing)
    assert run.summary["networks"]["student"]["steps"] == 4
    assert len(run.decisions) == 4
    assert (noting.steps, noting.ends) == (4, [None])
    assert (own / "events.txt").read_text().endswith("decision 2\n")  # and nothing more
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "observer" in line)
    assert line == (
        "switokd: own.py:12 in note (observer own:Noted in on_decision): KeyError: 'what is "
        'missing\' (`raise KeyError("what is missing")`); the training goes on without this '
        "observer (tracking.on_error)"
    )


def test_an_error_stops_the_run_if_the_run_file_says_so(own: Path) -> None:
    failing = {"own:Noted": {"fails": "begin"}}
    noting = Noting()
    with pytest.raises(OwnCodeError, match="observer own:Noted in on_begin") as caught:
        train(["own:Noted", noting], tracking__kwargs=failing, tracking__on_error="stop")
    assert noting.ends == [caught.value]


def test_an_error_on_the_thread_of_the_decisions_stops_all_ranks(own: Path) -> None:
    words = [
        *("digits-1t1s", "schedule.max_steps=6", "observers=[own:Noted]", "run_dir=out"),
        *("tracking.on_error=stop", "tracking.kwargs={'own:Noted': {fails: decision 3}}"),
    ]
    code, out, err = call(own, train_ranks, 2, tuple(words))
    assert code == 2, out + err
    said = "own.py:12 in note (observer own:Noted in on_decision): KeyError: 'what is missing'"
    assert f"switokd: rank 0 (teacher): {said}" in err
    assert "Traceback" not in err


def test_the_end_tells_why(own: Path) -> None:
    noting, error = Noting(), KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        train([noting, Noting(error)])
    assert noting.ends == [error]


def test_an_observer_cannot_end_the_process(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train([Noting(SystemExit(3))])
    assert (
        "SystemExit: it ends the process, with 3 (`raise self.error`); the"
        in capfd.readouterr().err
    )


def test_what_is_no_observer_is_refused_before_the_run_has_a_folder(own: Path) -> None:
    for observers, settings, problem in (
        (["own:number"], {}, "own:number is a int; allowed: an object of a class that inherits"),
        (["own:Noted"], {"fail": "x"}, r"own:Noted cannot be made.*unexpected.*'fail'"),
        (["own:Nothing"], {}, "'Nothing' is not there in module own"),
        (["none:Noted"], {}, "there is no module 'none'"),
        ([3], {}, "observers: int is a int"),
    ):
        kwargs = {observers[0]: settings} if settings else {}
        with pytest.raises(UsageError, match=problem):
            train(observers, tracking__kwargs=kwargs)
        assert not (own / "out").exists()
    with pytest.raises(UsageError, match="name its class in the run file"):
        switokd.train(ONE, FEW, processes=2, observers=[Noting()])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["observers=[tensorbord]"], "did you mean 'tensorboard'?"),
        (["observers=[wandb, wandb]"], "observers: wandb is named twice"),
        (["tracking.kwargs={mlflow: {}}"], "'mlflow' is no observer of the run (observers: none)"),
        (["tracking.every_steps=0"], "tracking.every_steps: found 0"),
        (["tracking.on_error=ignore"], "'continue' or 'stop'"),
    ],
)
def test_a_mistake_in_the_run_file(settings: list[str], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(ONE, settings)
    assert problem in str(caught.value)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UsageError, match=r"wandb cannot be imported .*'switokd\[wandb\]'"):
        make_observers(load(ONE, ["observers=[wandb]"]), (), print)


def test_events_of_two_threads_come_one_at_a_time() -> None:
    inside, most = 0, 0

    class Slow(switokd.Observer):
        def on_begin(self) -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    guarded = GuardedObserver("slow", Slow(), False, print)
    threads = [threading.Thread(target=guarded.on_begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


class Rows(switokd.Tracker):
    """Keeps its rows; may fail or wait."""

    def __init__(self, fails: bool = False, waits: threading.Event | None = None) -> None:
        super().__init__()
        self.fails, self.waits = fails, waits
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.threads: set[int] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.threads.add(threading.get_ident())
        if self.waits:
            self.waits.wait(20)
        if self.fails:
            raise OSError("the server is gone")
        self.rows.append((step, values))


def test_a_tracker_of_the_user_gets_rows_on_a_thread_of_its_own(own: Path) -> None:
    rows = Rows()
    run = train([rows])
    assert [step for step, _ in rows.rows] == [2, 4, 4]  # the checkpoint, then the epoch
    gaps = [line["gap"] for line in lines(run.path / "decisions.jsonl")]
    assert rows.rows[0][1]["gap/teacher/student"] == pytest.approx(sum(gaps[:2]) / 2)
    assert rows.rows[2][1]["test_accuracy/student"] == run.metrics[1]["test_top1"]
    assert threading.get_ident() not in rows.threads


def test_a_tracker_that_fails_or_hangs_does_not_hold_the_run(
    own: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "END_SECONDS", 0.2)
    event = threading.Event()
    train([Rows(fails=True), Rows(waits=event)])
    event.set()
    errors = capfd.readouterr().err
    assert "observer Rows in on_" in errors
    assert "OSError: the server is gone (`raise OSError(" in errors
    assert "TimeoutError: the last rows were not written within 0.2 s" in errors
