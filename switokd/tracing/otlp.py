"""Sends spans to an OpenTelemetry collector, over OTLP/HTTP.

OpenTelemetry's environment variables say where to, such as OTEL_EXPORTER_OTLP_ENDPOINT. Only
processes that trace import this module, because OpenTelemetry is the extra `otel`.

Not covered: OTLP over gRPC, which would need a second gRPC client in a process that may fork.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from switokd.tracing.spans import Span, StepTrace

END_SECONDS = 2.0
"""How long the end of a process waits until its last spans are sent."""
DEFAULT_URL = "http://localhost:4318"
"""OpenTelemetry's own, if no environment variable names an endpoint."""
SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class SpanSender:
    """Queues spans; a thread of its own sends them.

    service: the process's name in the traces, unless OTEL_SERVICE_NAME names another. say:
    receives one sentence, once, if spans cannot be delivered. ValueError or OSError if an
    environment variable of OpenTelemetry cannot be used.
    """

    def __init__(self, service: str, say: Callable[[str], None]) -> None:
        _silence()
        _use_own_random_numbers()
        name = os.environ.get("OTEL_SERVICE_NAME") or service
        self._ids = GivenIds()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # the steps are chosen already
            resource=Resource.create().merge(Resource({SERVICE_NAME: name})),
            shutdown_on_exit=False,  # it would wait for half a minute
            id_generator=self._ids,
        )
        self._exporter = TellingExporter(OTLPSpanExporter(), say)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("switokd")

    def send(self, trace: StepTrace, spans: Sequence[Span]) -> None:
        """Queue spans of one trace; does not wait. If too many wait, the oldest are lost."""
        for span in spans:
            # Not the current context: a program that trains may have traces of its own.
            context = Context()
            if span.parent is not None:
                number = trace.span_id(span.parent)
                parent = SpanContext(trace.trace_id, number, is_remote=True, trace_flags=SAMPLED)
                context = set_span_in_context(NonRecordingSpan(parent), context)
            self._ids.trace_id, self._ids.span_id = trace.trace_id, trace.span_id(span.path)
            begun = self._tracer.start_span(
                span.name, context, attributes=span.attributes, start_time=span.started
            )
            begun.end(span.ended)

    def close(self) -> None:
        """Send what is queued. Wait for it, `END_SECONDS` at most, if earlier spans were taken."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True, name="last spans")
        last.start()
        last.join(0 if self._exporter.has_failed else END_SECONDS)


class GivenIds(IdGenerator):
    """Returns the numbers that were set last, instead of random ones."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        """Return `trace_id`."""
        return self.trace_id

    def generate_span_id(self) -> int:
        """Return `span_id`."""
        return self.span_id


class TellingExporter(SpanExporter):
    """Hands spans to another exporter; tells the user once if they cannot be delivered."""

    def __init__(self, exporter: SpanExporter, say: Callable[[str], None]) -> None:
        self._exporter, self._say = exporter, say
        self.has_failed = False
        """Whether spans were ever lost."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Deliver spans; they are lost if that fails, also after the exporter's own attempts."""
        try:
            result = self._exporter.export(spans)
        except Exception:  # such as an address that is none
            result = SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS and not self.has_failed:
            self.has_failed = True
            self._say(
                f"traces cannot be delivered to {endpoint()}, and are lost: an OpenTelemetry "
                "collector must take OTLP over HTTP there, or OTEL_EXPORTER_OTLP_ENDPOINT name "
                "another; nothing else depends on them"
            )
        return result

    def shutdown(self) -> None:
        """Give up what is being delivered."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Return whether nothing waits in the exporter."""
        return self._exporter.force_flush(timeout_millis)


def endpoint() -> str:
    """Return where spans are sent, as OpenTelemetry's environment variables say it."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next((os.environ[name] for name in names if os.environ.get(name)), DEFAULT_URL)


def _use_own_random_numbers() -> None:
    """Give OpenTelemetry's exporters a generator of their own for the pauses between attempts.

    They draw from Python's at every delivery, on another thread. The augmentation of a user's own
    may draw there as well, and a run must not depend on its traces.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("opentelemetry.exporter.") and vars(module).get("random") is random:
            setattr(module, "random", random.Random())  # noqa: B010 no attribute for mypy


def _silence() -> None:
    """Let OpenTelemetry log nothing by itself, unless the program has set its level."""
    logger = logging.getLogger("opentelemetry")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)
