"""The coordinator's span of a traced step: its round, from the first report to the decision.

Not covered: what the ranks do in the step (`switokd/runtime/step_spans.py`).
"""

from __future__ import annotations

import time

from switokd.services.coordinator.rounds import DecidedRound
from switokd.tracing.spans import ROOT, Attributes, Span, SpanSink, StepTrace, is_traced


class RoundSpans:
    """Sends the span of every `every`-th step's round; without a sink it sends none."""

    def __init__(self, sink: SpanSink | None = None, every: int = 0) -> None:
        self._sink, self._every = sink, every if sink else 0

    def add(self, run_id: str, start: int, decided: DecidedRound) -> None:
        """Send the span of a round that was decided just now; does not wait."""
        decision, duration = decided
        if self._sink is None or not is_traced(decision.step, self._every):
            return
        ended = time.time_ns()
        attributes: Attributes = {
            "switokd.run": run_id,
            "switokd.step": decision.step,
            "switokd.paused": tuple(decision.paused),
            "switokd.modes": tuple(
                f"{p.pair.teacher}/{p.pair.student} {p.mode.value}" for p in decision.pairs
            ),
        }
        began = ended - round(duration * 1e9)
        span = Span("round", ("round",), ROOT, began, ended, attributes)
        self._sink.send(StepTrace(run_id, start, decision.step), [span])


NO_SPANS = RoundSpans()
