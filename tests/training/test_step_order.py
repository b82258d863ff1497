"""In which order a step reports, computes and applies: decisions travel while backward runs.

Not covered: what is computed (`test_oracle.py`); how long waiting takes (`bench/waits.py`).
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
FORESEEN = [
    *("report", "backward s", "backward t1", "backward t2", "update s"),
    *("decided", "update t1", "decided", "update t2"),
]
UNFORESEEN = [
    *("report", "backward s", "decided", "backward t1", "decided", "backward t2", "update s"),
    *("decided", "update t1", "decided", "update t2"),
]


class ScriptedDecider(LocalDecider):
    """Decides as it is told, and notes when it is asked."""

    def __init__(self, events: list[str], paused: tuple[str, ...], foresees: bool) -> None:
        super().__init__(CONFIG, lambda decision: None)
        self.events, self.foresees = events, foresees
        none, learning, expert = Distances(0.0, 0.0, 0.0, 16), Mode.LEARNING, Mode.EXPERT
        modes = {pair: expert if pair.teacher in paused else learning for pair in self.pairs}
        pairs = tuple(PairDecision(pair, none, 1.0, 0.0, mode) for pair, mode in modes.items())
        self.told = Decision(1, pairs, paused)

    def report(self, step: int, parts: Parts, exchange_seconds: float | None = None) -> None:
        self.events.append("report")

    def decide_early(self, step: int, parts: Parts) -> Decision | None:
        return self.told if self.foresees else None

    def decision(self, step: int) -> Decision:
        self.events.append("decided")
        return self.told


def watch(learners: Sequence[Learner], events: list[str]) -> None:
    """Note each network's backward, when it reaches its first layer, and its update."""
    for learner in learners:
        first, name = next(learner.model.parameters()), learner.name

        def computed(gradient: Any, name: str = name) -> None:
            events.append(f"backward {name}")

        def applied(*given: Any, name: str = name) -> None:
            events.append(f"update {name}")

        first.register_hook(computed)  # type: ignore[no-untyped-call]
        learner.optimizer.register_step_pre_hook(applied)


def step(paused: tuple[str, ...] = (), foresees: bool = True) -> tuple[list[str], InProcess]:
    """One step's events, and what it has trained."""
    events: list[str] = []
    ours = InProcess(CONFIG, decider=ScriptedDecider(events, paused, foresees))
    watch(ours.learners, events)
    (batch,) = ours.batches(1)
    before = {li.name: next(li.model.parameters()).clone() for li in ours.learners}
    result = ours.step(*batch)
    assert result.paused == paused
    for learner in ours.learners:
        weights = next(learner.model.parameters())
        assert torch.equal(weights, before[learner.name]) is (learner.name in paused)
    return events, ours


def test_nothing_waits_for_a_foreseen_decision_but_the_teachers_updates() -> None:
    assert step()[0] == FORESEEN


def test_where_nothing_is_foreseen_only_the_students_backward_goes_on() -> None:
    assert step(foresees=False)[0] == UNFORESEEN


@pytest.mark.parametrize("foresees", [True, False])
def test_a_paused_teacher_has_neither_backward_nor_update(foresees: bool) -> None:
    expected = [e for e in (FORESEEN if foresees else UNFORESEEN) if "t1" not in e]
    events, ours = step(("t1",), foresees)
    assert [e for e in events if e != "decided"] == [e for e in expected if e != "decided"]
    (t1,) = (learner for learner in ours.learners if learner.name == "t1")
    assert all(p.grad is None for p in t1.model.parameters())
    assert not t1.optimizer.state
