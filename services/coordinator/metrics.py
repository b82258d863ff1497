"""Prometheus metrics of the coordinator: the page of all runs, within its limits.

Names, types and labels are in `metric_families.py`. A run's series disappear when the run is
forgotten.

Not covered: the HTTP port (`http_server.py`); what is counted (`run_metrics.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from switokd.services.coordinator.histogram import SECONDS_BUCKETS, Histogram
from switokd.services.coordinator.limits import DEFAULTS, Limits
from switokd.services.coordinator.metric_families import FAMILIES, RANK_FAMILIES, Family
from switokd.services.coordinator.run import CoordinatedRun
from switokd.services.coordinator.run_metrics import RunMetrics
from switokd.services.coordinator.run_series import Series, series_of
from switokd.services.coordinator.service_series import ServiceMetrics

PAUSE_SECONDS = 20e-6
"""A scrape lets the event loop run after each run for at least as long."""
LONGEST_NUMBER = 24
"""Letters of a value in /metrics."""
ESCAPED = ("\\", '"', "\n")
"""Letters that take two bytes in a label's value."""
FRAME_BYTES = 32_768
"""Of the page without any run: help, types, and the series of the process."""


class Metrics(Collector):
    """Metrics of all runs and of this process.

    The event loop updates plain numbers. A scrape, on a thread of the HTTP server, turns them into
    series. Therefore a scrape may see a step counted in one series and not yet in another.
    """

    def __init__(self, limits: Limits = DEFAULTS) -> None:
        self._limits = limits
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(self)
        self._runs: dict[str, RunMetrics] = {}
        self.service = ServiceMetrics()

    def add_run(self, run: CoordinatedRun) -> RunMetrics:
        """Show the metrics of a run until `forget`; return them."""
        metrics = self._runs[run.run_id] = RunMetrics(run)
        return metrics

    def forget(self, run_id: str) -> None:
        """Remove all series of a run."""
        self._runs.pop(run_id, None)

    def collect(self) -> Iterator[Metric]:
        """Return all series with their current values; prometheus_client calls this."""
        families = {
            name: Metric(f"switokd_{name}", family.text, family.kind)
            for name, family in FAMILIES.items()
        }
        runs = list(self._runs.values())  # a copy: the event loop may add a run
        shown = self._in_order(runs)
        page = Page(self._limits)
        page.hidden["all"] = len(runs) - len(shown)
        for metrics in shown:
            for name, labels, value in page.fitting(series_of(metrics)):
                _add(families[name], dict(zip(FAMILIES[name].labels, labels, strict=True)), value)
            time.sleep(PAUSE_SECONDS)
        for name, labels, value in self.service.series(runs, page.hidden):
            _add(families[name], dict(zip(FAMILIES[name].labels, labels, strict=True)), value)
        yield from families.values()

    def _in_order(self, runs: Sequence[RunMetrics]) -> list[RunMetrics]:
        """Return runs in the order in which they get room.

        First those with connected ranks, then the others, then some of those that have ended. Small
        runs come before large ones, so that a few large ones hide no other run; then the newest.
        Of those that have ended, first the ones that failed: there is an alert for them.
        """
        newest = list(reversed(runs))
        ended = [metrics for metrics in newest if metrics.run.ended_at is not None]
        ended.sort(key=lambda metrics: not metrics.run.failure)
        live = [metrics for metrics in newest if metrics.run.ended_at is None]
        live.sort(key=lambda metrics: (not metrics.run.connected, _size_class(metrics.run)))
        return live + ended[: self._limits.max_metrics_ended]


class Page:
    """What is left of the limits while a page is made.

    A run that does not fit is shown without the series of its ranks, or not at all.
    """

    def __init__(self, limits: Limits) -> None:
        self._lines = limits.max_metrics_lines
        self._bytes = limits.max_metrics_bytes - FRAME_BYTES
        self._length_of: dict[str, int] = {}
        self.hidden: Counter[str] = Counter()
        """Number of runs that do not fit: "all", or "rank" for those whose ranks do not."""

    def fitting(self, series: Iterable[Series]) -> Sequence[Series]:
        """Return those series of a run that fit, and take their room; its ranks' come last.

        Of a run that does not fit, no more series are made than there is room for.
        """
        rows: list[Series] = []
        lines = size = 0
        room = 0, 0, 0  # what the rows before the ranks' take
        for row in series:
            name, labels, value = row
            count = HISTOGRAM_LINES if isinstance(value, Histogram) else value is not None
            lines += count
            size += (OVERHEAD[name] + sum(map(self._length, labels))) * count
            if lines > self._lines or size > self._bytes:
                if name not in RANK_FAMILIES:
                    self.hidden["all"] += 1
                    return ()
                self.hidden["rank"] += 1
                break
            rows.append(row)
            if name not in RANK_FAMILIES:
                room = len(rows), lines, size
        else:
            room = len(rows), lines, size
        self._lines -= room[1]
        self._bytes -= room[2]
        return rows[: room[0]]

    def _length(self, label: str) -> int:
        """Return the bytes of a label's value, in which some letters are escaped."""
        found = self._length_of.get(label)
        if found is None:
            escapes = sum(map(label.count, ESCAPED))
            found = self._length_of[label] = len(label.encode(errors="replace")) + escapes
        return found


def _size_class(run: CoordinatedRun) -> int:
    """Return about the binary logarithm of the number of a run's series."""
    topology = run.plan.topology
    return (len(topology.pairs) + len(topology.roles) + run.world_size).bit_length()


def _overhead(name: str, family: Family) -> int:
    """Return the most bytes of a line without the values of its labels."""
    labels = (*family.labels, "le") if family.kind == "histogram" else family.labels
    suffix, longest_bound = "_bucket", "0.00035"
    line = f"switokd_{name}{suffix}{{}} \n{longest_bound}"
    return len(line) + sum(len(label) + len('="",') for label in labels) + LONGEST_NUMBER


OVERHEAD = {name: _overhead(name, family) for name, family in FAMILIES.items()}
HISTOGRAM_LINES = len(SECONDS_BUCKETS) + 3


def _add(family: Metric, labels: dict[str, str], value: float | Histogram | None) -> None:
    """Add the samples of one series; a histogram has one sample per bucket, a count and a sum."""
    if isinstance(value, Histogram):
        buckets = value.buckets()
        for bound, count in buckets:
            family.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, count)
        family.add_sample(f"{family.name}_count", labels, buckets[-1][1])
        family.add_sample(f"{family.name}_sum", labels, value.total)
    elif value is not None:
        suffix = "_total" if family.type == "counter" else ""
        family.add_sample(family.name + suffix, labels, value)
