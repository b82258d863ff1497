"""The spans of one rank: its part of a traced step, divided into phases.

The training loop notes its phases in `ACTIVITY` anyway; `StepSpans` listens. While a step runs, it
notes times. The spans are made when the next step, or the evaluation, begins.

Not covered: the coordinator's span (`services/coordinator/round_spans.py`); what a GPU does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from switokd.runtime.phase import ACTIVITY, Phase
from switokd.tracing.spans import ROOT, Attributes, Span, SpanSink, StepTrace, is_traced


class StepSpans:
    """Listens to the phases of one rank, and sends the spans of every `every`-th step.

    run_id, start: as in `StepTrace`. networks: those of the rank.
    """

    def __init__(
        self,
        sink: SpanSink,
        every: int,
        run_id: str,
        start: int,
        rank: int,
        networks: Sequence[str],
    ) -> None:
        self._sink, self._every = sink, every
        self._run_id, self._start = run_id, start
        self._rank, self._networks = rank, tuple(networks)
        self._step = 0
        """The traced step that runs; 0: none."""
        self._phases: list[tuple[Phase, int]] = []
        """Its phases so far, each with its begin in nanoseconds since 1970."""

    def __call__(self, phase: Phase, step: int) -> None:
        """Note that a phase begins."""
        is_new = phase is Phase.LOADING
        if self._step and (is_new or phase is Phase.EVALUATING):
            self.end()
        if is_new and is_traced(step, self._every):
            self._step = step
        if self._step:
            self._phases.append((phase, time.time_ns()))

    def end(self) -> None:
        """Send the spans of the step that runs, if it is traced."""
        if not self._step:
            return
        trace, phases = StepTrace(self._run_id, self._start, self._step), self._phases
        self._step, self._phases = 0, []
        ended = max(time.time_ns(), phases[-1][1])
        own: tuple[object, ...] = ("rank", self._rank)
        common: Attributes = {"switokd.run": self._run_id, "switokd.step": trace.step}
        more: Attributes = {
            **common,
            "switokd.rank": self._rank,
            "switokd.networks": self._networks,
        }
        spans = [Span(f"rank {self._rank}", own, ROOT, phases[0][1], ended, more)]
        ends = [*(began for _, began in phases[1:]), ended]
        for number, ((phase, began), end) in enumerate(zip(phases, ends, strict=True)):
            spans.append(Span(phase.value, (*own, number), own, began, max(began, end), more))
        if self._rank == 0:
            about: Attributes = {**common, "switokd.start": self._start}
            spans.append(Span("step", ROOT, None, phases[0][1], ended, about))
        self._sink.send(trace, spans)


@contextmanager
def listening(spans: StepSpans) -> Iterator[None]:
    """Let `spans` listen to this process's phases in the block."""
    ACTIVITY.listener = spans
    try:
        yield
    finally:
        ACTIVITY.listener = None
        spans.end()
