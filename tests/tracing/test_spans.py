"""The numbers of traces, the spans of a rank and of a round, and what an endpoint's loss does.

Not covered: whole runs (`test_traced_runs.py`).
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest

from switokd.distillation.decision import Decision, Mode, PairDecision
from switokd.distillation.gap import Distances
from switokd.distillation.topology import Pair
from switokd.errors import UsageError
from switokd.runtime.phase import Activity, Phase
from switokd.runtime.step_spans import StepSpans
from switokd.services.coordinator.round_spans import NO_SPANS, RoundSpans
from switokd.services.coordinator.rounds import DecidedRound
from switokd.tracing.opening import is_installed, open_sender
from switokd.tracing.otlp import DEFAULT_URL, endpoint
from switokd.tracing.spans import ROOT, Span, StepTrace, is_traced
from tests.support import free_port, wait_until
from tests.tracing.collector import collector


class Kept:
    """Keeps spans by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, list[Span]] = {}

    def send(self, trace: StepTrace, spans: Sequence[Span]) -> None:
        self.by_step.setdefault(trace.step, []).extend(spans)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    level = logging.getLogger("opentelemetry").level
    yield
    logging.getLogger("opentelemetry").setLevel(level)


def test_all_processes_reckon_the_same_numbers() -> None:
    trace = StepTrace("digits-1a2b3c", 2, 300)
    code = (
        "from switokd.tracing.spans import *; t = StepTrace('digits-1a2b3c', 2, 300); "
        "print(t.trace_id, t.span_id(ROOT), t.span_id(('rank', 1)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    expected = [trace.trace_id, trace.span_id(ROOT), trace.span_id(("rank", 1))]
    assert [*map(int, done.stdout.split())] == expected
    assert 0 < trace.trace_id < 2**128
    assert 0 < trace.span_id(ROOT) < 2**64
    others = [trace._replace(run_id="x"), trace._replace(start=3), trace._replace(step=301)]
    assert len({trace.trace_id, *(other.trace_id for other in others)}) == 4


def test_every_so_many_steps_are_traced() -> None:
    assert [step for step in range(1, 10) if is_traced(step, 3)] == [3, 6, 9]
    assert not any(is_traced(step, 0) for step in range(1, 10))


def test_phases_of_a_traced_step_become_spans() -> None:
    kept, activity = Kept(), Activity()
    activity.listener = StepSpans(kept, 2, "r", 1, 1, ["student"])
    for step in (1, 2, 3, 4):
        activity.begin(Phase.LOADING, step)
        for phase in (Phase.FORWARD, Phase.EXCHANGE, Phase.DECIDING, Phase.BACKWARD):
            activity.begin(phase)
    activity.begin(Phase.EVALUATING, 4)
    activity.begin(Phase.SAVING)
    assert sorted(kept.by_step) == [2, 4]
    for rank, *phases in kept.by_step.values():
        assert (rank.name, rank.parent) == ("rank 1", ROOT)
        assert [phase.name for phase in phases] == (
            ["loading", "forward", "exchange", "deciding", "backward"]
        )
        assert all(phase.parent == rank.path for phase in phases)
        assert len({phase.path for phase in phases}) == 5
        assert (rank.started, rank.ended) == (phases[0].started, phases[-1].ended)
        for before, after in pairwise(phases):
            assert before.started <= before.ended == after.started


def test_rank_0_sends_the_root_and_a_step_that_is_interrupted_is_sent_too() -> None:
    kept = Kept()
    spans = StepSpans(kept, 1, "r", 1, 0, ["t", "s"])
    spans(Phase.LOADING, 7)
    spans(Phase.FORWARD, 7)
    spans.end()
    spans.end()
    names = [(span.name, span.path, span.parent) for span in kept.by_step[7]]
    assert names[-1] == ("step", ROOT, None)
    assert [name for name, _, _ in names] == ["rank 0", "loading", "forward", "step"]


def test_a_round_is_a_span_from_its_first_report_to_the_decision() -> None:
    kept = Kept()
    rounds = RoundSpans(kept, 2)
    line = PairDecision(Pair("t", "s"), Distances(2.0, 2.0, 1.0, 8), 0.7, 1.3, Mode.EXPERT)
    for step in (1, 2):
        decided = DecidedRound(Decision(step, (line,), ("t",)), 0.25)
        rounds.add("r", 1, decided)
        NO_SPANS.add("r", 1, decided)
    ((step, (span,)),) = kept.by_step.items()
    assert (step, span.name, span.parent) == (2, "round", ROOT)
    assert span.ended - span.started == 250_000_000
    assert span.attributes == {
        "switokd.run": "r",
        "switokd.step": 2,
        "switokd.paused": ("t",),
        "switokd.modes": ("t/s expert",),
    }


def test_spans_reach_a_collector_and_no_random_number_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = random.getstate()
    with collector() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        said: list[str] = []
        trace = StepTrace("r", 1, 5)
        with open_sender("some-service", "a setting", said.append) as sink:
            sink.send(trace, [Span("step", ROOT, None, 100, 200, {"a": 1})])
            sink.send(trace, [Span("part", ("p",), ROOT, 120, 150, {"names": ("x", "y")})])
        root, part = sorted(received.spans, key=lambda span: span.start)
    assert said == []
    assert (root.trace, root.id, root.parent) == (
        trace.trace_id.to_bytes(16, "big"),
        trace.span_id(ROOT).to_bytes(8, "big"),
        b"",
    )
    assert (part.trace, part.parent) == (root.trace, root.id)
    assert (root.service, root.start, root.end, root.attributes) == (
        *("some-service", 100, 200),
        {"a": 1},
    )
    assert part.attributes == {"names": ["x", "y"]}
    assert random.getstate() == state


def test_a_missing_collector_is_told_once_and_delays_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    said: list[str] = []
    with open_sender("s", "a setting", said.append) as sink:
        for step in range(3):
            longest = time.monotonic()
            sink.send(StepTrace("r", 1, step), [Span("step", ROOT, None, 1, 2)])
            assert time.monotonic() - longest < 1
            wait_until(lambda: said, 20, "the sentence")
        ended = time.monotonic()
    assert time.monotonic() - ended < 10  # 2 s on an idle machine
    assert len(said) == 1
    assert said[0].startswith(f"traces cannot be delivered to {endpoint()}")
    assert "\n" not in said[0]
    assert capfd.readouterr() == ("", "")
    assert threading.main_thread().is_alive()


def test_the_endpoint_is_that_of_opentelemetrys_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoint() == DEFAULT_URL
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://one:4318")
    assert endpoint() == "http://one:4318"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://two:4318/v1/traces")
    assert endpoint() == "http://two:4318/v1/traces"


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_installed()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "switokd.tracing.otlp")
    with (
        pytest.raises(UsageError, match=r"^tracking.traces_every: .*pip install 'switokd\[otel\]'"),
        open_sender("s", "tracking.traces_every", print),
    ):
        pass
