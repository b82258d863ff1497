"""Names and sentences of others, and lines of the log."""

from __future__ import annotations

import logging

import pytest

from switokd.services.coordinator.logs import LineFormatter, RateFilter
from switokd.services.coordinator.text import MOST_BYTES, listed, sentence


@pytest.mark.parametrize("text", ["x" * 9000, "ß" * 3000, "\U0001f600" * 3000, "\n" * 9000])
def test_a_sentence_has_a_length_in_characters_and_in_bytes(text: str) -> None:
    for characters in (10, 1000, 9000):
        short = sentence(text, characters)
        assert short.isprintable()
        assert len(short) <= characters + 10
        assert len(short.encode()) <= MOST_BYTES + 10
        assert short.endswith("... (cut)")
        assert "\ufffd" not in short


def test_a_short_sentence_stays() -> None:
    assert sentence("rank 1 (b) stopped: naïve", 100) == "rank 1 (b) stopped: naïve"
    assert sentence("a\tb\r\nc\x1b[0m") == "a b  c [0m"
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def record(text: str, *values: object) -> logging.LogRecord:
    return logging.LogRecord("switokd", logging.INFO, "file", 1, text, values, None)


def test_a_record_is_one_line_without_control_characters() -> None:
    formatter = LineFormatter("%(levelname)s %(message)s")
    forged = "r\n2026-01-01 INFO all is well\x1b[2J\u2028"
    line = formatter.format(record("run %s: new", forged))
    assert line == "INFO run r | 2026-01-01 INFO all is well [2J | : new"
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        failed = record("stream failed")
        failed.exc_info = (ValueError, error, error.__traceback__)
    line = formatter.format(failed)
    assert line.isprintable()
    assert line.startswith("INFO stream failed | Traceback")
    assert len(formatter.format(record("x" * 9000))) < 4100


def test_lines_of_a_kind_are_left_out_and_counted() -> None:
    now = [0.0]
    rate = RateFilter(2, clock=lambda: now[0])
    shown = [rate.filter(record("run %s: new", i)) for i in range(10)]
    assert shown == [True, True, *[False] * 8]
    assert rate.filter(record("another kind"))
    now[0] = 1.0
    last = record("run %s: new", 10)
    assert rate.filter(last)
    assert last.getMessage() == "run 10: new (8 more lines like this were left out)"
    now[0] = 2.0
    last = record("run %s: new", 11)
    assert rate.filter(last)
    assert last.getMessage() == "run 11: new"
