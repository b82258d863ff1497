"""A run that was interrupted ends in the same bits as one that was not.

Not covered: the files of a checkpoint (`tests/runs/test_checkpoints.py`); GPUs.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from switokd import worker
from switokd.cli.main import app
from switokd.config.run_file import load, load_importable
from switokd.runs.checkpoints import stored
from switokd.runtime.environment import environment
from tests.preloaded import Forked, call, forked, switokd_command, train, train_ranks
from tests.support import lines, process, switokd_train, torchrun, wait_until

# Two epochs of 9 steps; the last batch of an epoch is smaller.
SMALL = ["data.train_samples=280", "data.drop_last=false", "data.batch_size=32"]
SMALL += ["schedule.epochs=2", "schedule.milestones=[1]", "checkpoint.every_steps=3"]
SMALL += ["checkpoint.keep=100", *(f"networks.{n}.model=wrn-10-1" for n in ("teacher", "student"))]
ALONE = ["placement=replicated", "coordinator=off"]
CHECKPOINTS = [3, 6, 9, 12, 15, 18]
"""After these steps; 9 and 18 are the ends of the epochs."""

OWN = """
import random
import numpy as np
import torch
from torch import nn
from switokd.distillation.strategies.switching import SwitOKD

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5))
        self.last = nn.Linear(16, 10)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
        x = x + 0.1 * random.random() + 0.1 * np.random.rand()
        return self.last(self.layers(x)) * (1 + 0.01 * self.seen)

class Growing(SwitOKD):
    steps = 0

    def combine(self, logits, y):
        self.steps += 1
        return {}

    def terms(self, network, couplings, decision):
        terms = super().terms(network, couplings, decision)
        return [type(t)(t.peer, t.weight * (1 + 0.1 * self.steps), t.tau) for t in terms]

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]
"""

CASES = {
    "plain": [],
    "accumulation-and-average": [
        "schedule.accumulate=4",
        "schedule.ema_decay=0.9",
        "networks.teacher.clip_norm=1.0",
    ],
    "fp16": [
        "compute.precision=fp16",
        *(f"networks.{name}.model=tests.sleepers:Flat" for name in ("teacher", "student")),
        "networks.student.optimizer={name: adam, lr: 0.001}",
    ],
    "soft-targets": ["data.mixup=0.2", "data.label_smoothing=0.1"],
    "kdcl-general": [
        "distillation={strategy: kdcl-general, strategy_kwargs: {held_out: 16}}",
        "data.train_samples=296",
    ],
    "own": [
        "networks.teacher.model=own:Net",
        "networks.student.model=own:Net",
        "distillation.strategy=own:Growing",
    ],
}


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return all weights of a run by file."""
    files = sorted((folder / "weights").rglob("*.pt"))
    return {str(f.relative_to(folder)): torch.load(f, weights_only=True) for f in files}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times."""
    return [
        {key: value for key, value in line.items() if key != "samples_per_second"}
        for line in lines(folder / "metrics.jsonl")
    ]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Assert that record and weights of two runs are equal bit by bit."""
    assert (one / "decisions.jsonl").read_bytes() == (other / "decisions.jsonl").read_bytes()
    assert metrics(one) == metrics(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for file, state in first.items():
        for key, value in state.items():
            assert torch.equal(value, second[file][key]), f"{file}: {key}"
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert summaries[0]["networks"] == summaries[1]["networks"]


def keep_until(folder: Path, step: int) -> None:
    """Remove the checkpoints after `step`."""
    for checkpoint in stored(folder):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)


def train_here(settings: list[str]) -> None:
    """Train in this process, in the current folder, on one thread."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    try:
        worker.train(load_importable("digits-1t1s", settings), environment({}))
    finally:
        signal.signal(signal.SIGTERM, handler)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint_leads_to_the_same_bits(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    settings = [*SMALL, *ALONE, *CASES[case]]
    train_here([*settings, "run_dir=whole"])
    assert sorted(c.step for c in stored(Path("whole"))) == CHECKPOINTS
    for step in CHECKPOINTS if case == "plain" else (6, 9, 15):
        folder = Path(f"from-{step}")
        shutil.copytree("whole", folder)
        keep_until(folder, step)
        train_here([*settings, f"run_dir={folder}", "resume=auto"])
        assert_equal_runs(Path("whole"), folder)
        assert not json.loads((folder / "summary.json").read_text())["restarts"]


PLACEMENTS = {
    "dedicated": (2, ["data.workers=1"]),
    "replicated": (2, ["placement=replicated", "schedule.accumulate=4"]),
    "table": (3, ["placement={teacher: {0: 2, 1: 1}, student: [1, 2]}"]),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_several_ranks_resume_to_the_same_bits(placement: str, tmp_path: Path) -> None:
    """In the middle of an epoch; also with another number of loader processes."""
    processes, more = PLACEMENTS[placement]
    whole = train(tmp_path, processes, "digits-1t1s", *SMALL, *more)
    shutil.copytree(whole, tmp_path / "again" / "out")
    keep_until(tmp_path / "again" / "out", 12)
    again = [*SMALL, *more, "data.workers=0", "resume=auto"]
    assert_equal_runs(whole, train(tmp_path / "again", processes, "digits-1t1s", *again))


def test_another_placement_continues_with_the_same_state(tmp_path: Path) -> None:
    """Sums are rounded in another order, so the last steps differ a little."""
    more = ["schedule.accumulate=4", "networks.student.model=tests.sleepers:Flat"]
    more.append("networks.teacher.model=tests.sleepers:Flat")
    whole = train(tmp_path, 2, "digits-1t1s", *SMALL, *more, "placement=replicated")
    shutil.copytree(whole, tmp_path / "again" / "out")
    keep_until(tmp_path / "again" / "out", 3)
    again = [*SMALL, *more, "placement=dedicated", "resume=auto"]
    moved = train(tmp_path / "again", 2, "digits-1t1s", *again)
    assert len(lines(moved / "decisions.jsonl")) == len(lines(whole / "decisions.jsonl"))
    initial, ends = weights(whole), weights(moved)
    for file, state in initial.items():
        for key, value in state.items():
            torch.testing.assert_close(ends[file][key], value, rtol=1e-3, atol=1e-4)


LONG = [*SMALL, "schedule.epochs=6", "checkpoint.every_steps=5"]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with `LONG` that was not interrupted."""
    return train(tmp_path_factory.mktemp("long"), 2, "digits-1t1s", *LONG)


def run_until(folder: Path, step: int, child: Forked) -> dict[int, psutil.Process]:
    """Wait until a run has decided `step`; return its ranks."""
    log, ranks = folder / "out" / "decisions.jsonl", {}
    wait_until(lambda: log.exists() and len(lines(log)) >= step, 60, f"step {step}")
    for each in psutil.Process(child.pid).children():
        if each.name().startswith("switokd rank"):
            ranks[int(each.name().rpartition(" ")[2])] = each
    return ranks


@pytest.mark.parametrize("stop", ["rank 0", "rank 1", "SIGTERM"])
def test_an_interrupted_run_continues_to_the_same_bits(
    stop: str, long_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    words = ("digits-1t1s", *LONG, "run_dir=out", "resume=auto")
    log = tmp_path / "log"
    with forked(train_ranks, 2, words, cwd=folder, out=log) as child:
        ranks = run_until(folder, 13, child)
        if stop == "SIGTERM":
            child.send_signal(signal.SIGTERM)
        else:
            ranks[int(stop[-1])].kill()
        assert child.wait(60) == (143 if stop == "SIGTERM" else 4), log.read_text()
    text = log.read_text()
    if stop == "SIGTERM":
        (line,) = (li for li in text.splitlines() if li.startswith("switokd:"))
        assert "continue with: switokd train --resume out" in line
    code, out, err = call(folder, train_ranks, 2, words)
    assert code == 0, err
    assert "continuing out after step" in out
    assert_equal_runs(long_run, folder / "out")


def test_a_killed_loader_process_changes_no_bit(long_run: Path, tmp_path: Path) -> None:
    words, log = ("digits-1t1s", *LONG, "data.workers=1", "run_dir=out"), tmp_path / "log"
    with forked(train_ranks, 2, words, cwd=tmp_path, out=log) as child:
        ranks = run_until(tmp_path, 5, child)

        def loaders() -> list[psutil.Process]:
            """Return rank 1's loader process; empty while there are none or two."""
            family = [p for p in ranks[1].children(recursive=True) if not p.children()]
            found = [p for p in family if any("forkserver" in word for word in p.cmdline())]
            return found if len(found) == 1 else []

        victim = wait_until(loaders, 20, "one loader process")[0]
        victim.kill()
        assert child.wait(90) == 0, log.read_text()
    (line,) = (li for li in log.read_text().splitlines() if li.startswith("switokd:"))
    assert line.startswith(f"switokd: rank 1: data loader process {victim.pid} is gone")
    assert_equal_runs(long_run, tmp_path / "out")
    assert len((tmp_path / "out" / "attempts.jsonl").read_text().splitlines()) == 2  # one start


def test_a_longer_schedule_continues_a_finished_run(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 1, "digits-1t1s", *SMALL, *ALONE)
    folder = train(tmp_path / "cut", 1, "digits-1t1s", *SMALL, *ALONE, "schedule.epochs=1")
    again = ("digits-1t1s", *SMALL, *ALONE, "run_dir=out", "resume=auto")
    code, out, err = call(tmp_path / "cut", train_ranks, 1, again)
    assert code == 0, err
    assert "schedule.epochs is 2 from here on (it was 1)" in out
    assert_equal_runs(whole, folder)


def test_the_digest_of_the_configuration_ignores_checkpoints() -> None:
    plain = load("digits-1t1s")
    saved = load("digits-1t1s", ["checkpoint.every_steps=3", "run_dir=x", "resume=auto"])
    assert plain.digest == saved.digest


def ranks_below(pid: int) -> list[psutil.Process]:
    """Return the processes of the ranks that a launcher has started, also indirectly."""
    family = psutil.Process(pid).children(recursive=True)
    forked_ranks = [p for p in family if p.name().startswith("switokd rank")]
    return forked_ranks or [p for p in family if "switokd.train" in p.cmdline()]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("launcher", ["switokd train", "torchrun"])
def test_the_launcher_starts_a_lost_job_again(
    launcher: str, long_run: Path, tmp_path: Path
) -> None:
    if launcher == "torchrun":
        program, *words = torchrun(2, "digits-1t1s", *LONG, "run_dir=out", "resume=auto")
        command = [program, "--max-restarts=2", *words]
    else:
        command = switokd_train(2, "digits-1t1s", *LONG, "run_dir=out")
    log, record = tmp_path / "log", tmp_path / "out" / "decisions.jsonl"
    with process(command, tmp_path, log) as child:
        wait_until(lambda: record.exists() and len(lines(record)) >= 13, 60, "step 13")
        ranks_below(child.pid)[-1].kill()
        assert child.wait(100) == 0, log.read_text()
    assert "continuing out after step" in log.read_text()
    if launcher == "switokd train":
        assert "starts again from its last checkpoint (restart 1 of 3)" in log.read_text()
    assert_equal_runs(long_run, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["restarts"] == 1
    _, again = lines(tmp_path / "out" / "attempts.jsonl")[:2]
    assert again["after_step"] + again["steps_lost"] >= 13
    assert summary["steps_lost"] == again["steps_lost"] < len(lines(record))
    assert 0 < summary["seconds_lost"] < summary["seconds_since_first_start"]
    assert 0 < summary["effective_training_ratio"] < 1
    assert f"1 restart: {summary['steps_lost']} step" in log.read_text()


@pytest.mark.timeout(200)
def test_a_restart_imports_nothing_and_any_process_below_the_launcher_may_be_lost(
    long_run: Path, tmp_path: Path
) -> None:
    """A rank, then the process with the ranks' store, then the one that has imported PyTorch."""
    log, record = tmp_path / "log", tmp_path / "out" / "decisions.jsonl"
    with process(switokd_train(2, "digits-1t1s", *LONG, "run_dir=out"), tmp_path, log) as child:

        def new_ranks(step: int, before: list[psutil.Process]) -> list[psutil.Process]:
            """Return two other ranks than those before, or nothing until `step` is recorded."""
            assert child.poll() is None, log.read_text()
            if not record.exists() or len(lines(record)) < step:
                return []
            found = [p for p in ranks_below(child.pid) if p not in before]
            return found if len(found) == 2 else []

        first = wait_until(lambda: new_ranks(12, []), 60, "step 12")
        importer = first[0].parent()
        first[1].kill()
        second = wait_until(lambda: new_ranks(23, first), 60, "step 23")
        assert second[0].parent() == importer
        (store,) = (p for p in importer.children() if p.name() == "switokd store")
        store.kill()
        wait_until(lambda: new_ranks(34, [*first, *second]), 60, "step 34")
        importer.kill()
        assert child.wait(100) == 0, log.read_text()
    text = log.read_text()
    assert "switokd: the process that holds the store of the ranks is gone" in text
    assert f"process {importer.pid}, which started the ranks, was killed by SIGKILL" in text
    assert "starts again in 2 s from its last checkpoint (restart 3 of 3)" in text
    assert "Traceback" not in text
    assert_equal_runs(long_run, tmp_path / "out")


def test_steps_lost_before_the_first_checkpoint_count_too(tmp_path: Path) -> None:
    words = ("digits-1t1s", *LONG, "checkpoint.every_steps=1000", "run_dir=out", "resume=auto")
    recorded = 0
    for _ in range(2):
        with forked(train_ranks, 2, words, cwd=tmp_path, out=tmp_path / "log") as child:
            run_until(tmp_path, recorded + 5, child)[1].kill()  # not yet in an earlier record
            assert child.wait(60) == 4, (tmp_path / "log").read_text()
        recorded = len(lines(tmp_path / "out" / "decisions.jsonl"))
    code, out, err = call(tmp_path, train_ranks, 2, words)
    assert code == 0, err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    starts = lines(tmp_path / "out" / "attempts.jsonl")
    assert [line["after_step"] for line in starts[:3]] == [0, 0, 0]
    assert starts[2]["steps_lost"] == recorded >= 9
    assert summary["restarts"] == 2
    assert summary["steps_lost"] == recorded + starts[1]["steps_lost"]
    assert starts[2]["started"] - starts[0]["started"] < summary["seconds_lost"]
    assert f"2 restarts: {summary['steps_lost']} steps lost and done again" in out


def test_the_option_resume_trains_a_run_for_longer(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 1, "digits-1t1s", *SMALL, *ALONE)
    folder = train(tmp_path, 1, "digits-1t1s", *SMALL, *ALONE, "schedule.epochs=1")
    words = ("train", "schedule.epochs=2", f"--resume={folder}")
    (tmp_path / "elsewhere").mkdir()
    code, out, err = call(tmp_path / "elsewhere", switokd_command, *words)
    assert code == 0, err
    assert f"continuing {folder} after step 9 of 18" in " ".join(out.split())
    assert_equal_runs(whole, folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a recipe (see 'switokd recipes') or a run file, or --resume RUN"),
        (["--resume=nowhere"], "--resume nowhere: there is no such folder"),
        (["digits-1t1s", "--resume=x"], "--resume takes the run file from x: leave 'digits-1t1s'"),
    ],
)
def test_mistakes_in_the_arguments(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2
    assert words in result.output
    assert result.output.count("\n") == 1


def test_one_flipped_bit_of_the_weights_is_not_exported(tmp_path: Path) -> None:
    folder = train(tmp_path, 1, "digits-1t1s", *SMALL, *ALONE, "schedule.max_steps=2")
    file = folder / "weights" / "student.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, out, err = call(tmp_path, switokd_command, "export", "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "out/weights/student.pt is damaged" in err
    assert not (folder / "export").exists()
