"""What the status page shows, as JSON. Threads of the HTTP server ask; the event loop answers.

All readers of a run share its last document for a moment, so that many cost no more than one.

Not covered: which request gets which document (`pages.py`).
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from switokd.services.coordinator.history import RunHistory
from switokd.services.coordinator.journal_history import fill_history
from switokd.services.coordinator.messages import plan_from_wire
from switokd.services.coordinator.reasons import reasons
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.run_view import status_view, summary_view
from switokd.services.coordinator.views import Views
from switokd.v1 import coordinator_pb2 as pb
from switokd.wire import decision_from_wire

ANSWER_SECONDS = 8.0
"""How long the event loop, and its journal, may take to answer."""
STATUS_SECONDS, RUNS_SECONDS = 0.4, 1.0
"""How long documents of one run, and of all, are shared."""
MOST_RUNS = 500
"""Runs of the list."""
MOST_RANKS = 256
"""Ranks of a document: those that are waited for or lag come first."""
MOST_COMMANDS = 100
MOST_FINISHED = 8
"""Histories of finished runs that are kept, since a reader asks for parts of one."""
T = TypeVar("T")


class Documents:
    """Documents about the runs of one coordinator. Methods raise Refusal."""

    def __init__(self, runs: RunRegistry, loop: asyncio.AbstractEventLoop) -> None:
        self._runs, self._loop, self._views = runs, loop, Views(runs)
        self._lock = threading.Lock()
        self._shared: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        """By run, "" for the list: until when its document is shared, and the document."""
        self._finished_lock = threading.Lock()
        self._finished: OrderedDict[tuple[str, int, float], RunHistory] = OrderedDict()

    def runs(self) -> bytes:
        """Return the list of runs, the newest first."""
        if found := self._fresh(""):
            return found
        listed = self._ask(self._views.runs(True, MOST_RUNS))
        document = {
            "runs": [_shown(summary_view(run, "")) for run in listed.runs],
            "truncated": listed.truncated,
        }
        return self._share("", document, RUNS_SECONDS)

    def status(self, run_id: str, is_over: bool = False) -> bytes:
        """Return what a run does now; Refusal if there is no such run.

        is_over: the run has ended; what was made before does not do.
        """
        if not is_over and (found := self._fresh(run_id)):
            return found
        status = self._ask(self._views.status(run_id))
        document = status_document(run_id, status, time.time())
        return self._share(run_id, document, STATUS_SECONDS)

    def history(self, run_id: str) -> RunHistory:
        """Return what a run has done; Refusal if there is no such run."""
        if entry := self._runs.entries.get(run_id):
            return entry.history
        status = self._ask(self._views.status(run_id))
        key = run_id, status.epoch, status.ended_at
        with self._finished_lock:  # one at a time reads the journal
            history = self._finished.pop(key, None)
            if history is None:
                history = RunHistory(plan_from_wire(status.plan))
                fill_history(self._runs.journal.path, run_id, history)
            self._finished[key] = history
            while len(self._finished) > MOST_FINISHED:
                self._finished.popitem(last=False)
        return history

    def has_ended(self, run_id: str) -> bool:
        """Whether a run has ended, as far as is known without asking."""
        entry = self._runs.entries.get(run_id)
        return entry is None or entry.run.ended_at is not None

    def _fresh(self, key: str) -> bytes:
        """Return a shared document; empty if there is none that is fresh."""
        with self._lock:
            until, document = self._shared.get(key, (0.0, b""))
            return document if time.monotonic() < until else b""

    def _share(self, key: str, document: dict[str, Any], seconds: float) -> bytes:
        made = encoded(document)
        with self._lock:
            self._shared[key] = time.monotonic() + seconds, made
            self._shared.move_to_end(key)
            while len(self._shared) > 32:
                self._shared.popitem(last=False)
        return made

    def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        """Let the event loop answer; Refusal if it does not."""
        try:
            answer = asyncio.run_coroutine_threadsafe(question, self._loop)
        except RuntimeError:  # the loop has ended
            question.close()
            raise Refusal(Refusal.Kind.UNAVAILABLE, "the coordinator stops") from None
        try:
            return answer.result(ANSWER_SECONDS)
        except FutureTimeoutError:
            answer.cancel()
            raise Refusal(
                Refusal.Kind.UNAVAILABLE,
                f"the coordinator does not answer within {ANSWER_SECONDS:g} s",
            ) from None


def encoded(document: Any) -> bytes:
    """Return JSON; a number that JSON cannot hold becomes null."""
    try:
        text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(document), separators=(",", ":"))
    return text.encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def status_document(run_id: str, status: pb.GetRunStatusResponse, now: float) -> dict[str, Any]:
    """Return the document of a run. now: seconds since 1970.

    Its keys are those of `switokd status --json`; `ranks_left_out` counts ranks that are not shown.
    """
    document = _shown(status_view(run_id, status, ""))
    ranks = document["ranks"]
    if len(ranks) > MOST_RANKS:
        ranks.sort(key=lambda rank: (not rank["is_waited_for"], -rank["lag_steps"], rank["rank"]))
        document["ranks"] = sorted(ranks[:MOST_RANKS], key=lambda rank: rank["rank"])
    document["ranks_left_out"] = len(ranks) - len(document["ranks"])
    document["rank_count"] = len({r for n in status.plan.networks for r in n.ranks})
    document["connected_ranks"] = len(document["connected_ranks"])
    if status.last_decision.pairs:
        teachers = [n["name"] for n in document["networks"] if n["role"] == "teacher"]
        decision = decision_from_wire(status.last_decision)
        why = dict(zip(teachers, reasons(decision, teachers), strict=True))
    else:
        why = {}
    for network in document["networks"]:
        network["reason"] = why.get(network["name"])
    document["commands"] = document["commands"][-MOST_COMMANDS:]
    document["waiting_for"] = document["waiting_for"][:MOST_RANKS]
    document["semantics"] = status.plan.semantics
    for network in document["networks"]:
        network["ranks"] = network["ranks"][:MOST_RANKS]
    document["now"] = now
    return document


def _shown(view: dict[str, Any]) -> dict[str, Any]:
    """Remove what a reader of this coordinator's own page knows."""
    view.pop("coordinator", None)
    view.pop("folder", None)
    return view
