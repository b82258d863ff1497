"""Learning rates and accumulation windows, compared with hand calculations and with PyTorch."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from switokd.config.sections import Schedule
from switokd.training.schedules import AccumulationWindow, learning_rate


def rates(base: float, steps_per_epoch: int, **settings: Any) -> list[float]:
    """Return the learning rates of all steps of a run."""
    schedule = Schedule(**settings)
    steps = range(1, schedule.epochs * steps_per_epoch + 1)
    return [learning_rate(schedule, base, step, steps_per_epoch) for step in steps]


def test_multi_step_multiplies_by_gamma_after_each_milestone() -> None:
    actual = rates(0.3, 2, epochs=6, milestones=(2, 5), gamma=0.1)
    assert actual == [0.3] * 4 + [0.3 * 0.1**1] * 6 + [0.3 * 0.1**2] * 2
    assert rates(0.3, 3, epochs=2) == [0.3] * 6  # no milestones: constant


def test_cosine_by_hand() -> None:
    actual = rates(1.0, 2, epochs=2, name="cosine", min_lr=0.2)
    half = math.sqrt(0.5)
    expected = [1.0, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half]
    assert actual == pytest.approx(expected, rel=1e-12)
    assert actual[0] == 1.0


def test_cosine_equals_pytorchs_schedule() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.07)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=35, eta_min=0.002)
    expected = []
    for _ in range(35):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    actual = rates(0.07, 7, epochs=5, name="cosine", min_lr=0.002)
    assert actual == pytest.approx(expected, rel=1e-9)


def test_warm_up_rises_linearly_and_then_follows_the_schedule() -> None:
    multistep = rates(0.8, 4, epochs=3, milestones=(2,), warmup_epochs=1.0)
    assert multistep == pytest.approx([0.2, 0.4, 0.6] + [0.8] * 5 + [0.08] * 4)
    # A milestone within the warm-up has its usual effect.
    assert rates(0.8, 4, epochs=3, milestones=(1,), warmup_epochs=1.5) == pytest.approx(
        [0.8 / 6, 1.6 / 6, 2.4 / 6, 3.2 / 6, 0.4 / 6] + [0.08] * 7
    )
    cosine = rates(0.8, 4, epochs=3, name="cosine", warmup_epochs=1.0)
    assert cosine[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert cosine[4:] == rates(0.8, 4, epochs=2, name="cosine")


@pytest.mark.parametrize("name", ["multistep", "cosine"])
def test_a_warm_up_of_zero_epochs_changes_no_bit(name: str) -> None:
    assert rates(0.3, 5, epochs=3, name=name, warmup_epochs=0.0) == rates(
        0.3, 5, epochs=3, name=name
    )


def test_a_warm_up_may_be_rounded_to_the_whole_run() -> None:
    assert rates(0.3, 2, epochs=1, name="cosine", warmup_epochs=0.9) == pytest.approx([0.15, 0.3])


@pytest.mark.parametrize("name", ["multistep", "cosine"])
def test_max_steps_does_not_change_learning_rates(name: str) -> None:
    whole = rates(0.3, 5, epochs=3, name=name, warmup_epochs=0.4)
    assert rates(0.3, 5, epochs=3, name=name, warmup_epochs=0.4, max_steps=7) == whole


def test_windows_divide_each_epoch_and_the_run() -> None:
    window = AccumulationWindow(size=3, steps_per_epoch=7, total_steps=12)
    windows = [window.of(step) for step in range(1, 13)]
    first = [range(1, 4)] * 3 + [range(4, 7)] * 3 + [range(7, 8)]
    assert (
        windows == first + [range(8, 11)] * 3 + [range(11, 13)] * 2
    )  # the run ends within a window
    assert AccumulationWindow(size=3, steps_per_epoch=7).of(12) == range(11, 14)


@pytest.mark.parametrize("window", [AccumulationWindow(), AccumulationWindow(1, 3, 5)])
def test_without_accumulation_each_step_is_a_window(window: AccumulationWindow) -> None:
    assert [window.of(step) for step in (1, 2, 5)] == [range(1, 2), range(2, 3), range(5, 6)]


def test_schedules_need_no_torch() -> None:
    code = "import sys, switokd.training.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
