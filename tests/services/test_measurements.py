"""What ranks send for the metrics: impossible numbers count as not sent, and names are checked."""

from __future__ import annotations

import math

import pytest

from switokd.services.coordinator.measurements import (
    Measured,
    RunMeasured,
    Used,
    host_of,
    measured_from_wire,
    network_of,
    run_measured_from_wire,
    used_from_wire,
)
from switokd.v1 import coordinator_pb2 as pb
from tests.services.examples import PLAN, refusal

TASK, PEER, COMBINED = (
    pb.LossTerm.KIND_TASK,
    pb.LossTerm.KIND_PEER,
    pb.LossTerm.KIND_COMBINED,
)


def test_a_progress_comes_with_all_its_numbers() -> None:
    message = pb.Progress(
        samples=8,
        loss=-0.5,
        accuracy=0.25,
        test_accuracy=1.0,
        learning_rate=0.1,
        gradient_norm=1e30,
        loss_terms=[
            pb.LossTerm(kind=TASK, value=1.0),
            pb.LossTerm(kind=PEER, peer="a", value=0.5),
            pb.LossTerm(kind=COMBINED, peer="x", value=0.25),
            pb.LossTerm(kind=COMBINED, value=0.25),
        ],
        training_seconds=2.0,
        learning_seconds=1.0,
        learned_steps=3,
        paused_steps=1,
    )
    terms = {("task", ""): 1.0, ("distillation", "a"): 0.5, ("combined", ""): 0.5}
    expected = Measured(8, -0.5, 0.25, 1.0, 0.1, 1e30, terms, 2.0, 1.0, 3, 1)
    assert measured_from_wire(message, PLAN, 0) == expected


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e300])
def test_an_impossible_number_counts_as_not_sent(number: float) -> None:
    message = pb.Progress(
        samples=-3,
        loss=number,
        accuracy=number,
        test_accuracy=number,
        learning_rate=number,
        gradient_norm=number if number != 1e300 else -1.0,
        loss_terms=[pb.LossTerm(kind=TASK, value=number), pb.LossTerm(value=1.0)],
        training_seconds=number,
        learning_seconds=-1.0,
        learned_steps=2**62,
        paused_steps=-1,
    )
    assert measured_from_wire(message, PLAN, 0) == Measured()


def test_a_network_that_the_run_does_not_have_is_refused() -> None:
    assert network_of(pb.Progress(), PLAN, 2) == "s"
    kind, reason = refusal(lambda: network_of(pb.Progress(network="ghost"), PLAN, 0))
    assert (kind, "'ghost'" in reason) == ("INVALID_ARGUMENT", True)
    terms = [pb.LossTerm(kind=PEER, peer="ghost")]
    kind, reason = refusal(lambda: measured_from_wire(pb.Progress(loss_terms=terms), PLAN, 1))
    assert kind == "INVALID_ARGUMENT"
    assert reason == "rank 1 (b) sends the progress of 'ghost', which the run does not have"


def test_what_rank_0_says_of_the_run() -> None:
    message = pb.RunProgress(training_epoch=2, skipped_steps=1, checkpoints=4, planned_steps=90)
    message.planned_epochs = 3
    assert run_measured_from_wire(message) == RunMeasured(2, 1, 4, 90, 3)
    wrong = pb.RunProgress(training_epoch=-1, skipped_steps=2**63 - 1, checkpoints=-(2**63))
    wrong.planned_steps = wrong.planned_epochs = -1
    assert run_measured_from_wire(wrong) == RunMeasured()


def test_what_a_process_uses() -> None:
    phases = [pb.PhaseTime(phase=pb.PHASE_FORWARD, seconds=1.5)]
    unknown = pb.PhaseTime(phase=99, seconds=1.0)  # type: ignore[arg-type]
    wrong = pb.PhaseTime(phase=pb.PHASE_SAVING, seconds=math.nan)
    message = pb.Usage(phases=[*phases, unknown, wrong], memory_bytes=7, gpu_memory_bytes=0)
    assert used_from_wire(message) == Used({"forward": 1.5, "saving": 0.0}, 7, 0, None)
    assert used_from_wire(pb.Usage(memory_bytes=-1)) == Used({}, None, None, None)


def test_the_name_of_a_machine_is_cut_and_cleaned() -> None:
    assert host_of(pb.Attach(host="node-1\n# HELP" + "x" * 100)) == "node-1 # HELP" + "x" * 51
