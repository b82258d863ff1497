"""What the traces of a run are made of: one trace per traced step, from all processes of the run.

Every rank and the coordinator derive a trace's numbers from run, start and step alone. Their spans
therefore belong to one trace, and no message has to say so. A hash makes the numbers, because
Python's random numbers belong to the training.

Not covered: sending (`otlp.py`); which spans there are (`runtime/step_spans.py`,
`services/coordinator/round_spans.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import NamedTuple, Protocol

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]

ROOT = ()
"""Path of the span that holds all others of a trace; rank 0 sends it."""


class StepTrace(NamedTuple):
    """The trace of one step; its numbers are the same in all processes of the run."""

    run_id: str
    start: int
    """How often the run's processes were started: a step that is repeated is another trace."""
    step: int

    @property
    def trace_id(self) -> int:
        """128 bits, as OpenTelemetry wants them."""
        return _number(16, *self)

    def span_id(self, path: Sequence[object]) -> int:
        """Return the 64 bits of a span. path: tells the spans of the trace apart."""
        return _number(8, *self, *path)


def _number(size: int, *parts: object) -> int:
    """Return a number of `size` bytes, not 0, that is always the same for the same parts."""
    digest = sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:size], "big") or 1


class Span(NamedTuple):
    """A part of a step's time."""

    name: str
    path: tuple[object, ...]
    parent: tuple[object, ...] | None
    """Path of the span that holds this one; None: this is the root."""
    started: int
    """Nanoseconds since 1970."""
    ended: int
    """Nanoseconds since 1970."""
    attributes: Attributes = MappingProxyType({})


class SpanSink(Protocol):
    """Where spans go."""

    def send(self, trace: StepTrace, spans: Sequence[Span]) -> None:
        """Take spans of one trace; does not wait."""


def is_traced(step: int, every: int) -> bool:
    """Whether a step is traced: one in `every` steps, the same in all processes; 0: none is."""
    return every > 0 and step % every == 0
