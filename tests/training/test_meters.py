"""Measurements during training: meters, timers, paused share, progress bar, top-1 accuracy."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from switokd.distillation.decision import Decision
from switokd.distillation.distances import count_correct
from switokd.distillation.topology import Role, Topology
from switokd.runs import progress
from switokd.runs.progress import PausedShare, ProgressBar
from switokd.runtime.placement import LocalPlacement, Placement
from switokd.training.evaluate import top1
from switokd.training.learner import ForwardPass, Learner
from switokd.training.meters import Meter, Sums
from switokd.training.metrics import EpochMetrics
from switokd.training.optimizer import OptimizerStep
from switokd.training.reducer import GradientReducer
from switokd.training.step import StepResult
from switokd.training.timer import Timer

TOPOLOGY = Topology((("a", Role.TEACHER), ("b", Role.TEACHER), ("s", Role.STUDENT)))
CPU = torch.device("cpu")


def result(correct: int, loss: float | None, of: int = 4) -> StepResult:
    """Return a step with `of` samples, in which network "s" is correct for the first `correct`."""
    y = torch.zeros(of, dtype=torch.long)
    z = torch.zeros(of, 3)
    z[:correct, 0] = 1.0
    z[correct:, 1] = 1.0
    losses = {} if loss is None else {"s": torch.tensor(loss)}
    applied = {} if losses else {"s": Decision(1, (), ("s",))}
    return StepResult({"s": z}, y, losses, {"s": correct}, applied, 0.0)


def test_loss_is_averaged_over_learned_samples_and_accuracy_over_all() -> None:
    meter = Meter("s", LocalPlacement(Placement.of({"s": [0]}), 0), CPU)
    assert (meter.sums().mean_loss, meter.sums().accuracy) == (None, None)
    meter.add(result(correct=3, loss=1.0), 4)
    meter.add(result(correct=1, loss=None), 4)  # paused: no loss
    meter.add(result(correct=2, loss=4.0, of=2), 2)
    sums = meter.sums()
    assert sums.mean_loss == pytest.approx(2.0)
    assert sums.accuracy == pytest.approx(0.6)
    assert (sums.samples, sums.learned) == (10, 6)
    before = Sums(loss=4.0, correct=3.0, learned=4, samples=8)
    assert sums.since(before) == (8.0, 3.0, 2, 2)


def test_the_class_of_a_soft_target_has_the_largest_probability(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hard = result(correct=3, loss=1.0)
    y = torch.tensor([[0.5, 0.2, 0.3]] * 3 + [[0.1, 0.6, 0.3]])  # the last sample is correct now
    soft = StepResult(hard.logits, y, hard.losses, {"s": 4}, hard.applied, 0.0)
    whole = {"s": slice(0, 4)}
    assert count_correct(hard.logits, hard.y, whole).tolist() == [3]
    assert count_correct(soft.logits, soft.y, whole).tolist() == [4]
    with ProgressBar("name", steps=4, epochs=1, topology=TOPOLOGY) as bar:
        bar._interval = 0.0
        for step in (1, 2):
            bar.on_step(step, 0, soft)
    assert "top-1 100%" in capsys.readouterr().out


def test_the_meters_of_two_ranks_add_up_to_the_whole_batch() -> None:
    placement = Placement.of({"s": {0: 3, 1: 1}, "t": [0]})
    sums = []
    # 6 of 8 samples are on rank 0; the ranks' parts of the mean loss are 0.5 and 0.25.
    for rank, loss in ((0, 0.5), (1, 0.25)):
        local_placement = LocalPlacement(placement, rank)
        whole = result(correct=7, loss=loss, of=8)
        shard = local_placement.shard("s", 8)
        (right,) = count_correct(whole.logits, whole.y, {"s": shard}).tolist()
        meter = Meter("s", local_placement, CPU)
        meter.add(replace(whole, correct={"s": int(right)}), 8)
        sums.append(tuple(meter.sums()))
    assert sums == [(4.0, 6.0, 6, 6), (2.0, 1.0, 2, 2)]


def test_a_timer_adds_up_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 1.5, 10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    timer = Timer()
    for _ in range(2):
        with timer:
            pass
    assert timer.seconds == 2.5


class Event:
    """A CUDA event; the GPU reaches it when the test says so. Events are one second apart."""

    made = recorded = 0

    def __init__(self) -> None:
        Event.made += 1
        self.at, self.passed = -1, False

    def record(self, stream: object) -> None:
        Event.recorded += 1
        self.at, self.passed = Event.recorded, False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True

    def elapsed_time(self, other: Event) -> float:
        assert other.passed
        return 1000.0 * (other.at - self.at)


def test_a_gpu_timer_does_not_wait_and_reuses_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("switokd.training.timer._event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    timer, ends = Timer(torch.device("cuda", 0)), []
    for step in range(100):
        with timer:
            pass
        ends.append(timer._pending[-1][1])
        if step >= 3:  # the GPU is three steps behind
            ends[step - 3].synchronize()
    assert Event.made == 2 * 4
    assert timer.seconds == 100


def test_paused_share_is_over_all_teachers_steps() -> None:
    share = PausedShare(TOPOLOGY)
    assert share.share == 0.0
    for step, paused in enumerate([(), ("a",), ("a", "b"), ()], 1):
        share.add(step, paused)
    assert share.share == pytest.approx(3 / 8)
    assert share.paused == {"a": 2, "b": 1}


def epoch_metrics(**test_top1: float | None) -> EpochMetrics:
    """Return the metrics of an epoch with the given test accuracies in percent."""
    row = {"role": "teacher", "lr": 0.1, "loss_sum": 0.0, "learned": 0, "correct": 0, "samples": 8}
    row |= {"steps_paused": 0, "training_seconds": 1.0, "tested_average": None}
    tested = {name: None if top1 is None else (top1, 100) for name, top1 in test_top1.items()}
    rows = [{**row, "network": name, "tested": result} for name, result in tested.items()]
    return EpochMetrics.of(0, 1, test_top1, rows)


def test_without_a_terminal_the_bar_prints_one_line_per_epoch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressBar("name", steps=2, epochs=1, topology=TOPOLOGY) as bar:
        bar.on_decision(Decision(1, (), ("a",)))
        bar.on_step(1, 0, result(correct=1, loss=1.0))
        bar.on_epoch(epoch_metrics(a=50.0, s=25.0))
        bar.on_epoch(epoch_metrics(a=None, s=None))
    shown = capsys.readouterr().out.rstrip() + "\n"  # old releases of rich end with an empty line
    assert shown == (
        "epoch   1/1  test top-1  a 50.0%  s 25.0%  paused 50%\n"
        "epoch   1/1  not tested  paused 50%\n"
    )


def test_on_a_terminal_the_bar_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    with ProgressBar("digits-2t1s", steps=3, epochs=1, topology=TOPOLOGY) as bar:
        bar.on_decision(Decision(1, (), ("a", "b")))
        for step in (1, 2, 3):
            bar.on_step(step, 0, result(correct=3, loss=1.0))
    frames = re.split(r"[\r\n]", screen.getvalue())
    shown = [Text.from_ansi(frame).plain.rstrip() for frame in frames]
    pattern = r"digits-2t1s .*100%.*images/s student loss \d\.\d+ top-1 75% paused 100%"
    last = [line for line in shown if "images/s" in line][-1]
    assert re.search(pattern, last), shown
    assert len(last) <= 80


def test_top1_counts_all_batches_and_restores_the_mode() -> None:
    class Stub(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return nn.functional.one_hot(x[:, 0].long(), 3).float()

    model = Stub().train()
    batches = [
        (torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0, 1, 0])),
        (torch.tensor([[2.0]]), torch.tensor([2])),
    ]
    optimizer = torch.optim.SGD([torch.zeros(1)])
    optimizer_step = OptimizerStep(optimizer, GradientReducer("s", []))
    learner = Learner("s", Role.STUDENT, model, ForwardPass(model), optimizer_step)
    assert top1(learner, batches, CPU) == (3, 4)
    assert model.training
    other = Stub().eval()
    assert top1(learner, batches, CPU, other) == (3, 4)
    assert not other.training
