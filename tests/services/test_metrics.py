"""Prometheus metrics without a server: series of runs, histograms, forgotten runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from prometheus_client import generate_latest

from switokd.distillation.decision import Decision, InForce, Mode, Rule, decide
from switokd.distillation.gap import Distances
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Role, Topology
from switokd.services.coordinator.health import Heartbeat
from switokd.services.coordinator.histogram import SECONDS_BUCKETS, Histogram
from switokd.services.coordinator.journal import Journal
from switokd.services.coordinator.limits import Limits
from switokd.services.coordinator.measurements import Measured
from switokd.services.coordinator.metrics import Metrics
from switokd.services.coordinator.plan import Plan
from switokd.services.coordinator.run import CoordinatedRun
from switokd.services.coordinator.run_series import REASONS

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


def plan_of(students: int, ranks: int = 1, letters: int = 1) -> Plan:
    """A plan of one teacher on all ranks and several students, with names of so many letters."""
    names = [f"{i:x>{letters}}" for i in range(students + 1)]
    roles = [Role.TEACHER] + [Role.STUDENT] * students
    on_ranks = tuple(tuple(range(ranks)) for _ in names)
    return Plan(Topology(tuple(zip(names, roles, strict=True))), on_ranks, "switokd", "d", 60.0)


def decided(plan: Plan) -> Decision:
    distances = Distances(2.0, 1.0, 0.1, 8)
    rule = Rule(make_strategy("switokd").switch)
    return decide(1, dict.fromkeys(plan.topology.pairs, distances), rule)


def shown_of(metrics: Metrics) -> tuple[set[str], dict[str, float], int]:
    """The runs that are shown, the numbers of hidden ones, and the bytes of the page."""
    text = generate_latest(metrics.registry).decode()
    series = scraped(metrics, "")
    runs = {name.split('"')[1] for name in series if name.startswith("switokd_expected_ranks{")}
    return (
        runs,
        {k: series[f'switokd_hidden_runs{{series="{k}"}}'] for k in ("all", "rank")},
        len(text.encode()),
    )


def test_a_page_is_limited_in_bytes_and_small_runs_come_first() -> None:
    limit = 400_000
    metrics = Metrics(Limits(max_metrics_bytes=limit))
    metrics.add_run(CoordinatedRun("small", PLAN, now=0.0)).add_decision(decision(1, True), 1e-3)
    large = plan_of(30, letters=200)
    for number in range(6):
        run = metrics.add_run(CoordinatedRun(f'{number}"\\é'.ljust(200, "r"), large, now=0.0))
        run.add_decision(decided(large), 1e-3)
    runs, hidden, size = shown_of(metrics)
    assert "small" in runs
    assert hidden == {"all": 7 - len(runs), "rank": 0}
    assert 1 < len(runs) < 7
    assert limit / 2 < size < limit


def test_a_run_with_too_many_ranks_is_shown_without_them() -> None:
    metrics = Metrics(Limits(max_metrics_bytes=100_000))
    plan = plan_of(1, ranks=500)
    run = CoordinatedRun("r", plan, now=0.0)
    counted = metrics.add_run(run)
    counted.add_decision(decided(plan), 1e-3)
    for rank in range(500):
        counted.rank(rank).exchange.observe(0.1)
    runs, hidden, size = shown_of(metrics)
    assert (runs, hidden) == ({"r"}, {"all": 0, "rank": 1})
    assert size < 100_000
    assert "switokd_gap" in "".join(scraped(metrics))
    assert "rank=" not in "".join(scraped(metrics))


def test_ended_runs_beyond_the_limit_count_as_hidden() -> None:
    metrics = Metrics(Limits(max_metrics_ended=1))
    for name in ("a", "b", "c"):
        run = CoordinatedRun(name, PLAN, now=0.0)
        metrics.add_run(run)
        run.fail("stopped", now=1.0)
    assert shown_of(metrics)[:2] == ({"c"}, {"all": 2, "rank": 0})


def test_time_in_a_mode_counts_from_decision_to_decision_and_not_between_starts() -> None:
    metrics, now = Metrics(), [100.0]
    run = metrics.add_run(CoordinatedRun("r", PLAN, now=0.0))
    run.clock = lambda: now[0]

    def seconds() -> tuple[float, float]:
        labels = 'run="r",student="s",teacher="t"'
        series = scraped(metrics)
        expert, learning = (
            series[f'switokd_mode_seconds_total{{mode="{mode}",{labels}}}']
            for mode in ("expert", "learning")
        )
        return expert, learning

    for step, (at, paused) in enumerate([(100, True), (103, True), (104, False), (110, False)], 1):
        now[0] = at
        run.add_decision(decision(step, paused), 1e-3)
    assert seconds() == (4.0, 6.0)
    now[0] = 500.0
    assert seconds() == (4.0, 6.0)  # only decided steps count
    run.restart(CoordinatedRun("r", PLAN, now=500.0, epoch=2))
    assert seconds() == (4.0, 6.0)
    run.add_decision(decision(5, True), 1e-3)
    now[0] = 502.0
    run.add_decision(decision(6, True), 1e-3)
    assert seconds() == (6.0, 6.0)
    assert scraped(metrics)['switokd_run_attempt{run="r"}'] == 2


@pytest.mark.parametrize(
    ("distances", "strategy", "held", "paused", "reason"),
    [
        (Distances(0.1, 1.0, 0.9, 8), "switokd", False, False, "gap_within_threshold"),
        (Distances(1.9, 0.4, 1.5, 8), "switokd", False, False, "not_better"),
        (Distances(2.0, 1.0, 0.1, 8), "switokd", False, True, "gap_too_large"),
        (Distances(0.1, 1.0, 0.9, 8), "switokd", True, True, "held"),
        (Distances(2.0, 1.0, 0.1, 8), "dml", False, False, "other"),
    ],
)
def test_the_reason_why_a_teacher_learns_or_is_paused(
    distances: Distances, strategy: str, held: bool, paused: bool, reason: str
) -> None:
    metrics, pair, made = Metrics(), Pair("t", "s"), make_strategy(strategy)
    run = metrics.add_run(CoordinatedRun("r", PLAN, now=0.0))
    in_force = InForce({pair: Mode.EXPERT}) if held else InForce()
    rule = Rule(made.switch, pauses=made.pauses)
    run.add_decision(decide(1, {pair: distances}, rule, in_force=in_force), 1e-3)
    series = scraped(metrics)
    values = {
        each: series[f'switokd_teacher_reason{{network="t",reason="{each}",run="r"}}']
        for each in REASONS
    }
    assert values == {each: float(each == reason) for each in REASONS}
    assert series['switokd_teacher_paused{network="t",run="r"}'] == paused


def test_pauses_save_the_mean_time_of_a_learning_step() -> None:
    run = Metrics().add_run(CoordinatedRun("r", PLAN, now=0.0))
    network = run.network("t")
    assert network.compute_saved_ratio is None
    network.add(Measured(training_seconds=1.0, paused_steps=3))
    assert network.compute_saved_ratio is None  # it has never learned: nothing to compare with
    network.add(Measured(training_seconds=5.0, learning_seconds=4.0, learned_steps=8))
    assert network.compute_saved_ratio == pytest.approx(3 * 0.5 / (6.0 + 1.5))


def test_the_journal_is_behind_by_the_steps_that_are_not_on_the_disk() -> None:
    class Behind(Journal):
        keeps, errors, disk_free = True, 3, 1000

        def recorded(self, run_id: str, epoch: int) -> int:
            return {"r": 1}.get(run_id, 0)

    metrics = Metrics()
    assert not [name for name in scraped(metrics, "") if "journal" in name]
    metrics.service.journal = Behind()
    for name, first_step in (("r", 1), ("new", 5)):
        run = metrics.add_run(CoordinatedRun(name, replace(PLAN, first_step=first_step), now=0.0))
        run.add_decision(decision(first_step + 3, True), 1e-3)
    assert scraped(metrics, "journal") == {
        "switokd_journal_lag_steps": 3 + 4,
        "switokd_journal_errors_total": 3,
        "switokd_journal_disk_free_bytes": 1000,
    }
