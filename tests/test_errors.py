"""Errors: which ranks raise them, and how they travel between ranks."""

from __future__ import annotations

import pickle

import pytest

from switokd.errors import (
    CollectiveError,
    NonFiniteError,
    PeerError,
    SwitokdError,
    UsageError,
    first_line,
)


@pytest.mark.parametrize(
    ("kind", "default"), [(UsageError, True), (NonFiniteError, True), (PeerError, False)]
)
def test_an_argument_overrides_the_default_of_the_class(
    kind: type[SwitokdError], default: bool
) -> None:
    assert kind("message").seen_by_every_rank is default
    assert kind("message", every_rank=not default).seen_by_every_rank is not default


def test_a_key_of_the_run_file_is_named_once() -> None:
    error = UsageError("no model 'x'", every_rank=False)
    named = error.under("networks.t")
    assert (str(error), str(named)) == ("no model 'x'", "networks.t: no model 'x'")
    assert (type(named), named.seen_by_every_rank) == (UsageError, False)
    assert str(named.under("networks.t")) == str(named)
    assert str(UsageError("networks.t.weights: gone").under("networks.t")).count("networks") == 1
    other = "networks.t-2.weights: gone"
    assert str(UsageError(other).under("networks.t")) == f"networks.t: {other}"


def test_a_copy_has_the_cause_whose_frames_verbose_shows() -> None:
    error = UsageError("message")
    error.__cause__ = KeyError("cause")
    assert error.under("networks.t").__cause__ is error.__cause__
    assert error.seen_by(every_rank=False).__cause__ is error.__cause__


def test_a_copy_for_other_ranks_leaves_the_error_unchanged() -> None:
    error = UsageError("message")
    copy = error.seen_by(every_rank=False)
    assert (type(copy), str(copy), copy.seen_by_every_rank) == (UsageError, "message", False)
    assert error.seen_by_every_rank


@pytest.mark.parametrize(
    "error", [UsageError("message", every_rank=False), CollectiveError("waiting", "timeout")]
)
def test_an_error_can_be_sent_to_other_ranks(error: SwitokdError) -> None:
    received = pickle.loads(pickle.dumps(error))
    assert type(received) is type(error)
    assert str(received) == str(error)
    assert vars(received) == vars(error)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("no image in <_io.BufferedReader name='/d/my <1>.png'>", "no image in '/d/my <1>.png'"),
        ("no image in <_io.TextIOWrapper name=4 mode='r' encoding='utf-8'>", "no image in 4"),
        ("<_io.BytesIO object at 0x7f3a> is no image", "a file in memory is no image"),
        ("", "OSError"),
    ],
)
def test_first_line_names_a_file_object_by_its_file(message: str, expected: str) -> None:
    assert first_line(OSError(message + "\nmore" if message else message)) == expected
