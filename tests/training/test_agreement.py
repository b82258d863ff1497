"""Ranks of one teacher that have applied different decisions are named in the next step.

Not covered: how they come to differ.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from switokd.distillation.decision import Decision, Mode, PairDecision
from switokd.distillation.gap import Distances
from switokd.distillation.topology import Pair
from switokd.errors import PeerError
from switokd.runtime.placement import Placement
from switokd.training.agreement import Agreement
from tests.preloaded import call, run_script

PAIRS = [Pair("t1", "s"), Pair("t2", "s")]
PLACEMENT = Placement.of({"t1": [0], "t2": [1, 2], "s": [0, 1, 2]})


def decision(pair: Pair, mode: Mode) -> Decision:
    of_pair = PairDecision(pair, Distances(0.5, 0.5, 0.5, 1), 1.0, 0.5, mode)
    return Decision(3, (of_pair,), (pair.teacher,) if mode is Mode.EXPERT else ())


def applied(teacher: int, mode: Mode) -> int:
    agreement = Agreement(PLACEMENT, PAIRS)
    pair = PAIRS[teacher]
    agreement.note({pair.teacher: decision(pair, mode)})
    return agreement.applied


def test_only_ranks_of_one_teacher_must_agree() -> None:
    agreement = Agreement(PLACEMENT, PAIRS)
    expert, learning = applied(1, Mode.EXPERT), applied(1, Mode.LEARNING)
    agreement.check(3, [applied(0, Mode.EXPERT), learning, learning])
    agreement.check(3, [applied(0, Mode.LEARNING), expert, expert])
    words = (
        "rank 1 (t2, s) and rank 2 (t2, s) have applied different decisions for t2 and s at step 3"
    )
    with pytest.raises(PeerError, match=re.escape(words)):
        agreement.check(3, [applied(0, Mode.EXPERT), expert, learning])


PARTED = """
import os
from dataclasses import replace
from switokd.distillation.decision import Mode
from switokd.coordination.client import Client
from switokd.cli.worker import worker_main

decide = Client.decide_early

def faulty(self, step, parts):
    decision = decide(self, step, parts)
    if step == 4 and os.environ["RANK"] == "1" and decision:
        self._check_early_decision = lambda decision: None
        first, last = decision.pairs
        other = Mode.LEARNING if last.mode is Mode.EXPERT else Mode.EXPERT
        # Not paused on either rank: only the weight of a loss differs.
        decision = replace(decision, pairs=(first, replace(last, mode=other)), paused=())
    return decision

Client.decide_early = faulty
worker_main()
"""


def test_a_run_ends_in_the_step_after_its_ranks_have_parted(tmp_path: Path) -> None:
    (tmp_path / "parted.py").write_text(PARTED)
    # With a threshold of 2 the teacher is never paused.
    words = ["digits-1t2s", "placement=replicated", "run_dir=out", "schedule.max_steps=9"]
    words.append("distillation={strategy: threshold, strategy_kwargs: {delta: 2}}")
    code, _, err = call(tmp_path, run_script, 2, "parted.py", tuple(words))
    assert code == 4, err
    assert "have applied different decisions for teacher and student2 at step 4" in err
