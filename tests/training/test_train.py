"""Whole runs as a user starts them: real processes, real data, and the resulting run folder.

Most tests fork their ranks, because they are about the run and not about its launcher. The demo,
a repeated run, one process alone, `placement=auto`, two nodes and two mistakes start real commands.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from switokd.config.run_file import load
from switokd.models import registry
from tests.preloaded import call, train, train_ranks
from tests.support import lines, process, run, switokd_train, torchrun, wait_until

RUN_FOLDER = {
    *("config.yaml", "signature.json", "decisions.jsonl", "metrics.jsonl", "summary.json"),
    *("curves.png", "checkpoints", "attempts.jsonl", "run.json"),
}


def complaints(text: str) -> list[str]:
    """Return the messages, without those about waits: a busy machine has more of them."""
    messages = [line for line in text.splitlines() if line.startswith("switokd: ")]
    return [line for line in messages if not re.search("waiting for|wait for it$", line)]


def test_the_demo_command_writes_a_complete_run_folder(tmp_path: Path) -> None:
    command = switokd_train(3, "digits-2t1s", "schedule.epochs=1", "run_dir=out")
    code, out, err = run(command, tmp_path)
    assert code == 0, err
    folder = tmp_path / "out"
    found = {p.name for p in folder.iterdir()} - {"warnings.jsonl"}  # of a busy machine
    assert found == RUN_FOLDER | {"weights"}
    for shown in ("teacher1", "teacher2", "student", "691,386", "out/curves.png", "metrics.jsonl"):
        assert shown in out
    assert "http://127.0.0.1:" in out

    config = load(str(folder / "config.yaml"))
    assert config == load("digits-2t1s", ["schedule.epochs=1", "run_dir=out"])

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["strategy"] == "switokd"
    assert summary["world_size"] == 3
    assert summary["samples_per_second"] > 0
    assert summary["wall_seconds"] > 0
    assert [n["role"] for n in summary["networks"].values()] == ["teacher", "teacher", "student"]
    for name, network in summary["networks"].items():
        assert network["steps"] == 22
        assert 10 <= network["top1_last"] <= network["top1_best"] <= 100
        state = torch.load(folder / "weights" / f"{name}.pt", weights_only=True)
        model = registry.build(config.networks[name].model, in_channels=1, num_classes=10)
        model.load_state_dict(state)
        assert network["parameters"] == registry.parameter_count(model)
    metrics = lines(folder / "metrics.jsonl")
    assert [(m["epoch"], m["network"]) for m in metrics] == [(1, n) for n in summary["networks"]]
    assert (folder / "curves.png").stat().st_size > 10_000

    decisions = lines(folder / "decisions.jsonl")
    assert [d["step"] for d in decisions] == [step for step in range(1, 23) for _ in range(2)]
    for d in decisions:
        epsilon = math.exp(-d["e_t"] / (d["e_s"] + d["e_t"]))
        delta = d["e_s"] - epsilon * d["e_t"]
        assert (d["epsilon"], d["delta"]) == (epsilon, delta)
        is_expert = d["gap"] > delta and d["e_t"] < d["e_s"]
        assert d["mode"] == ("expert" if is_expert else "learning")
        assert d["n"] == 64


def test_switokd_train_starts_all_processes_and_is_repeatable(tmp_path: Path) -> None:
    words = ("digits-1t1s", "schedule.max_steps=4")
    runs = [
        run([sys.executable, "-m", "switokd", "train", *words], tmp_path),
        call(tmp_path, train_ranks, 2, words),
    ]
    for number, (code, _, err) in enumerate(runs, start=1):
        assert code == 0, err
        assert err == ""
        assert (tmp_path / "runs" / f"digits-1t1s-00{number}" / "summary.json").exists()
    first, second = (tmp_path / "runs" / f"digits-1t1s-00{n}" for n in (1, 2))
    assert (first / "decisions.jsonl").read_text() == (second / "decisions.jsonl").read_text()
    weights = [path.relative_to(first) for path in (first / "weights").rglob("*.pt")]
    assert len(weights) == 4
    for path in weights:
        ours, theirs = (torch.load(folder / path) for folder in (first, second))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


NETWORK = """
from torch import nn

def small(hidden, in_channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, hidden), nn.ReLU(),
                         nn.Linear(hidden, num_classes))

def conv(in_channels, num_classes):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(8 * 64, num_classes))

class two_faced(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        return super().forward(x.flatten(1))[:, : 5 if self.training else 10]
"""


# In every second step the teacher's logits are far from the student's, which are always zero.
EVERY_SECOND = """
import torch
from switokd.distillation.decision import Mode
from switokd.distillation.strategies.base import Strategy
from tests.sleepers import Sleeper

class WhereFar(Strategy):
    pauses = True

    def switch(self, d, delta):
        return Mode.EXPERT if d.gap > 1 else Mode.LEARNING

class Teacher(Sleeper):
    steps = 0

    def forward(self, x):
        self.steps += self.training
        far = torch.zeros(10)
        far[0] = 10.0 * (self.steps % 2)
        return 0 * super().forward(x) + far

class Student(Sleeper):
    def forward(self, x):
        return 0 * super().forward(x)
"""


def test_the_summary_has_the_time_saved_by_pauses_and_the_waiting_times(tmp_path: Path) -> None:
    """On each of two ranks, the teacher's backward of 4 images takes 120 ms."""
    (tmp_path / "far.py").write_text(EVERY_SECOND)
    teacher = "{role: teacher, model: far:Teacher, model_kwargs: {forward: 0.001, backward: 0.03}}"
    student = "{role: student, model: far:Student, model_kwargs: {forward: 0.001, backward: 0.01}}"
    settings = [f"networks.teacher={teacher}", f"networks.student={student}", "data.batch_size=8"]
    settings += ["distillation.strategy=far:WhereFar", "placement=replicated"]
    steps, paused, backward = 16, 8, 0.12
    settings += [f"schedule.max_steps={steps}"]
    folder = train(tmp_path, 2, "digits-1t1s", *settings)
    modes = [d["mode"] for d in lines(folder / "decisions.jsonl")]
    assert modes == ["expert", "learning"] * paused
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["networks"]["teacher"]["steps_paused"] == paused
    assert summary["placement"] == "teacher: ranks 0-1, student: ranks 0-1"
    even = {"0": 1.0, "1": 1.0}
    assert summary["placement_table"] == {"teacher": even, "student": even}

    # On a busy machine a sleep takes longer, never shorter. A value of half or twice the expected
    # one would come from counting one rank instead of two, or two instead of one.
    saved = summary["saved_by_pauses"]
    for key in ("device_seconds", "teachers_device_seconds"):  # sum over both ranks
        assert 0.8 < saved[key] / (2 * backward * paused) < 1.9, saved
    assert 0.8 < saved["wall_seconds"] / (backward * paused) < 1.9, (
        saved
    )  # both ranks pause at the same time
    waiting = summary["waiting"]
    assert 0 <= waiting["decision_mean_seconds"] <= waiting["decision_p99_seconds"]
    assert waiting["decision_p99_seconds"] > 0
    assert len(waiting["exchange_seconds_by_rank"]) == 2
    assert all(0 < s < summary["wall_seconds"] for s in waiting["exchange_seconds_by_rank"])
    assert {network["samples"] for network in summary["networks"].values()} == {steps * 8}


def test_auto_measures_and_trains(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "switokd", "train", "digits-2t1s", "placement=auto"]
    command += ["networks.teacher1.model=wrn-10-2", "networks.teacher2.model=wrn-10-1"]
    code, out, err = run([*command, "-n", "2", "run_dir=out", "schedule.max_steps=6"], tmp_path)
    assert code == 0, err
    assert "2 processes on cpu" in out
    assert re.search(r"placement teacher1: ranks? 0", out)
    assert len(lines(tmp_path / "out" / "decisions.jsonl")) == 12


def test_one_process_without_a_coordinator_writes_the_same_decision_log(tmp_path: Path) -> None:
    settings = ["digits-1t2s", "networks.teacher.model=wrn-10-1", "schedule.max_steps=12"]
    settings.append("placement=replicated")
    command = [sys.executable, "-m", "switokd.train", *settings]
    code, out, err = run([*command, "coordinator=off", "run_dir=alone"], tmp_path)
    assert code == 0, err
    assert "1 process on cpu, no coordinator" in out
    folders = (tmp_path / "alone", train(tmp_path, 1, *settings))
    alone, served = (folder / "decisions.jsonl" for folder in folders)
    assert len(lines(alone)) == 24
    assert alone.read_bytes() == served.read_bytes()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "setting",
    ["precision=bf16", "compile=true", "precision=tf32", "channels_last=false"],
)
def test_each_compute_setting_trains(setting: str, tmp_path: Path) -> None:
    (tmp_path / "mynets.py").write_text(NETWORK)
    networks = [f"networks.{n}.model=mynets:conv" for n in ("teacher", "student")]
    settings = ["digits-1t1s", *networks, f"compute.{setting}", "schedule.epochs=2"]
    settings += ["placement=replicated", "coordinator=off"]
    folder = train(tmp_path, 1, *settings, seconds=200)
    metrics = lines(folder / "metrics.jsonl")
    student = [m["loss"] for m in metrics if m["network"] == "student"]
    assert student[1] < student[0]
    state = torch.load(folder / "weights" / "student.pt", weights_only=True)
    assert all(v.dtype is torch.float32 and v.is_contiguous() for v in state.values())


def test_a_run_file_in_another_folder_with_a_users_own_network(tmp_path: Path) -> None:
    elsewhere, started_in = tmp_path / "project", tmp_path / "cwd"
    elsewhere.mkdir()
    started_in.mkdir()
    (elsewhere / "mynets.py").write_text(NETWORK)
    run_file = {
        "name": "mine",
        "networks": {
            "big": {"role": "teacher", "model": "mynets:small", "model_kwargs": {"hidden": 99}},
            "small": {"role": "student", "model": "mynets:small", "model_kwargs": {"hidden": 9}},
        },
        "schedule": {"epochs": 1},
    }
    (elsewhere / "mine.yaml").write_text(yaml.safe_dump(run_file))
    folder = train(started_in, 2, str(elsewhere / "mine.yaml"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["topology"] == "1T1S"
    assert summary["networks"]["small"]["parameters"] == 64 * 9 + 9 + 9 * 10 + 10


def test_fashion_mnist_from_debians_package(tmp_path: Path) -> None:
    packaged = Path("/usr/share/datasets/fashion-mnist")
    if not packaged.is_dir():
        missing = "the Debian package dataset-fashion-mnist is not installed"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in packaged.glob("*.gz"):
        content = gzip.decompress(file.read_bytes())
        is_test = file.name.startswith("t10k")  # its first 200 images are enough
        (raw / file.stem).write_bytes(_first(content, 200) if is_test else content)
    settings = ["networks.teacher1.model=wrn-10-1", "networks.teacher2.model=wrn-10-1"]
    settings += ["placement=replicated", "coordinator=off", "data.batch_size=32"]
    folder = train(tmp_path, 1, "fashion-2t1s", "schedule.max_steps=4", "data.workers=1", *settings)
    assert len(lines(folder / "decisions.jsonl")) == 8
    summary = json.loads((folder / "summary.json").read_text())
    assert all(n["top1_last"] > 0 for n in summary["networks"].values())


def _first(content: bytes, items: int) -> bytes:
    """Return an IDX file with the first items of another: images of 28 x 28, or labels."""
    header, size = (16, 28 * 28) if content[3] == 3 else (8, 1)
    return content[:4] + items.to_bytes(4, "big") + content[8 : header + items * size]


def test_one_coordinator_serves_several_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "switokd", "coordinator", "--port", "0", "--http-port", "0"]
    with process(command, tmp_path) as coordinator:
        assert coordinator.stdout is not None
        ready = json.loads(coordinator.stdout.readline())
        settings = [f"coordinator.address={ready['grpc']}", "schedule.max_steps=3"]
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            folder = train(tmp_path / name, 2, "digits-1t1s", *settings)
            assert len(lines(folder / "decisions.jsonl")) == 3
        assert coordinator.poll() is None


MISTAKES = {
    "unknown key": (["schedule.epoch=3"], 3, "did you mean schedule.epochs?"),
    "world size": ([], 2, "needs 3 processes, found 2: torchrun --standalone --nproc-per-node=3"),
    "missing data": (["data.dataset=cifar100"], 3, "set data.download=true"),
    "model": (
        ["networks.teacher2.model_kwargs={nope: 1}"],
        3,
        "rank 1 (teacher2): networks.teacher2: model wrn-",
    ),
    "wrong output": (
        ["networks.student.model=torch.nn:Identity"],
        3,
        "rank 2 (student): networks.student: model torch.nn:Identity must turn 2 images into "
        "logits of shape (2, 10)",
    ),
    "training output": (
        ["networks.student.model=mynets:two_faced"],
        3,
        "rank 2 (student): model mynets:two_faced must turn 64 images into logits of shape "
        "(64, 10) in training, got",
    ),
    "no coordinator": (
        ["coordinator.address=127.0.0.1:1", "coordinator.timeout=1.0"],
        3,
        "the coordinator at 127.0.0.1:1 does not answer within 1 s",
    ),
}


# These end before they import PyTorch, so that torchrun starts them soon.
BY_TORCHRUN = ("unknown key", "world size")


@pytest.mark.parametrize("case", MISTAKES)
def test_a_usage_error_is_one_line_without_a_traceback(case: str, tmp_path: Path) -> None:
    settings, processes, words = MISTAKES[case]
    (tmp_path / "mynets.py").write_text(NETWORK)
    arguments = ("digits-2t1s", "run_dir=out", *settings)
    if case in BY_TORCHRUN:
        code, _, err = run(torchrun(processes, *arguments), tmp_path)
        assert code != 0
        assert "exitcode  : 2 " in err
    else:
        code, _, err = call(tmp_path, train_ranks, processes, arguments)
        assert code == 2 or (code and case == "no coordinator"), err
    messages = complaints(err)
    # One line for an error that all ranks raise; otherwise up to one line per rank.
    expected = 3 if case in ("no coordinator", "training output") else 1
    assert 1 <= len(set(messages)) <= expected, err
    assert any(words in line for line in messages), err
    # Only torchrun itself prints a traceback, at the end.
    assert "Traceback" not in err.partition("torch/distributed/elastic")[0]
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_run_that_fails_before_its_first_step_leaves_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "mynets.py").write_text(NETWORK)
    words = ("digits-1t1s", "run_dir=out", "networks.student.model=mynets:two_faced")
    code, _, err = call(tmp_path, train_ranks, 2, words)
    assert code == 2, err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_stays_full_ends_the_run_after_its_last_step(tmp_path: Path) -> None:
    train_command = "-m switokd train digits-1t1s run_dir=out networks.teacher.model=wrn-10-1"
    train_command += " schedule.epochs=2"
    # The shell limits files to 8 KiB: some 15 steps of the decision log.
    limited = ["bash", "-c", f"ulimit -f 8; trap '' XFSZ; exec {sys.executable} {train_command}"]
    # The file in which `make cover` counts lines would not fit either.
    code, _, err = run(limited, tmp_path, seconds=60, COVERAGE_PROCESS_CONFIG="")
    assert code == 2, err
    assert "switokd: out/decisions.jsonl cannot be written: File too large; training goes on" in err
    assert "there is none yet" in err  # of the checkpoint
    assert err.splitlines()[-1] == "switokd: run_dir: out cannot be written: File too large"
    assert "Traceback" not in err


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(tmp_path: Path) -> None:
    settings = ["networks.teacher.optimizer={lr: 1e30, weight_decay: 1e30}", "schedule.max_steps=1"]
    code, _, err = call(tmp_path, train_ranks, 2, ("digits-1t1s", "run_dir=out", *settings))
    assert code == 3, err
    assert "network teacher (rank 0) has weights that are not finite after its last step" in err
    assert not (tmp_path / "out" / "weights").exists()


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep me")
    code, _, err = call(tmp_path, train_ranks, 2, ("digits-1t1s", "run_dir=out"))
    assert code == 2
    assert complaints(err) == err.splitlines()
    assert "out is not empty, and a run never overwrites files" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_ranks_with_different_settings_end_and_name_the_rank_and_key(tmp_path: Path) -> None:
    """Start two nodes of one process each, the second with another seed."""
    from tests.support import free_port

    port, logs = free_port(), [tmp_path / "log0", tmp_path / "log1"]
    commands = [
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *(f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"),
            *("-m", "switokd.train", "digits-1t1s", f"run_dir=out{node}", f"seed={node}"),
        ]
        for node in (0, 1)
    ]
    with (
        process(commands[0], tmp_path, logs[0]) as a,
        process(commands[1], tmp_path, logs[1]) as b,
    ):
        wait_until(lambda: None not in (a.poll(), b.poll()), 60, "both ended")
        assert a.returncode
        assert b.returncode
    for log in logs:
        (line,) = complaints(log.read_text())
        assert (
            "rank 1 was started with another configuration: seed is 1 there and 0 on rank 0" in line
        )
    assert not (tmp_path / "out0").exists()
