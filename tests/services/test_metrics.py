"""Prometheus metrics without a server: series of runs, histograms, forgotten runs."""

from __future__ import annotations

import math

import pytest
from prometheus_client import generate_latest

from switokd.distillation.decision import Decision, Rule, decide
from switokd.distillation.gap import Distances
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Role, Topology
from switokd.services.coordinator.health import Heartbeat
from switokd.services.coordinator.histogram import SECONDS_BUCKETS, Histogram
from switokd.services.coordinator.limits import Limits
from switokd.services.coordinator.measurements import Measured
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.run import CoordinatedRun

PLAN = Plan(
    Topology((("t", Role.TEACHER), ("s", Role.STUDENT))), ((0,), (0,)), "switokd", "d", 60.0
)


def decision(step: int, paused: bool) -> Decision:
    distances = Distances(2.0, 1.0, 0.1, 8) if paused else Distances(0.1, 1.0, 0.9, 8)
    return decide(step, {Pair("t", "s"): distances}, Rule(make_strategy("switokd").switch))


def scraped(metrics: Metrics, label: str = 'run="') -> dict[str, float]:
    """All series of runs, by name with labels. label: "" for those of the coordinator as well."""
    text = generate_latest(metrics.registry).decode()
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("switokd_")]
    return {name: float(value) for name, value in rows if label in name}


def test_a_run_has_series_from_its_first_step_until_it_is_forgotten() -> None:
    metrics = Metrics()
    for name in ("one", "two"):
        run = metrics.add_run(CoordinatedRun(name, PLAN, now=0.0))
        assert f'switokd_steps_total{{run="{name}"}}' not in scraped(metrics)
        for step, paused in enumerate((True, False, False, True), 1):
            run.add_decision(decision(step, paused), 3e-4)
    series = scraped(metrics)
    for name in ("one", "two"):
        pair = f'run="{name}",student="s",teacher="t"'
        assert series[f'switokd_steps_total{{run="{name}"}}'] == 4
        assert series[f"switokd_switches_total{{{pair}}}"] == 2
        assert series[f'switokd_pair_steps_total{{mode="expert",{pair}}}'] == 2
        assert series[f"switokd_learning_mode{{{pair}}}"] == 0
        assert series[f'switokd_paused_steps_total{{network="t",run="{name}"}}'] == 2
        assert series[f'switokd_paused_ratio{{network="t",run="{name}"}}'] == 0.5
        assert series[f'switokd_round_duration_seconds_count{{run="{name}"}}'] == 4
        assert series[f'switokd_run_state{{run="{name}",state="joining"}}'] == 1
    metrics.forget("one")
    remaining = scraped(metrics)
    assert remaining == {key: value for key, value in series.items() if 'run="one"' not in key}
    assert remaining


def test_a_number_that_no_rank_has_sent_has_no_series() -> None:
    metrics = Metrics()
    run = metrics.add_run(CoordinatedRun("r", PLAN, now=0.0))
    run.network("s").add(Measured(samples=8, loss=0.5))
    series = {name for name in scraped(metrics) if "network=" in name}
    labels = '{network="s",run="r"}'
    assert series == {f"switokd_samples_total{labels}", f"switokd_loss{labels}"}


def test_progress_adds_samples_and_keeps_numbers_that_it_leaves_out() -> None:
    metrics = Metrics()
    run = metrics.add_run(CoordinatedRun("r", PLAN, now=0.0))
    run.network("s").add(Measured(samples=8, loss=0.5, accuracy=0.25))
    run.network("s").add(Measured(accuracy=0.0, test_accuracy=1.0))
    series = scraped(metrics)
    labels = '{network="s",run="r"}'
    assert series[f"switokd_samples_total{labels}"] == 8
    assert series[f"switokd_loss{labels}"] == 0.5
    assert series[f"switokd_train_accuracy_ratio{labels}"] == 0.0
    assert series[f"switokd_test_accuracy_ratio{labels}"] == 1.0


def test_runs_with_connected_ranks_and_the_newest_are_shown_first() -> None:
    alone = Metrics()
    alone.add_run(CoordinatedRun("one", PLAN, now=0.0))
    metrics = Metrics(Limits(max_metrics_lines=3 * len(scraped(alone))))
    runs = {name: CoordinatedRun(name, PLAN, now=0.0) for name in ("a", "b", "c", "d", "e")}
    for run in runs.values():
        metrics.add_run(run)
    runs["b"].join(0, PLAN)
    runs["b"].attach(0)
    shown = {name for name in runs if f'switokd_expected_ranks{{run="{name}"}}' in scraped(metrics)}
    assert shown == {"b", "d", "e"}


def test_few_ended_runs_are_shown_those_that_failed_first() -> None:
    metrics = Metrics(Limits(max_metrics_ended=2))
    runs = {name: CoordinatedRun(name, PLAN, now=0.0) for name in ("a", "b", "c", "d")}
    for run in runs.values():
        metrics.add_run(run)
    runs["a"].fail("stopped", now=1.0)
    for name in ("b", "c"):
        runs[name].leave(0, "", now=2.0)
    shown = {name for name in runs if f'switokd_expected_ranks{{run="{name}"}}' in scraped(metrics)}
    assert shown == {"a", "c", "d"}


def test_a_histogram_counts_a_duration_in_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram()
    for seconds in (0.0, 50e-6, 51e-6, 20.0, 20.5):
        histogram.observe(seconds)
    counts = dict(histogram.buckets())
    assert list(counts)[-1] == "+Inf"
    assert [counts[key] for key in ("5e-05", "0.0001", "5.0", "20.0", "+Inf")] == [2, 3, 3, 4, 5]
    assert histogram.total == pytest.approx(40.500101)
    assert len(counts) == len(SECONDS_BUCKETS) + 1


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, -math.inf])
def test_a_histogram_ignores_a_number_that_is_no_duration(seconds: float) -> None:
    histogram = Histogram()
    histogram.observe(seconds)
    assert histogram.buckets()[-1] == ("+Inf", 0)
    assert histogram.total == 0.0


def test_a_rank_has_series_of_its_phase_until_the_run_ends() -> None:
    metrics = Metrics()
    run = CoordinatedRun("r", PLAN, now=0.0)
    metrics.add_run(run)
    run.join(0, PLAN)
    run.attach(0)
    run.health.beat(0, Heartbeat("backward", 3, 2.0, 2.0, waits=False), now=1.0)
    run.hang(now=1.5)
    series = {name: value for name, value in scraped(metrics).items() if "rank=" in name}
    assert series == {
        'switokd_rank_step{rank="0",run="r"}': 0,
        'switokd_rank_lag_steps{rank="0",run="r"}': 0,
        'switokd_rank_phase_seconds{phase="backward",rank="0",run="r"}': 2.5,
        'switokd_heartbeat_age_seconds{rank="0",run="r"}': 0.5,
        'switokd_rank_waited_for{rank="0",run="r"}': 0,
    }
    run.hang(now=12.0)
    assert scraped(metrics)['switokd_rank_waited_for{rank="0",run="r"}'] == 1
    run.leave(0, "", now=13.0)
    run.hang(now=13.5)
    assert not [name for name in scraped(metrics) if "rank=" in name]
