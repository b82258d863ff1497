"""Opens what sends spans, if traces are asked for and the extra `otel` is installed.

Not covered: the sending itself (`otlp.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from switokd.errors import UsageError, summary
from switokd.tracing.spans import SpanSink


def is_installed() -> bool:
    """Whether the extra `otel` is installed; imports nothing of it."""
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ImportError:  # not even the packages that would hold it
        return False


@contextmanager
def open_sender(service: str, setting: str, say: Callable[[str], None]) -> Iterator[SpanSink]:
    """Yield what sends spans; its last ones are sent at the end.

    service, say: as in `SpanSender`. setting: what asks for traces, for messages. UsageError if
    OpenTelemetry is not installed, or if its environment variables cannot be used.
    """
    try:
        from switokd.tracing.otlp import SpanSender
    except ImportError as error:
        raise UsageError(
            f"{setting}: OpenTelemetry cannot be imported ({summary(error)}); pip install "
            "'switokd[otel]', or switch the traces off"
        ) from None
    try:
        sender = SpanSender(service, say)
    except (ValueError, OSError) as error:
        raise UsageError(
            f"{setting}: OpenTelemetry's environment variables (OTEL_...) cannot be used: "
            f"{summary(error)}"
        ) from None
    try:
        yield sender
    finally:
        sender.close()
