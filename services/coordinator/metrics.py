"""What Prometheus scrapes, and the HTTP port it is scraped from.

Names follow Prometheus' practice (base units, `_total`, `_ratio`); labels are bounded: run,
teacher, student, network, mode, state. A run's series are dropped when the run is forgotten.

Not covered: authentication of the port.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from switokd.decision import Decision, Mode
from switokd.services.coordinator.rounds import Run, State
from switokd.topology import Pair

# From 50 microseconds: a round trip on one machine takes a few hundred.
SECONDS_BUCKETS = (
    *(50e-6, 100e-6, 200e-6, 350e-6, 500e-6, 750e-6),
    *(1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1.0, 5.0, 20.0),
)


class Metrics:
    """The coordinator's registry. Not thread-safe but for scraping."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        pair, network = ["run", "teacher", "student"], ["run", "network"]
        self._families: list[MetricWrapperBase] = []
        self.gap = self._gauge("gap", "Distillation gap G of the last step.", pair)
        self.threshold = self._gauge("threshold", "Switching threshold delta, last step.", pair)
        self.learning = self._gauge("learning_mode", "1 learning mode, 0 expert mode.", pair)
        self.switches = self._counter("switches", "Changes of a pair's mode.", pair)
        self.pair_steps = self._counter("pair_steps", "Steps by mode.", [*pair, "mode"])
        self.steps = self._counter("steps", "Steps decided.", ["run"])
        self.paused_steps = self._counter("paused_steps", "Steps a teacher was paused.", network)
        self.paused_ratio = self._gauge(
            "paused_ratio", "Share of all steps so far that a teacher was paused.", network
        )
        self.loss = self._gauge("loss", "Mean training loss, lately.", network)
        self.train_accuracy = self._gauge(
            "train_accuracy_ratio", "Top-1 accuracy on training batches, lately.", network
        )
        self.test_accuracy = self._gauge(
            "test_accuracy_ratio", "Top-1 accuracy on the test set, last evaluation.", network
        )
        self.samples = self._counter("samples", "Training samples seen.", network)
        self.decision_wait = self._histogram(
            "decision_wait_seconds", "Time a teacher waited for a decision.", network
        )
        self.exchange = self._histogram(
            "exchange_seconds", "Time a rank's collective of logits took.", network
        )
        self.round_duration = self._histogram(
            "round_duration_seconds", "Time from a step's first report to its decision.", ["run"]
        )
        self.connected = self._gauge("connected_ranks", "Ranks with an open stream.", ["run"])
        self.expected = self._gauge("expected_ranks", "Ranks the run consists of.", ["run"])
        self.state = self._gauge("run_state", "1 for the state the run is in.", ["run", "state"])
        self._modes: dict[tuple[str, Pair], Mode] = {}
        self._paused: dict[tuple[str, str], int] = {}

    def run_changed(self, run: Run) -> None:
        """Show a run's state and ranks."""
        self.connected.labels(run.run_id).set(len(run.connected))
        self.expected.labels(run.run_id).set(run.world_size)
        for state in State:
            self.state.labels(run.run_id, state.value).set(state is run.state)

    def decided(
        self, run: str, decision: Decision, duration: float, teachers: Iterable[str]
    ) -> None:
        """Count one step's decision."""
        self.steps.labels(run).inc()
        self.round_duration.labels(run).observe(duration)
        for p in decision.pairs:
            labels = (run, p.pair.teacher, p.pair.student)
            self.gap.labels(*labels).set(p.distances.gap)
            self.threshold.labels(*labels).set(p.delta)
            self.learning.labels(*labels).set(p.mode is Mode.LEARNING)
            self.pair_steps.labels(*labels, p.mode.value).inc()
            before = self._modes.get((run, p.pair))
            self.switches.labels(*labels).inc(before is not None and before is not p.mode)
            self._modes[run, p.pair] = p.mode
        for teacher in teachers:
            is_paused = teacher in decision.paused
            self.paused_steps.labels(run, teacher).inc(is_paused)
            count = self._paused[run, teacher] = self._paused.get((run, teacher), 0) + is_paused
            self.paused_ratio.labels(run, teacher).set(count / decision.step)

    def forget(self, run: str) -> None:
        """Drop all series of a run."""
        for family in self._families:
            family.remove_by_labels({"run": run})
        self._modes = {key: mode for key, mode in self._modes.items() if key[0] != run}
        self._paused = {key: count for key, count in self._paused.items() if key[0] != run}

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        gauge = Gauge(f"switokd_{name}", text, labels, registry=self.registry)
        self._families.append(gauge)
        return gauge

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        counter = Counter(f"switokd_{name}", text, labels, registry=self.registry)
        self._families.append(counter)
        return counter

    def _histogram(self, name: str, text: str, labels: list[str]) -> Histogram:
        histogram = Histogram(
            f"switokd_{name}", text, labels, registry=self.registry, buckets=SECONDS_BUCKETS
        )
        self._families.append(histogram)
        return histogram


class _Quiet(WSGIRequestHandler):
    """Logs no line per scrape."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve_http(
    registry: CollectorRegistry, host: str, port: int
) -> tuple[int, ThreadingWSGIServer]:
    """Serve /metrics and /healthz from a daemon thread; return the port (0 takes a free one).

    OSError if the port is taken.
    """
    metrics = make_wsgi_app(registry)

    def app(environ, start_response):  # type: ignore[no-untyped-def]
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        status, body = (
            ("200 OK", b"ok\n")
            if path == "/healthz"
            else ("404 Not Found", b"see /metrics, /healthz\n")
        )
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [body]

    server = make_server(host, port, app, ThreadingWSGIServer, handler_class=_Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port, server
