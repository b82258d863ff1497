"""What Prometheus is shown, without a server: series of runs, durations, forgetting."""

from __future__ import annotations

import math

import pytest
from prometheus_client import generate_latest

from switokd.distillation.decision import Decision, Rule, decide
from switokd.distillation.gap import Distances
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Role, Topology
from switokd.services.coordinator.metrics import SECONDS_BUCKETS, Distribution, Metrics
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.rounds import RunState

PLAN = Plan(
    Topology((("t", Role.TEACHER), ("s", Role.STUDENT))), ((0,), (0,)), "switokd", "d", 60.0
)


def decision(step: int, paused: bool) -> Decision:
    distances = Distances(2.0, 1.0, 0.1, 8) if paused else Distances(0.1, 1.0, 0.9, 8)
    return decide(step, {Pair("t", "s"): distances}, Rule(make_strategy("switokd").switch))


def scraped(metrics: Metrics) -> dict[str, float]:
    text = generate_latest(metrics.registry).decode()
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("switokd_")]
    return {name: float(value) for name, value in rows}


def test_a_run_is_shown_from_its_first_step_until_it_is_forgotten() -> None:
    metrics = Metrics()
    runs = [RunState(name, PLAN, now=0.0) for name in ("one", "two")]
    for run in runs:
        assert f'switokd_steps_total{{run="{run.run_id}"}}' not in scraped(metrics)
        for step, paused in enumerate((True, False, False, True), 1):
            metrics.of(run).decided(decision(step, paused), 3e-4)
    found = scraped(metrics)
    for name in ("one", "two"):
        pair = f'run="{name}",student="s",teacher="t"'
        assert found[f'switokd_steps_total{{run="{name}"}}'] == 4
        assert found[f"switokd_switches_total{{{pair}}}"] == 2
        assert found[f'switokd_pair_steps_total{{mode="expert",{pair}}}'] == 2
        assert found[f"switokd_learning_mode{{{pair}}}"] == 0
        assert found[f'switokd_paused_steps_total{{network="t",run="{name}"}}'] == 2
        assert found[f'switokd_paused_ratio{{network="t",run="{name}"}}'] == 0.5
        assert found[f'switokd_round_duration_seconds_count{{run="{name}"}}'] == 4
        assert found[f'switokd_run_state{{run="{name}",state="joining"}}'] == 1
    metrics.forget("one")
    left = scraped(metrics)
    assert left == {key: value for key, value in found.items() if 'run="one"' not in key}
    assert left


def test_what_was_not_said_is_not_shown() -> None:
    metrics = Metrics()
    metrics.of(RunState("r", PLAN, now=0.0)).progressed("s", 8, 0.5, None, None)
    found = {name for name in scraped(metrics) if "network=" in name}
    labels = '{network="s",run="r"}'
    assert found == {f"switokd_samples_total{labels}", f"switokd_loss{labels}"}


def test_a_later_progress_adds_samples_and_keeps_what_it_does_not_say() -> None:
    metrics = Metrics()
    numbers = metrics.of(RunState("r", PLAN, now=0.0))
    numbers.progressed("s", 8, 0.5, 0.25, None)
    numbers.progressed("s", -3, None, 0.0, 1.0)
    found = scraped(metrics)
    labels = '{network="s",run="r"}'
    assert found[f"switokd_samples_total{labels}"] == 8
    assert found[f"switokd_loss{labels}"] == 0.5
    assert found[f"switokd_train_accuracy_ratio{labels}"] == 0.0
    assert found[f"switokd_test_accuracy_ratio{labels}"] == 1.0


def test_a_duration_falls_into_the_first_bucket_that_holds_it() -> None:
    durations = Distribution()
    for seconds in (0.0, 50e-6, 51e-6, 20.0, 20.5):
        durations.add(seconds)
    counts = dict(durations.buckets())
    assert list(counts)[-1] == "+Inf"
    assert [counts[key] for key in ("5e-05", "0.0001", "5.0", "20.0", "+Inf")] == [2, 3, 3, 4, 5]
    assert durations.total == pytest.approx(40.500101)
    assert len(counts) == len(SECONDS_BUCKETS) + 1


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, -math.inf])
def test_what_is_no_duration_is_left_out(seconds: float) -> None:
    durations = Distribution()
    durations.add(seconds)
    assert durations.buckets()[-1] == ("+Inf", 0)
    assert durations.total == 0.0
