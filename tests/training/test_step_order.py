"""The order of report, backward passes, decisions and optimizer steps within a step.

Not covered: the results of a step (`test_oracle.py`); the duration of waits (`bench/waits.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench.in_process import ONE_PROCESS, InProcess
from switokd.config.config import Config
from switokd.coordination.local import LocalDecider
from switokd.distillation.decision import Decision, Mode, PairDecision
from switokd.distillation.distances import Parts
from switokd.distillation.gap import Distances
from switokd.training.learner import Learner

NAMES = ("t1", "t2", "s")
CONFIG = Config.model_validate(
    {
        **ONE_PROCESS,
        "name": "order",
        "device": "cpu",
        "data": {"dataset": "digits", "batch_size": 16},
        "networks": {
            name: {"role": "student" if name == "s" else "teacher", "model": "wrn-10-1"}
            for name in NAMES
        },
    }
)
EARLY = [
    *("report", "backward s", "backward t1", "backward t2", "update s"),
    *("decided", "update t1", "decided", "update t2"),
]
LATE = [
    *("report", "backward s", "decided", "backward t1", "decided", "backward t2", "update s"),
    *("decided", "update t1", "decided", "update t2"),
]


class ScriptedDecider(LocalDecider):
    """Returns a given decision, and notes each call."""

    def __init__(self, events: list[str], paused: tuple[str, ...], decides_early: bool) -> None:
        super().__init__(CONFIG, lambda decision: None)
        self.events, self.decides_early = events, decides_early
        none, learning, expert = Distances(0.0, 0.0, 0.0, 16), Mode.LEARNING, Mode.EXPERT
        modes = {pair: expert if pair.teacher in paused else learning for pair in self.pairs}
        pairs = tuple(PairDecision(pair, none, 1.0, 0.0, mode) for pair, mode in modes.items())
        self.answer = Decision(1, pairs, paused)

    def report(self, step: int, parts: Parts, exchange_seconds: float | None = None) -> None:
        self.events.append("report")

    def decide_early(self, step: int, parts: Parts) -> Decision | None:
        return self.answer if self.decides_early else None

    def decision(self, step: int) -> Decision:
        self.events.append("decided")
        return self.answer


def watch(learners: Sequence[Learner], events: list[str]) -> None:
    """Note when each network's backward reaches its first layer, and each optimizer step."""
    for learner in learners:
        first, name = next(learner.model.parameters()), learner.name

        def computed(gradient: Any, name: str = name) -> None:
            events.append(f"backward {name}")

        def applied(*given: Any, name: str = name) -> None:
            events.append(f"update {name}")

        first.register_hook(computed)  # type: ignore[no-untyped-call]
        learner.optimizer.register_step_pre_hook(applied)


def step(paused: tuple[str, ...] = (), decides_early: bool = True) -> tuple[list[str], InProcess]:
    """Make one step; return its events and the training."""
    events: list[str] = []
    ours = InProcess(CONFIG, decider=ScriptedDecider(events, paused, decides_early))
    watch(ours.learners, events)
    (batch,) = ours.batches(1)
    before = {li.name: next(li.model.parameters()).clone() for li in ours.learners}
    result = ours.step(*batch)
    assert result.paused == paused
    for learner in ours.learners:
        weights = next(learner.model.parameters())
        assert torch.equal(weights, before[learner.name]) is (learner.name in paused)
    return events, ours


def test_after_an_early_decision_only_the_teachers_optimizer_steps_wait() -> None:
    assert step()[0] == EARLY


def test_without_an_early_decision_the_teachers_backward_waits() -> None:
    assert step(decides_early=False)[0] == LATE


@pytest.mark.parametrize("decides_early", [True, False])
def test_a_paused_teacher_has_no_backward_and_no_optimizer_step(decides_early: bool) -> None:
    expected = [e for e in (EARLY if decides_early else LATE) if "t1" not in e]
    events, ours = step(("t1",), decides_early)
    assert [e for e in events if e != "decided"] == [e for e in expected if e != "decided"]
    (t1,) = (learner for learner in ours.learners if learner.name == "t1")
    assert all(p.grad is None for p in t1.model.parameters())
    assert not t1.optimizer.state
