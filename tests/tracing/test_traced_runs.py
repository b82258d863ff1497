"""Traces of whole runs: a real collector's interface, real ranks, a real coordinator.

Not covered: collectors of others, such as Jaeger, which take the same messages.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support import run, switokd_train
from tests.tracing.collector import Received, collector

SETTINGS = ("schedule.max_steps=6", "run_dir=out", "coordinator.deadline=30")
"""On a busy machine a rank must not decide alone: its step would end before the round."""
PHASES = ["loading", "forward", "exchange", "deciding", "backward"]


@pytest.mark.timeout(120)
def test_a_step_of_three_ranks_and_the_coordinator_is_one_trace(tmp_path: Path) -> None:
    with collector() as received:
        command = switokd_train(3, "digits-2t1s", *SETTINGS, "tracking.traces_every=3")
        code, _, err = run(command, tmp_path, 110, OTEL_EXPORTER_OTLP_ENDPOINT=received.url)
    assert code == 0, err
    assert "traces" not in err
    by_trace: dict[bytes, list[Received]] = defaultdict(list)
    for span in received.spans:
        by_trace[span.trace].append(span)
    steps = sorted({span.attributes["switokd.step"] for span in received.spans})
    assert (steps, len(by_trace)) == ([3, 6], 2)
    for spans in by_trace.values():
        check_trace(spans)


def check_trace(spans: list[Received]) -> None:
    """All ranks and the coordinator, each span inside its parent, phases one after another."""
    assert len({span.id for span in spans}) == len(spans)
    assert len({(s.attributes["switokd.run"], s.attributes["switokd.step"]) for s in spans}) == 1
    by_id = {span.id: span for span in spans}
    (root,) = (span for span in spans if not span.parent)
    assert (root.name, root.service) == ("step", "switokd-rank")
    (round_,) = (span for span in spans if span.service == "switokd-coordinator")
    assert (round_.name, round_.parent) == ("round", root.id)
    assert len(round_.attributes["switokd.modes"]) == 2
    ranks = {span.name: span for span in spans if span.parent == root.id and span is not round_}
    assert sorted(ranks) == ["rank 0", "rank 1", "rank 2"]
    assert [ranks[f"rank {r}"].attributes["switokd.networks"] for r in range(3)] == [
        ["teacher1"],
        ["teacher2"],
        ["student"],
    ]
    assert (root.start, root.end) == (ranks["rank 0"].start, ranks["rank 0"].end)
    for rank in ranks.values():
        phases = sorted((s for s in spans if s.parent == rank.id), key=lambda s: s.start)
        names = [phase.name for phase in phases]
        if rank is not ranks["rank 2"] and "backward" not in names:
            names.append("backward")  # a teacher that was paused
        assert names[: len(PHASES)] == PHASES
        for before, after in pairwise(phases):
            assert before.end == after.start
        assert (phases[0].start, phases[-1].end) == (rank.start, rank.end)
        # One clock, but the coordinator's begin is reckoned from its end.
        exchange = phases[PHASES.index("exchange")]
        assert rank.start < exchange.end <= round_.end <= rank.end or rank is ranks["rank 2"]
    assert max(r.start for r in ranks.values()) < min(r.end for r in ranks.values())
    assert all(by_id[span.parent] for span in spans if span.parent)
