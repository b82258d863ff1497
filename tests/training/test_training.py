"""Whole runs with the usual training settings, most of them in this process.

Not covered: the arithmetic of each setting (`test_schedules.py`, `test_optimizer.py`).
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from switokd.config.run_file import load, load_importable
from switokd.data.images import open_images
from switokd.distillation.distances import pair_sums
from switokd.errors import NonFiniteError
from switokd.runs.weights_files import WeightsFiles
from switokd.runtime.environment import Environment
from switokd.training import step
from switokd.worker import train as train_rank
from tests import reference
from tests.preloaded import train as train_processes
from tests.support import lines

ONE_PROCESS = [
    *("placement=replicated", "coordinator=off"),
    *(
        f"networks.{name}.model=tests.training.test_training:small"
        for name in ("teacher", "student")
    ),
    "networks.teacher.model_kwargs={width: 64}",
]


def small(in_channels: int, num_classes: int, width: int = 16) -> nn.Module:
    """Return a small, fast network with BatchNorm."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_channels * 64, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, num_classes),
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread, so that sums have one order; restore the SIGTERM handler."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def train(folder: Path, *settings: str) -> Path:
    """Train digits-1t1s in this process into `folder`."""
    train_rank(load("digits-1t1s", [*ONE_PROCESS, f"run_dir={folder}", *settings]), Environment())
    return folder


def summary(folder: Path) -> dict[str, Any]:
    """Return the networks' section of a run's summary."""
    networks: dict[str, Any] = json.loads((folder / "summary.json").read_text())["networks"]
    return networks


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "weights" / f"{name}.pt", weights_only=True)
    return state


def top1(folder: Path, name: str) -> float:
    """Return the top-1 of saved weights in percent, computed independently of the run."""
    config = load(str(folder / "config.yaml"))
    images = open_images(config.data, config.seed)
    network = config.networks[Path(name).name.partition(".")[0]]
    model = small(images.shape[0], images.classes, **network.model_kwargs)
    model.load_state_dict(weights(folder, name))
    model.eval()
    with torch.inference_mode():
        correct = [model(x).argmax(dim=1) == y for x, y in images.test()]
    return 100 * torch.cat(correct).double().mean().item()


def test_settings_without_effect_change_no_bit(tmp_path: Path) -> None:
    steps = "schedule.max_steps=30"  # an epoch has 22 steps
    usual = train(tmp_path / "usual", steps)
    neutral = [
        *(f"schedule.{s}" for s in ("accumulate=1", "warmup_epochs=0.0", "evaluate_every=9")),
        *("schedule.ema_decay=0.9", "networks.teacher.clip_norm=1e30"),
        "networks.student.optimizer.decay_norms_and_biases=true",
    ]
    other = train(tmp_path / "neutral", steps, *neutral)
    assert (usual / "decisions.jsonl").read_bytes() == (other / "decisions.jsonl").read_bytes()
    for name in ("teacher", "student"):
        theirs = weights(usual, name)
        assert all(torch.equal(v, theirs[k]) for k, v in weights(other, name).items())
        assert any(not torch.equal(v, theirs[k]) for k, v in weights(other, f"{name}.ema").items())
        assert summary(usual)[name]["top1_last"] == summary(other)[name]["top1_last"]
    assert [m["test_top1"] is not None for m in lines(other / "metrics.jsonl")] == [False] * 2 + [
        True
    ] * 2


def test_networks_are_tested_every_k_epochs_and_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["schedule.epochs=9", "schedule.max_steps=11", "data.batch_size=512"]
    folder = train(tmp_path / "out", *settings, "schedule.evaluate_every=2")
    metrics = lines(folder / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [e for e in range(1, 7) for _ in range(2)]
    tested = {m["epoch"] for m in metrics if m["test_top1"] is not None}
    assert tested == {2, 4, 6}  # 11 steps end in the sixth epoch, with 2 steps per epoch
    assert {n["best_epoch"] for n in summary(folder).values()} <= tested
    epochs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["not tested" in line for line in epochs] == [True, False] * 3
    assert (folder / "curves.png").stat().st_size > 10_000


def test_best_and_last_weights_are_saved_and_in_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[str, set[str]]] = []
    save = WeightsFiles.save

    def watched(
        self: WeightsFiles, states: Mapping[str, Mapping[str, Tensor]], folder: str
    ) -> None:
        saved.append((folder, set(states)))
        save(self, states, folder)

    monkeypatch.setattr(WeightsFiles, "save", watched)
    # The learning rate rises after three epochs, so that the last epoch is not the best.
    spoil = ["schedule.epochs=5", "schedule.milestones=[3]", "schedule.gamma=20"]
    folder = train(tmp_path / "out", *spoil, "data.batch_size=128", "schedule.ema_decay=0.9")
    networks, metrics = summary(folder), lines(folder / "metrics.jsonl")
    expected: list[tuple[str, set[str]]] = []
    best = dict.fromkeys(networks, -1.0)
    for epoch in range(1, 6):
        now = {m["network"]: m["test_top1"] for m in metrics if m["epoch"] == epoch}
        better = {name for name, accuracy in now.items() if accuracy > best[name]}
        best |= {name: now[name] for name in better}
        expected += [("weights/best", better)] if better else []
    assert saved == [*expected, ("weights", {n + e for n in networks for e in ("", ".ema")})]
    assert networks["student"]["top1_last"] < networks["student"]["top1_best"]
    for name, network in networks.items():
        course = [m["test_top1"] for m in metrics if m["network"] == name]
        assert network["best_epoch"] == 1 + course.index(max(course))
        assert top1(folder, name) == pytest.approx(network["top1_last"])
        assert top1(folder, f"best/{name}") == pytest.approx(network["top1_best"])
        averages = [m["test_top1_ema"] for m in metrics if m["network"] == name]
        assert top1(folder, f"{name}.ema") == pytest.approx(network["top1_ema_last"])
        assert (network["top1_ema_last"], network["top1_ema_best"]) == (averages[-1], max(averages))


def test_weights_that_are_not_finite_are_not_saved_as_best(tmp_path: Path) -> None:
    spoil = ["networks.teacher.optimizer={lr: 1e30, weight_decay: 1e30}", "schedule.max_steps=1"]
    with pytest.raises(NonFiniteError, match="not finite after its last step; they were not saved"):
        train(tmp_path / "out", *spoil)
    assert not list(tmp_path.rglob("*.pt"))


def test_the_metrics_have_the_schedules_learning_rates(tmp_path: Path) -> None:
    cosine = "schedule={name: cosine, epochs: 3, warmup_epochs: 1.0, min_lr: 1e-3}"
    optimizer = "networks.teacher.optimizer={name: adamw, lr: 0.01, decay_norms_and_biases: false}"
    folder = train(tmp_path / "out", cosine, optimizer, "data.batch_size=512")
    rates = {(m["network"], m["epoch"]): m["lr"] for m in lines(folder / "metrics.jsonl")}
    # With two steps per epoch, the cosine is at 1/4 and 3/4 of its period at the ends of epochs.
    quarter = 0.5**0.5
    for name, base in (("teacher", 0.01), ("student", 0.05)):
        middle, half = (base + 1e-3) / 2, (base - 1e-3) / 2
        expected = [base, middle + half * quarter, middle - half * quarter]
        assert [rates[name, e] for e in (1, 2, 3)] == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gap_and_threshold_have_at_least_single_precision(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Mapping[str, Tensor], Tensor, Tensor]] = []

    def watched(pairs: Any, logits: Any, y: Any, *more: Any) -> Tensor:
        sums = pair_sums(pairs, logits, y, *more)
        seen.append((logits, y, sums))
        return sums

    monkeypatch.setattr(step, "pair_sums", watched)
    folder = train(tmp_path / "out", f"compute.precision={precision}", "schedule.max_steps=6")
    decisions = lines(folder / "decisions.jsonl")
    assert len(decisions) == len(seen) == 6
    for decision, (logits, y, sums) in zip(decisions, seen, strict=True):
        assert {z.dtype for z in logits.values()} == {torch.float32}
        assert sums.dtype is torch.float64
        gap, e_s, e_t = reference.distances(logits["teacher"], logits["student"], y, tau=1.0)
        epsilon, delta = reference.threshold(e_s, e_t)
        expected = {"gap": gap, "e_s": e_s, "e_t": e_t, "epsilon": epsilon, "delta": delta}
        assert {k: decision[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert all(v.dtype is torch.float32 for v in weights(folder, "student").values() if v.dim())


def test_a_frozen_teacher_has_no_moving_average(tmp_path: Path) -> None:
    short = ["schedule.max_steps=2", "data.batch_size=256", "schedule.ema_decay=0.9"]
    first = train(tmp_path / "first", *short)
    given = f"networks.teacher.weights={first}/weights/teacher.pt"
    folder = train(tmp_path / "second", *short, "distillation.strategy=kd", given)
    files = {str(p.relative_to(folder / "weights")) for p in folder.glob("weights/**/*.pt")}
    last = {"teacher.pt", "student.pt", "student.ema.pt"}
    assert files == last | {"best/teacher.pt", "best/student.pt"}
    assert summary(folder)["teacher"]["top1_ema_last"] is None
    assert summary(folder)["student"]["top1_ema_last"] is not None


NETS = """
from torch import nn

def net(width, in_channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
"""
RUN_FILE = """
name: spread
networks:
  t: {role: teacher, model: "nets:net", model_kwargs: {width: 64}, clip_norm: 1.0,
      optimizer: {lr: 0.5}}
  s: {role: student, model: "nets:net", model_kwargs: {width: 16}, clip_norm: 0.2,
      optimizer: {name: adamw, lr: 3e-3, decay_norms_and_biases: false}}
data: {batch_size: 239, drop_last: false}   # a last batch of 3 images: one rank has an empty shard
schedule: {epochs: 5, accumulate: 3, ema_decay: 0.5, warmup_epochs: 0.5, name: cosine}
distillation: {temperature: 0.25}
save_initial_weights: true
"""


def test_two_ranks_clip_and_accumulate_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    spread = train_processes(tmp_path, 2, "run.yaml", "placement={t: {0: 9, 1: 1}, s: [0, 1]}")
    monkeypatch.chdir(tmp_path)
    settings = ["placement=replicated", "coordinator=off"]
    loose = ["networks.t.clip_norm=9", "networks.s.clip_norm=9"]
    for name, more in (("one", []), ("loose", loose)):
        config = load_importable("run.yaml", [*settings, *more, f"run_dir={name}"])
        train_rank(config, Environment())
    one = tmp_path / "one"
    ours, theirs = (lines(folder / "decisions.jsonl") for folder in (spread, one))
    modes = [d["mode"] for d in ours]
    assert modes == [d["mode"] for d in theirs]
    assert set(modes) == {"expert", "learning"}
    for name in ("t", "s"):
        first = weights(one, f"initial/{name}")
        unclipped = weights(tmp_path / "loose", name)
        assert not any(torch.equal(v, unclipped[k]) for k, v in weights(one, name).items())
        for kind in (name, f"{name}.ema", f"best/{name}"):
            expected = weights(one, kind)
            for key, value in weights(spread, kind).items():
                moved = (expected[key] - first[key]).norm()
                assert (value - expected[key]).norm() < 1e-3 * moved, (kind, key)
