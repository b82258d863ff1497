"""Whoever waits says for what, for whom and for how long, and says so again.

Not covered: downloads from the internet; machines that cannot reach each other.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from switokd.config.run_file import load
from switokd.config.sections import Compute
from switokd.data import named
from switokd.runtime import waiting as module
from switokd.runtime.environment import Environment
from switokd.runtime.phase import Activity, Phase
from switokd.runtime.process_group import World
from switokd.runtime.waiting import PeerWatch, waiting, waiting_for_first
from switokd.training import warm_up as warming
from switokd.training.build import make_learner
from switokd.training.schedules import AccumulationWindow
from tests.preloaded import forked, train_ranks
from tests.support import wait_until

NETWORKS = """\
import os, time
from pathlib import Path
import torch
from torch import nn
from switokd.runtime import waiting

waiting.LOOK_SECONDS = 0.1
IS_LATE = os.environ.get("RANK") == "1"

def until(name):
    deadline = time.monotonic() + 60
    while IS_LATE and not Path(name).exists() and time.monotonic() < deadline:
        time.sleep(0.05)

class Items(torch.utils.data.Dataset):
    classes = ["0", "1", "2", "3"]

    def __init__(self, train=True):
        until("may-join")

    def __len__(self):
        return 32

    def __getitem__(self, i):
        if torch.distributed.is_initialized():
            until("may-train")
        return torch.full((3, 8, 8), i / 32), i % 4

def mlp(num_classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
"""
RUN_FILE = """\
name: late
data: {dataset: "late_nets:Items", batch_size: 16}
networks:
  t: {role: teacher, model: "late_nets:mlp", optimizer: {name: sgd, lr: 0.05}}
  s: {role: student, model: "late_nets:mlp", optimizer: {name: sgd, lr: 0.05}}
schedule: {epochs: 1, milestones: []}
"""


class Said(list[str]):
    """Sentences, and a wait for them."""

    def __call__(self, sentence: str, who: str = "", keep: bool = True) -> None:
        self.append(sentence)

    def holds(self, count: int) -> None:
        wait_until(lambda: len(self) >= count, 10, f"{count} sentences, got {self}")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """What is said, with short times."""
    said = Said()
    monkeypatch.setattr(module, "print_warning", said)
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    return said


def test_times_are_as_promised() -> None:
    assert module.FIRST_SECONDS + module.LOOK_SECONDS < 5
    assert module.AGAIN_SECONDS == 30


def test_a_wait_is_said_again_and_leaves_no_thread(said: Said) -> None:
    before = threading.active_count()
    with waiting("the bus", 60, "is it Sunday?"):
        said.holds(2)
    assert threading.active_count() == before
    first, second, *_ = said
    assert first == "waiting for the bus, for up to 60 s; is it Sunday?"
    assert second == "waiting for the bus, for up to 60 s, 0 s so far; is it Sunday?"


def test_a_short_wait_is_not_said_and_an_error_ends_one(said: Said) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="oops"), waiting("the bus"):
        raise ValueError("oops")
    assert threading.active_count() == before
    assert said == []


def test_only_the_inner_wait_speaks(said: Said) -> None:
    with waiting("the journey"), waiting(lambda: "the " + "bus"):
        said.holds(2)
    assert {text.partition(",")[0] for text in said} == {"waiting for the bus"}
    assert "without a time limit" in said[0]


def test_the_first_item_is_waited_for(said: Said) -> None:
    def items() -> Iterator[int]:
        said.holds(1)
        yield 1
        yield 2

    assert list(waiting_for_first(items(), "the first batch")) == [1, 2]
    assert said[0] == "waiting for the first batch, without a time limit"
    assert list(waiting_for_first(iter(()), "nothing")) == []


@pytest.fixture
def watch(said: Said, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Activity]]:
    """Start the watch of a rank of three, whose activity is returned."""
    watches = []

    def start(rank: int, **states: str) -> Activity:
        store, activity = HashStore(), Activity()
        for name, state in states.items():
            store.set(f"doing/{name[1:]}", state)
        monkeypatch.setattr(module, "ACTIVITY", activity)
        watches.append(PeerWatch(store, rank, 3, 60))
        return activity

    yield start
    for each in watches:
        each.stop()


def test_the_ranks_that_are_late_are_named(watch: Callable[..., Activity], said: Said) -> None:
    activity = watch(1, r0="torch.compile: t", r2="saving")
    activity.begin(Phase.EXCHANGE, 7)
    with activity.waiting():
        said.holds(2)
    assert said[0] == "waiting for rank 0 (torch.compile: t), rank 2 (saving), for up to 60 s"


def test_a_rank_that_has_said_nothing_is_starting(
    watch: Callable[..., Activity], said: Said
) -> None:
    with watch(1, r2="waits").waiting(1800):
        said.holds(1)
    assert said[0] == "waiting for rank 0 (starting), for up to 1800 s"


@pytest.mark.parametrize(
    "states", [{"r0": "waits", "r2": "saving"}, {"r0": "evaluating", "r2": "backward"}]
)
def test_ranks_after_the_first_one_and_unequal_steps_say_nothing(
    states: dict[str, str], watch: Callable[..., Activity], said: Said
) -> None:
    with watch(1, **states).waiting():
        threading.Event().wait(0.3)  # several times as long as until the first line
    assert said == []


def test_if_all_wait_it_is_for_the_coordinators_decision(
    watch: Callable[..., Activity], said: Said
) -> None:
    activity = watch(0, r1="waits", r2="waits")
    activity.begin(Phase.DECIDING, 7)
    with activity.waiting(5):
        said.holds(1)
    assert said[0] == "waiting for the coordinator's decision of step 7, for up to 5 s"


def test_a_held_lock_is_named_before_a_download(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "data")
    os.mkdir(root)
    with open(f"{root}/.download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def release(sentence: str, who: str = "", keep: bool = True) -> None:
            said(sentence)
            fcntl.flock(lock, fcntl.LOCK_UN)

        monkeypatch.setattr(module, "print_warning", release)
        with named._downloading("CIFAR10", root):
            said.holds(2)
    assert said[0] == (
        f"waiting for another process that downloads into {root} (it holds "
        f"{root}/.download.lock), without a time limit"
    )
    assert said[-1].startswith(f"waiting for the download of CIFAR10 into {root}, without")


def test_a_compilation_says_so(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "compile_ahead", lambda learner, x: said.holds(1))
    config, compute = load("digits-1t1s"), Compute(compile=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    world = World(Environment(), torch.device("cpu"))
    learner = make_learner(config, "student", model, world, None, AccumulationWindow())
    warming.warm_up(learner, 16, (1, 8, 8), compute)
    assert said[0] == (
        "waiting for torch.compile: student, batches of 16 images, without a time limit"
    )


@pytest.mark.timeout(120)
def test_a_rank_that_is_late_is_named_by_the_other_one(tmp_path: Path) -> None:
    (tmp_path / "late_nets.py").write_text(NETWORKS)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    out, err = tmp_path / "log", tmp_path / "err"
    words = ("run.yaml", "run_dir=out")
    err.touch()
    soon = {"TESTS_FIRST_SECONDS": "0.4"}
    with forked(train_ranks, 2, words, cwd=tmp_path, out=out, err=err, **soon) as child:

        def says(sentence: str) -> None:
            wait_until(lambda: sentence in err.read_text(), 40, f"{sentence}: {err.read_text()}")

        says("rank 1: waiting for the data set late_nets:Items to be opened, without a time limit")
        says("rank 0: waiting for rank 1 to join the run, for up to 1800 s")
        (tmp_path / "may-join").touch()
        says("rank 1: waiting for the first batch of images, without a time limit")
        says("rank 0: waiting for rank 1 (the first batch of images), for up to 60 s")
        (tmp_path / "may-train").touch()
        assert child.wait(60) == 0, f"{out.read_text()}\n{err.read_text()}"
