"""switokd against the plain loop: same networks, first weights, batches, steps, losses and rule.

Ours is run as a user would, `switokd train`, on all cores, once in each of several configurations,
the fastest of them also compiled; the best is then measured in turn with the plain loop, which has
a process of its own and all cores as well (`plain.py`). Rounding makes decisions differ in time,
hence the paused shares beside each figure, and a figure with `dml`, where nobody pauses.

With two students the plain side follows the published code, whose teacher never pauses: it computes
on with a loss of 0; ours pauses.

For `plain_*` each network sees whole batches, as in the plain loop; for `unequal_fp32` it may be
sharded, with BatchNorm's statistics by shard.

Not covered: accuracies; a plain loop that is compiled or channels_last.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench import runs
from bench.figures import Figure, Say
from bench.in_process import ONE_PROCESS, configured
from bench.machine import cores

LARGE = "wrn-16-2"
EQUAL = {
    "2T1S": {"t1": ("teacher", LARGE), "t2": ("teacher", LARGE), "s": ("student", LARGE)},
    "1T1S": {"t1": ("teacher", LARGE), "s": ("student", LARGE)},
    "1T2S": {"t1": ("teacher", LARGE), "s1": ("student", LARGE), "s2": ("student", LARGE)},
}
UNEQUAL = {
    "t1": ("teacher", "wrn-16-4"),
    "t2": ("teacher", "wrn-16-1"),
    "s": ("student", "mobilenet-0.5"),
}

Networks = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Candidate:
    """One configuration of ours."""

    name: str
    settings: Mapping[str, Any]
    processes: int | None = None

    def compiled(self) -> Candidate:
        """The same with torch.compile."""
        settings = {**self.settings, "compute": {"compile": True}}
        return Candidate(f"{self.name}, compiled", settings, self.processes)


@dataclass(frozen=True)
class Case:
    """One comparison."""

    figure: str
    networks: Networks
    candidates: tuple[Candidate, ...]
    """Empty: what was best for the first case."""
    target: float | None = None
    precision: str = "fp32"
    strategy: str = "switokd"

    def run_file(self, steps: int) -> dict[str, Any]:
        """Ours, but for where the networks are and how they compute."""
        return runs.run_file(self.networks, steps, distillation={"strategy": self.strategy})

    def ours(self, candidate: Candidate, steps: int) -> runs.Record:
        """Train in one configuration."""
        compute = {"precision": self.precision, **candidate.settings.get("compute", {})}
        config = {**self.run_file(steps), **candidate.settings, "compute": compute}
        return runs.train(config, candidate.processes)


WHOLE = (
    Candidate("one process", ONE_PROCESS, 1),
    Candidate("a rank per network", {"placement": "dedicated"}),
)
"""Configurations in which each network sees whole batches."""


def anywhere() -> tuple[Candidate, ...]:
    """Those, and others for unequal networks."""
    first, *rest = UNEQUAL
    alone = {first: [0], **{name: [1] for name in rest}}
    return (
        *WHOLE,
        Candidate("two ranks, the largest alone", {"placement": alone}),
        Candidate("replicated, a rank per core", {"placement": "replicated"}, cores()),
    )


def cases(quick: bool) -> list[Case]:
    """All comparisons; the first is plain_fp32."""
    two_one = EQUAL["2T1S"]
    first = [
        Case("plain_fp32", two_one, WHOLE[1:] if quick else WHOLE, 1.5),
        Case("plain_bf16", two_one, WHOLE[1:] if quick else WHOLE, 3.0, "bf16"),
        Case("unequal_fp32", UNEQUAL, WHOLE[1:] if quick else anywhere(), 1.3),
    ]
    more = [
        Case("plain_fp32_dml", two_one, (), strategy="dml"),
        Case("plain_fp32_1t1s", EQUAL["1T1S"], ()),
        Case("plain_fp32_1t2s", EQUAL["1T2S"], ()),
    ]
    return first if quick else first + more


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give plain_fp32, plain_bf16, unequal_fp32 and their siblings, each as soon as it is there."""
    steps, best = (3 if quick else 10), WHOLE[0]
    for case in cases(quick):
        rounds = 1 if quick else 3 if case.target else 2
        tried: dict[str, float] = {}
        chosen = fastest(case, steps, tried, say) if case.candidates else best
        if case.figure == "plain_fp32":
            best = chosen
        yield compare(case, chosen, steps, rounds, tried, say)


def fastest(case: Case, steps: int, tried: dict[str, float], say: Say) -> Candidate:
    """The candidate that is fastest in one run, then perhaps compiled; fills `tried`."""
    if len(case.candidates) == 1:
        return case.candidates[0]

    def seconds(candidate: Candidate) -> float:
        say(f"{case.figure}: trying {candidate.name}")
        tried[candidate.name] = case.ours(candidate, steps).step_seconds
        return tried[candidate.name]

    return min((best := min(case.candidates, key=seconds)), best.compiled(), key=seconds)


def compare(
    case: Case, best: Candidate, steps: int, rounds: int, tried: dict[str, float], say: Say
) -> Figure:
    """Ours and plain in turn."""
    pairs, paused = [], []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.pt"
        torch.save(plain_inputs(case.run_file(steps)), inputs)
        for i in range(rounds):
            say(f"{case.figure}: round {i + 1} of {rounds}, {best.name} against plain")
            theirs, theirs_paused = plain(inputs, steps)
            record = case.ours(best, steps)
            pairs.append((theirs, record.step_seconds))
            paused.append((theirs_paused, record.paused))
    return Figure.of_pairs(
        case.figure,
        pairs,
        target=case.target,
        what=f"plain fp32 loop's seconds per step over ours ({case.precision}, {best.name}), "
        + ", ".join(model for _, model in case.networks.values()),
        details={
            "configuration": best.name,
            "tried_seconds_per_step": tried,
            "paused_plain_and_ours": paused,
            "batch_size": runs.BATCH,
            "steps": steps,
            "strategy": case.strategy,
        },
    )


def plain_inputs(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the plain loop needs to train as ours does: first weights, batches, roles."""
    from switokd.data import open_images
    from switokd.setup import make_model

    made = configured(config)
    images = open_images(made.data, made.seed)
    stream = images.stream(made.schedule.epochs * images.steps_per_epoch)
    return {
        "roles": {name: network.role for name, network in made.networks.items()},
        "models": {name: network.model for name, network in made.networks.items()},
        "weights": {name: make_model(made, name, images).state_dict() for name in made.networks},
        "batches": list(stream),
        "classes": images.classes,
        "lr": {name: network.optimizer.lr for name, network in made.networks.items()},
        "strategy": made.distillation.strategy,
    }


def plain(inputs: Path, warm_up: int) -> tuple[float, float]:
    """Seconds per step after `warm_up`, and the share of the teachers' steps that were paused."""
    command = [sys.executable, "-m", "bench.plain", str(inputs), str(cores())]
    trace = json.loads(runs.output(command, seconds=600))
    roles = torch.load(inputs, weights_only=True)["roles"]
    teachers = sum(role == "teacher" for role in roles.values())
    paused = sum(len(names) for names in trace["paused"]) / (teachers * len(trace["paused"]))
    return mean(trace["seconds"][warm_up:]), paused
