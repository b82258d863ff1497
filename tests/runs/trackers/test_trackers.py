"""Trackers write a real run, and go on after it was killed; read back with their own packages.

Not covered: uploading to Weights & Biases, and a server of MLflow.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from switokd.runs.trackers.wandb_files import rows
from tests.preloaded import call, train_ranks
from tests.support import lines

TRACKERS = ("tensorboard", "mlflow", "wandb")
LAST, EVERY, KILLED, CHECKPOINT = 20, 2, 15, 12
KILLER = """
import os, signal, time
import switokd

class Killer(switokd.Observer):
    def on_step(self, step, epoch, result):
        if step == {step}:
            deadline = time.monotonic() + 60  # a thread writes the checkpoint
            while not os.path.isdir("out/checkpoints/step-{checkpoint:09d}"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
"""
Points = dict[str, list[tuple[int, float]]]
"""By name of a number: steps and values, in the order in which they were written."""


def arguments(*more: str) -> tuple[str, ...]:
    return (
        *("digits-1t1s", "placement=replicated", "coordinator=off", "run_dir=out"),
        *(f"schedule.max_steps={LAST}", "data.train_samples=640", "schedule.epochs=2"),
        *("distillation.strategy=threshold", "distillation.strategy_kwargs={delta: 0.2}"),
        *("checkpoint.every_steps=6", f"tracking.every_steps={EVERY}", "resume=auto"),
        *more,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a run was killed behind a checkpoint, and then continued to its end."""
    for module in ("tensorboard", "mlflow", "wandb"):
        pytest.importorskip(module, reason=f"{module} is not installed (extra {module})")
    work = tmp_path_factory.mktemp("trackers")
    (work / "killer.py").write_text(KILLER.format(step=KILLED, checkpoint=CHECKPOINT))
    for more, expected in ((", killer:Killer", 137), ("", 0)):
        words = arguments(f"observers=[{', '.join(TRACKERS)}{more}]")
        code, out, err = call(work, train_ranks, 1, words, WANDB_SILENT="true")
        assert code % 256 in (expected, 4), f"{out}\n{err}"
        assert "observer" not in err, err
    assert f"continuing out after step {CHECKPOINT} of {LAST}" in out
    assert json.loads((work / "out/summary.json").read_text())["restarts"] == 1
    return work


def check(folder: Path, points: Points) -> None:
    """Every row once, with the numbers of the record."""
    decisions = lines(folder / "out/decisions.jsonl")
    means = defaultdict(list)
    for first in range(0, LAST, EVERY):
        of_row = [d for d in decisions if first < d["step"] <= first + EVERY]
        assert len(of_row) == EVERY
        for name, values in (
            ("gap", [d["gap"] for d in of_row]),
            ("threshold", [d["delta"] for d in of_row]),
            ("margin", [d["gap"] - d["delta"] for d in of_row]),
            ("expert_share", [d["mode"] == "expert" for d in of_row]),
        ):
            means[f"{name}/teacher/student"].append((first + EVERY, sum(values) / EVERY))
    means["paused_share/teacher"] = means["expert_share/teacher/student"]
    assert sum(value for _, value in means["paused_share/teacher"]) > 0
    for name, expected in means.items():
        assert [step for step, _ in points[name]] == [step for step, _ in expected], name
        assert [v for _, v in points[name]] == pytest.approx([v for _, v in expected], abs=1e-5)
    by_row = {"cross_entropy", "batch_accuracy", "kl"}
    for name in ("cross_entropy/teacher", "batch_accuracy/student", "kl/student/teacher"):
        assert [step for step, _ in points[name]] == list(range(EVERY, LAST + 1, EVERY)), name
    epochs = {line["network"]: [] for line in lines(folder / "out/metrics.jsonl")}  # type: ignore[var-annotated]
    for line in lines(folder / "out/metrics.jsonl"):
        epochs[line["network"]].append((line["step"], line["test_top1"], line["lr"]))
    for network, expected_epochs in epochs.items():
        for name, place in (("test_accuracy", 1), ("lr", 2)):
            found = points[f"{name}/{network}"]
            assert [s for s, _ in found] == [e[0] for e in expected_epochs]
            assert [v for _, v in found] == pytest.approx([e[place] for e in expected_epochs])
    assert {name.partition("/")[0] for name in points} == {
        *("gap", "threshold", "margin", "expert_share", "paused_share", *by_row),
        *("loss", "train_accuracy", "test_accuracy", "lr", "images_per_second"),
    }


def test_tensorboard_has_each_row_once(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "out/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    points = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}
    check(folder, points)
    (tag,) = events.Tags()["tensors"]
    (configuration,) = events.Tensors(tag)
    assert b"delta: 0.2" in configuration.tensor_proto.string_val[0]


def test_mlflow_has_one_run_with_each_row_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=str(folder / "mlruns"))
    experiment = client.get_experiment_by_name("digits-1t1s")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "out"
    assert run.data.params["networks.student.model"] == "wrn-10-1"
    histories = {
        name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics
    }
    check(folder, {n: [(m.step, m.value) for m in history] for n, history in histories.items()})


def test_wandb_has_one_id_with_each_row_once(folder: Path) -> None:
    files = sorted((folder / "out/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2  # one per process
    id = json.loads((folder / "out/observers.json").read_text())["run_id"]
    assert [file.name for file in files] == [f"run-{id}.wandb"] * 2
    points: Points = defaultdict(list)
    for row in rows(folder / "out"):
        for name, value in row.items():
            if name != "step" and not name.startswith("_"):
                points[name].append((int(row["step"]), value))
    check(folder, points)
