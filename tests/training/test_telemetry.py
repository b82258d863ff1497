"""What the live metrics show of a step: terms of the loss, gradient norm, times, pauses.

Not covered: the way to the coordinator (`tests/services/test_metric_table.py`).
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from bench.in_process import InProcess
from switokd.coordination.decider import Decider
from switokd.coordination.progress import NetworkProgress, RunProgress, TermKind
from switokd.training import meters
from switokd.training.meters import EpochLog
from switokd.training.telemetry import RunCounts, terms_of
from tests.training.test_optimizer import batches, learner
from tests.training.test_step import configured


class Sent:
    """A decider that only keeps what is sent."""

    has_metrics = True

    def __init__(self) -> None:
        self.progresses: list[NetworkProgress] = []

    def progress(self, progress: NetworkProgress) -> None:
        self.progresses.append(progress)


@pytest.mark.parametrize("strategy", ["switokd", "kdcl-minlogit"])
def test_the_terms_of_a_loss_add_up_to_it(strategy: str) -> None:
    ours = InProcess(configured(strategy))
    ((x, y),) = ours.batches(1)
    result = ours.step(x, y)
    for name, loss in result.losses.items():
        terms = terms_of(name, result, ours.placement, len(y))
        assert sum(term.value for term in terms) == pytest.approx(float(loss), rel=1e-5)
        assert terms[0].kind is TermKind.TASK
        kinds = {term.kind for term in terms[1:]}
        assert kinds == {TermKind.COMBINED if strategy.startswith("kdcl") else TermKind.PEER}
        assert name not in {term.peer for term in terms}


def test_a_progress_has_the_numbers_of_all_steps_since_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, sent = InProcess(configured("switokd")), Sent()
    counts = RunCounts(skipped_steps=1, checkpoints=2).begin(4, 91, 10)
    decider = cast("Decider", sent)
    log = EpochLog(ours.learners, ours.placement, decider, ours.device, counts)
    monkeypatch.setattr(meters, "SEND_SECONDS", 1e9)
    steps = list(ours.batches(3))
    for x, y in steps[:2]:
        log.add(ours.step(x, y), len(y))
    assert sent.progresses == []
    monkeypatch.setattr(meters, "SEND_SECONDS", 0.0)
    x, y = steps[2]
    log.add(ours.step(x, y), len(y))
    names = [learner.name for learner in ours.learners]
    assert [progress.network for progress in sent.progresses] == names
    for progress in sent.progresses:
        assert progress.samples == 3 * len(y)
        assert progress.learned_steps + progress.paused_steps == 3
        assert 0 < progress.learning_seconds < progress.training_seconds
        assert progress.gradient_norm is not None
        assert progress.gradient_norm > 0
        assert progress.run == RunProgress(5, 1, 2, 91, 10)
        message = progress.to_wire(7)
        assert (message.step, message.network) == (7, progress.network)
        assert len(message.loss_terms) == len(progress.loss_terms)
    log.end_of_training()
    assert [progress.samples for progress in sent.progresses[len(names) :]] == [0] * len(names)


def test_an_epoch_that_is_shorter_than_the_interval_sends_loss_terms_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, sent = InProcess(configured("switokd")), Sent()
    log = EpochLog(ours.learners, ours.placement, cast("Decider", sent), ours.device)
    monkeypatch.setattr(meters, "SEND_SECONDS", 1e9)
    for x, y in ours.batches(2):
        result = ours.step(x, y)
        log.add(result, len(y))
    log.end_of_training()
    terms = {progress.network: list(progress.loss_terms) for progress in sent.progresses}
    assert terms == {name: terms_of(name, result, ours.placement, len(y)) for name in terms}
    assert all(terms[name] for name in result.losses)


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 0.1}], ids=["free", "clipped"])
def test_a_gradients_norm_is_measured_before_it_is_clipped(settings: dict[str, Any]) -> None:
    (x, y), (x2, y2) = batches(2)
    one = learner(**settings)
    norm = one.optimizer_step.norm
    assert norm.take() is None
    one.backward(F.cross_entropy(one.forward(x), y), 1)
    gradients = [p.grad.flatten() for p in one.model.parameters() if p.grad is not None]
    expected = float(torch.cat(gradients).norm())
    one.update(1)
    one.backward(F.cross_entropy(one.forward(x2), y2), 2)
    one.update(2)  # not asked for: the first one is kept
    assert norm.take() == pytest.approx(expected, rel=1e-5)
    assert norm.take() is None
