"""What the coordinator says of its runs when it is asked.

Nothing here takes the event loop for longer than about a millisecond: large runs and long lists
are described in parts, and the journal is read by its own thread. Watchers of a run share each
status.

Not covered: authorisation (`servicer.py`), the metrics (`metrics.py`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator

from switokd.services.coordinator.finished import FinishedRun
from switokd.services.coordinator.limits import exceeded
from switokd.services.coordinator.refusal import Refusal
from switokd.services.coordinator.registry import RunRegistry
from switokd.services.coordinator.run_entry import RunEntry
from switokd.services.coordinator.status import ranks_to_wire, run_to_wire, summary_to_wire
from switokd.v1 import coordinator_pb2 as pb

SHORTEST_INTERVAL, DEFAULT_INTERVAL, LONGEST_INTERVAL = 0.1, 1.0, 3600.0
"""Seconds between two messages to a watcher."""
LOOK_SECONDS = 0.1
"""How soon a watcher hears of the end of its run."""
MOST_RUNS = 1000
"""Runs in one answer of ListRuns."""
RUNS_AT_ONCE = 10
"""Runs that are described at once."""
JOURNAL_SECONDS = 5.0
"""How long an answer may wait for the journal, whose disk may be slow."""


class Views:
    """Answers about the runs of one coordinator. Methods raise Refusal."""

    def __init__(self, runs: RunRegistry) -> None:
        self._runs = runs
        self._watchers = 0
        self._shared: dict[str, tuple[float, bytes]] = {}
        """By watched run: when its last status was made, and the serialized message."""

    async def runs(self, with_finished: bool, page_size: int) -> pb.ListRunsResponse:
        """Return the runs, those that started last first.

        with_finished: also finished runs that only the journal has. page_size: the most runs; 0
        means `MOST_RUNS`.
        """
        most = min(page_size, MOST_RUNS) if page_size > 0 else MOST_RUNS
        found: list[pb.RunSummary] = []
        for count, entry in enumerate(list(self._runs.entries.values()), 1):
            found.append(summary_to_wire(entry.run, entry.times))
            if count % RUNS_AT_ONCE == 0:
                await asyncio.sleep(0)
        if with_finished:
            known = {run.run_id for run in found}
            kept = await self._finished("", most + 1)
            found += [run.summary() for run in kept if run.run_id not in known]
        found.sort(key=lambda run: -run.started_at)
        return pb.ListRunsResponse(runs=found[:most], truncated=len(found) > most)

    async def status(self, run_id: str) -> pb.GetRunStatusResponse:
        """Describe a run; Refusal if neither this coordinator nor its journal has it."""
        entry = self._runs.entries.get(run_id)
        if entry is not None:
            return await self._status(entry)
        for run in await self._finished(run_id, 1):
            return run.status
        self._runs.find(run_id)  # it may have joined meanwhile
        return await self._status(self._runs.find(run_id))

    async def watch(self, run_id: str, interval: float) -> AsyncIterator[bytes]:
        """Yield the serialized WatchRunResponse of a run until the run has ended.

        interval: seconds between two messages; 0 means one second.
        """
        if not 0 <= interval < math.inf:
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"interval_seconds must be 0 or more seconds, got {interval}",
            )
        if self._watchers >= (most := self._runs.limits.max_watchers):
            raise exceeded(f"{most} callers watch runs", "max_watchers", most)
        seconds = min(max(interval or DEFAULT_INTERVAL, SHORTEST_INTERVAL), LONGEST_INTERVAL)
        self._watchers += 1
        try:
            async for message in self._watch(run_id, seconds):
                yield message
        finally:
            self._watchers -= 1

    async def _watch(self, run_id: str, seconds: float) -> AsyncIterator[bytes]:
        entry = self._runs.entries.get(run_id)
        while entry is not None and entry.run.ended_at is None:
            yield await self._message(entry)
            entry = await self._wait(entry, seconds)
        if entry is not None:
            yield _watched(await self._status(entry))
        else:  # it ended before, or its entry is gone already
            yield _watched(await self.status(run_id))

    async def _wait(self, entry: RunEntry, seconds: float) -> RunEntry | None:
        """Wait between two messages, or until the run has ended; return the run's entry then.

        A new start of the run's processes has a new entry.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and entry.run.ended_at is None:
            if self._runs.is_draining:
                raise Refusal(Refusal.Kind.UNAVAILABLE, "the coordinator stops")
            await asyncio.sleep(min(left, LOOK_SECONDS))
        return self._runs.entries.get(entry.run.run_id, entry)

    async def _message(self, entry: RunEntry) -> bytes:
        """Return the serialized status of a run, which several watchers may share."""
        run_id, now = entry.run.run_id, time.monotonic()
        made_at, message = self._shared.get(run_id, (-math.inf, b""))
        if now - made_at > SHORTEST_INTERVAL / 2:
            message = _watched(await self._status(entry))
            self._shared[run_id] = now, message
            for old in [name for name in self._shared if name not in self._runs.entries]:
                del self._shared[old]
        return message

    async def _status(self, entry: RunEntry) -> pb.GetRunStatusResponse:
        run = entry.run
        status = run_to_wire(run, entry.metrics, entry.times, self._runs.recorded(run))
        for ranks in ranks_to_wire(run):
            status.ranks.extend(ranks)
            await asyncio.sleep(0)
        return status

    async def _finished(self, run_id: str, most: int) -> list[FinishedRun]:
        reading = asyncio.wrap_future(self._runs.journal.finished(run_id, most))
        try:
            return await asyncio.wait_for(reading, JOURNAL_SECONDS)
        except asyncio.TimeoutError:
            raise Refusal(
                Refusal.Kind.UNAVAILABLE,
                f"the journal does not answer within {JOURNAL_SECONDS:g} s: is its disk full?",
            ) from None


def _watched(status: pb.GetRunStatusResponse) -> bytes:
    return pb.WatchRunResponse(status=status).SerializeToString()
