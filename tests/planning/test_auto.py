"""`placement: auto`: the choice of placement and processes, also with real processes.

Not covered: that the choice is the fastest on real hardware; GPUs.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from switokd.config.run_file import load
from switokd.data.images import open_images
from switokd.errors import UsageError
from switokd.planning import auto
from switokd.planning.auto import (
    Option,
    choose_placement,
    describe,
    fewest_of_the_best,
)
from switokd.planning.cost_model import Prediction
from switokd.planning.pauses import expected_pauses
from switokd.planning.profile import Communication, NetworkTimes, Profile
from switokd.runtime.environment import Environment, ProcessLayout, cores
from switokd.runtime.placement import Placement, replicated
from switokd.runtime.process_group import World
from tests.preloaded import call, forked, train, train_ranks
from tests.support import REPOSITORY, lines, run, wait_until

TRAIN = [sys.executable, "-m", "switokd", "train", "digits-1t1s", "placement=auto"]
AUTO = ["--layouts=2x1,1x1", "digits-1t1s", "placement=auto"]  # as TRAIN on two cores
SMALL = "networks.teacher.model=wrn-10-1"
CONFIG = load("digits-1t1s", [SMALL])
FEW = [SMALL, "schedule.max_steps=8", "schedule.evaluate_every=20"]
ONE, TWO = ProcessLayout(1, 2), ProcessLayout(2, 1)
SLEEPERS = [
    *(f"networks.{name}.model=tests.sleepers:Sleeper" for name in CONFIG.topology),
    *(
        f"networks.{name}.model_kwargs={{forward: 0.002, backward: 0.028}}"
        for name in CONFIG.topology
    ),
    "data.batch_size=4",  # enough for two processes, however many cores there are
]
FLAT = [f"networks.{name}.model=tests.sleepers:Flat" for name in CONFIG.topology]
SLOW = """
import pathlib, signal, torch

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        if self.training:
            pathlib.Path("started").touch()
            signal.pause()  # never returns
        return super().forward(x.flatten(1))
"""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restore the number of threads, which a choice changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def saved(
    folder: Path, threads: int, seconds: float, latency: float = 0.0, device: str = "cpu"
) -> str:
    """Save a profile of CONFIG: each network takes `seconds` for a batch of 64."""

    def network(name: str) -> NetworkTimes:
        return NetworkTimes(
            role=CONFIG.networks[name].role,
            model=CONFIG.networks[name].model,
            cuda_graphs=device != "cpu",
            samples=(64,),
            forward_seconds=(seconds / 3,),
            backward_seconds=(seconds * 2 / 3,),
            update_seconds=0,
            parameter_bytes=1000,
            gradient_bytes=1000,
            optimizer_bytes=1000,
            activation_bytes_per_sample=1,
        )

    path = folder / f"{threads}-threads-{seconds}.json"
    link = Communication(
        description="a link",
        latency_seconds=latency,
        bandwidth_bytes_per_second=1e15,
        decision_seconds=0,
    )
    Profile(
        device=device,
        threads=threads,
        torch="2",
        image=(1, 8, 8),
        classes=10,
        networks={name: network(name) for name in CONFIG.topology},
        communication=link,
    ).save(path)
    return str(path)


def chosen(layouts: Sequence[ProcessLayout], profiles: Sequence[str], *settings: str) -> Placement:
    """Return the placement that rank 0 chooses from profiles; there are no other ranks."""
    told = ["placement=auto", f"auto.profiles={list(profiles)}"]
    config = load("digits-1t1s", [SMALL, *told, *settings])
    world = World(Environment(layouts=tuple(layouts)), torch.device("cpu"))
    choice = choose_placement(config, world, open_images(config.data, config.seed))
    assert not choice.measured
    return choice.placement


def option(layout: ProcessLayout, seconds: float, fits: bool = True) -> Option:
    placement = replicated(CONFIG.topology, layout.processes)
    return Option(layout, Prediction(placement, seconds, 64 / seconds, 1.0, (), fits))


def summary(folder: Path) -> dict[str, Any]:
    """Return the fields of a run's summary that contain no times."""
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    keys = ("world_size", "placement", "networks", "strategy", "seed")
    return {key: content[key] for key in keys}


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs have the same decision log and the same summary."""
    assert len(lines(one / "decisions.jsonl")) == 8
    assert (one / "decisions.jsonl").read_bytes() == (other / "decisions.jsonl").read_bytes()
    assert summary(one) == summary(other)


# The choice


def test_fewest_processes_are_chosen_among_equally_fast_options() -> None:
    four = ProcessLayout(4, 1)
    assert (
        fewest_of_the_best([option(four, 1.0), option(TWO, 2.0), option(ONE, 1.5)]).layout == four
    )
    assert (
        fewest_of_the_best([option(four, 1.0), option(TWO, 1.019), option(ONE, 1.03)]).layout == TWO
    )
    assert fewest_of_the_best([option(TWO, 3.0), option(ONE, 1.0, fits=False)]).layout == TWO


def test_printed_line_names_the_choice_and_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    pauses = expected_pauses(CONFIG.method, CONFIG.auto)
    one, two = option(ONE, 0.4123), option(TWO, 0.45)
    assert describe(one, [two, one], pauses, None) == (
        "auto: 1 process with 2 threads, 0.412 s a step; 2 processes with 1 thread each 0.45 s; "
        "pauses: assumed, independent: teacher 30%"
    )
    single = "; a single process with as many threads 0.412 s; "
    assert single in describe(two, [two], pauses, one.best)
    assert "single" not in describe(one, [one], pauses, two.best)
    large = Option(ONE, replace(one.best, memory_bytes=(1, 3 * 10**9), fits=False))
    too_large = "; no placement fits into memory, this one needs 3 GB on a rank; pauses"
    assert too_large in describe(large, [large], pauses, None)
    assert capsys.readouterr().out == ""


def test_profiles_decide_the_number_of_processes(tmp_path: Path) -> None:
    layouts = (TWO, ONE)
    few_threads, many_threads = saved(tmp_path, 1, 0.1), saved(tmp_path, 2, 0.06)
    assert chosen(layouts, [few_threads, many_threads]).world_size == 2
    assert torch.get_num_threads() == 1
    assert chosen(layouts, [few_threads, saved(tmp_path, 2, 0.04)]).world_size == 1
    assert torch.get_num_threads() == 2
    assert (
        chosen(layouts, [many_threads]).world_size == 1
    )  # there is no profile for the other layout


def test_layouts_that_need_more_images_than_there_are_are_left_out(tmp_path: Path) -> None:
    fast, slow = saved(tmp_path, 1, 0.1), saved(tmp_path, 2, 0.4)
    layouts, few = (ProcessLayout(8, 1), ProcessLayout(1, 2)), "data.train_samples=4"
    assert chosen(layouts, [fast, slow], "data.drop_last=false").world_size == 8
    assert chosen(layouts, [fast, slow], "data.drop_last=false", few).world_size == 1
    with pytest.raises(UsageError, match=r"a batch of 4 images is too small for 8"):
        chosen(layouts[:1], [fast], "data.drop_last=false", few)


def test_with_profiles_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "profile", None)
    monkeypatch.setattr(auto, "measure_links", None)
    assert chosen((TWO, ONE), [saved(tmp_path, 1, 0.1)]).world_size == 2


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        (
            [(4, 0.1)],
            "measured with 4 CPU threads, and this machine needs 2 processes with 1 thread",
        ),
        ([(1, 0.1), (1, 0.2)], "is the second profile with 1 CPU thread; name one for each number"),
        ([(1, 0.1, 0.0, "H100")], "was measured on H100, and this run computes on cpu"),
    ],
)
def test_profiles_that_cannot_be_used(
    profiles: list[tuple[Any, ...]], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        chosen((TWO, ONE), [saved(tmp_path, *profile) for profile in profiles])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Pauses


def test_pauses_come_from_the_run_file(tmp_path: Path) -> None:
    def share(*settings: str, recipe: str = "digits-2t1s") -> list[float]:
        config = load(recipe, ["placement=auto", *settings])
        pauses = expected_pauses(config.method, config.auto)
        return [pauses.share(teacher) for teacher in config.topology.teachers]

    assert share() == pytest.approx([0.3, 0.3])
    assert share("auto.paused=0.5") == pytest.approx([0.5, 0.5])
    assert share("auto.paused={teacher2: 1}") == pytest.approx([0, 1])
    assert share("auto.paused=0") == [0, 0]
    rows = [("teacher1", "expert"), ("teacher2", "learning")]
    (tmp_path / "decisions.jsonl").write_text(
        "".join(
            json.dumps({"step": 1, "teacher": t, "student": "student", "mode": mode}) + "\n"
            for t, mode in rows
        )
    )
    assert share(f"auto.run={tmp_path}") == [1, 0]
    # The setting does not matter if the strategy fixes the pauses.
    assert share("auto.paused=0.5", "distillation.strategy=dml") == [0, 0]
    by_zero = ["auto.paused=0.5", "distillation.semantics=published"]
    assert share(*by_zero, recipe="digits-1t2s") == [0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["auto.paused=0.5"], "auto.paused is for placement: auto; set placement=auto, or leave"),
        (["placement=replicated", "auto.run=x"], "auto.run is for placement: auto"),
        (["placement=auto", "auto.paused=2"], "auto.paused: found 2; allowed: a share from 0 to 1"),
        (["placement=auto", "auto.paused={teacher: true}"], "a share from 0 to 1"),
        (["placement=auto", "auto.paused={techer: 0.5}"], "no teacher 'techer'; did you mean"),
        (["placement=auto", "auto.run=x", "auto.paused=0"], "auto.run and auto.paused both give"),
        (["placement=auto", "auto.profiles=x"], 'auto.profiles: found "x"; allowed: a list'),
    ],
)
def test_mistakes_in_the_run_file(settings: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load("digits-1t1s", settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Real processes


def test_one_process_continues_and_decides_as_a_run_of_one(tmp_path: Path) -> None:
    slow_link = saved(tmp_path, threads=1, seconds=0.01, latency=1.0)
    arguments = (*AUTO, *FEW, "run_dir=out", f"auto.profiles=[{slow_link}]")
    code, out, err = call(tmp_path, train_ranks, 2, arguments)
    assert (code, err) == (0, "")
    assert out.startswith("auto: 1 process with 1 thread, 0.0")
    assert "1 process on cpu, status page http://" in out
    alone = train(tmp_path / "alone", 1, "digits-1t1s", *FEW, "placement=replicated")
    assert_same_run(tmp_path / "out", alone)


def test_first_processes_continue_and_decide_as_a_run_of_their_number(tmp_path: Path) -> None:
    profiles = [saved(tmp_path, threads, s) for threads, s in ((1, 0.4), (2, 0.1), (4, 0.4))]
    settings = [*FEW, "placement=auto", f"auto.profiles={profiles}", "auto.paused=0"]
    arguments = ("--layouts=4x1,2x2,1x4", "digits-1t1s", *settings, "run_dir=out")
    code, out, err = call(tmp_path, train_ranks, 4, arguments)
    assert code == 0, err
    assert out.startswith("auto: 2 processes with 2 threads each, 0.1 s a step; 4 processes with")
    assert "2 processes on cpu" in out
    explicit = [*TRAIN, *FEW, "placement=dedicated", "run_dir=explicit"]
    code, out, err = run(explicit, tmp_path, OMP_NUM_THREADS="2")
    assert (code, err) == (0, "")
    assert_same_run(tmp_path / "out", tmp_path / "explicit")


@pytest.mark.skipif(cores() == 1, reason="needs two cores: one is one process's")
def test_more_processes_are_chosen_if_they_are_measured_to_be_faster(tmp_path: Path) -> None:
    """Networks that sleep: more processes help, more threads do not (240 ms or 120 ms a step)."""
    settings = [*SLEEPERS, "schedule.max_steps=3", "run_dir=out"]
    code, out, err = run([*TRAIN, *settings], tmp_path, PYTHONPATH=str(REPOSITORY))
    assert (code, err) == (0, "")
    assert out.startswith("auto: 2 processes with 1 thread each, 0.")
    assert "; 1 process with 1 thread 0." in out
    assert "2 processes on cpu" in out
    assert len(lines(tmp_path / "out" / "decisions.jsonl")) == 3
    # The measured profile is saved, and can replace measuring in the next run.
    assert {p.name for p in Path(tmp_path, "out", "profiles").iterdir()} == {"2x1.json", "1x1.json"}
    profile = str(tmp_path / "out" / "profiles" / "2x1.json")
    assert chosen((TWO, ONE), [profile], *SLEEPERS).world_size == 2


@pytest.mark.skipif(cores() == 1, reason="needs two cores: one is one process's")
@pytest.mark.timeout(120)
def test_processes_and_threads_are_measured_together(tmp_path: Path) -> None:
    """OMP_NUM_THREADS is not set: a process per core is compared with one that uses all cores."""
    free = ["env", "-u", "OMP_NUM_THREADS", "OMP_WAIT_POLICY=passive", *TRAIN, *FLAT]
    command = [*free, "schedule.max_steps=2", "run_dir=out"]
    code, out, err = run(command, tmp_path, PYTHONPATH=str(REPOSITORY))
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("auto: ")]
    assert f"{cores()} processes with 1 thread each" in line
    assert re.search(r"1 process with \d+ thread", line)
    assert len(lines(tmp_path / "out" / "decisions.jsonl")) == 2


@pytest.mark.timeout(180)
def test_networks_are_compiled_for_measuring_as_in_training(tmp_path: Path) -> None:
    """Two layouts with the smallest and largest shard of each network; training compiles again."""
    settings = [*FEW, *FLAT, "compute.compile=true", "data.batch_size=8", "run_dir=out"]
    arguments = ("--layouts=2x1,1x2", "digits-1t1s", "placement=auto", *settings)
    code, out, err = call(tmp_path, train_ranks, 2, arguments, seconds=170)
    assert code == 0, err
    assert re.match(r"auto: (1|2) process.*; (1|2) process", out)
    assert len(lines(tmp_path / "out" / "decisions.jsonl")) == 8
    for name, sizes in (("2x1", (4, 8)), ("1x2", (8,))):
        profile = Profile.load(tmp_path / "out" / "profiles" / f"{name}.json")
        assert profile.compile
        assert profile.sizes == sizes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["auto.run=nowhere"], "nowhere/decisions.jsonl cannot be read: No such file"),
        (["auto.profiles=[none.json]"], "none.json: cannot be read as a profile: No such file"),
        (["networks.student.model_kwargs={nope: 1}"], "model wrn-10-1 cannot be made"),
        (["data.dataset=cifar10"], "data.root: CIFAR10 is not in"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    settings: list[str], words: str, tmp_path: Path
) -> None:
    code, out, err = call(tmp_path, train_ranks, 2, (*AUTO, *settings, "run_dir=out"))
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("switokd: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_fixed_number_takes_pauses_and_profile_from_the_run_file(tmp_path: Path) -> None:
    before = [{"step": 1, "teacher": "teacher", "student": "student", "mode": "expert"}]
    (tmp_path / "decisions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    given = [f"auto.profiles=[{saved(tmp_path, 8, 0.1)}]", "auto.run=.", "placement=auto"]
    arguments = ("digits-1t1s", *given, *FEW, "run_dir=out")
    code, out, err = call(tmp_path, train_ranks, 2, arguments)
    assert code == 0, err
    assert re.match(
        r"auto: 2 processes with 1 thread each, 0\.\d+ s a step; pauses: in the 1 steps of \.: "
        r"teacher 100%\n2 processes on cpu",
        out,
    )


def test_ctrl_c_while_measuring(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    log, started = tmp_path / "log", tmp_path / "started"
    arguments = (*AUTO, "networks.student.model=slow:Net", "run_dir=out")
    with forked(train_ranks, 2, arguments, cwd=tmp_path, out=log) as child:
        wait_until(started.exists, 60, "a network is measured")
        family = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130, log.read_text()
        gone, alive = psutil.wait_procs(family, timeout=10)
        assert gone
        assert not alive
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "out").exists()


def test_ranks_share_the_memory_of_their_gpu_or_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "device_memory", lambda device: 800)
    env, gpu = Environment(world_size=16, local_world_size=8), torch.device("cuda", 0)
    assert auto.memory_per_rank(World(env, gpu, sharing=2), ProcessLayout(16, 1)) == 400
    assert (
        auto.memory_per_rank(World(env, gpu), ProcessLayout(16, 1)) == 800
    )  # each rank has its own GPU
    cpu = World(env, torch.device("cpu"), sharing=16)
    assert [auto.memory_per_rank(cpu, ProcessLayout(n, 1)) for n in (16, 4)] == [100, 200]
