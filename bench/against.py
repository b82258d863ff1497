"""switokd against the plain loop: same networks, first weights, batches, steps, losses and rule.

Ours is run as a user would, `switokd train`, on all cores, in each of several configurations once;
the fastest is then measured in turn with the plain loop in a process of its own (`plain.py`), which
has all cores as well. Rounding makes decisions differ in time, hence the paused shares beside each
figure, and a figure with `dml`, where nobody pauses.

In the configurations for `plain_*` each network sees whole batches, as in the plain loop;
for `unequal_fp32` it may be sharded, with BatchNorm's statistics by shard.

Not covered: accuracies; a plain loop that is compiled or channels_last.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench import runs
from bench.figures import Figure, Say
from bench.machine import cores

LARGE, SMALL, TINY = "wrn-16-2", "wrn-16-1", "mobilenet-0.25"
EQUAL = {
    "2T1S": {"t1": ("teacher", LARGE), "t2": ("teacher", LARGE), "s": ("student", LARGE)},
    "1T1S": {"t1": ("teacher", LARGE), "s": ("student", LARGE)},
    "1T2S": {"t1": ("teacher", LARGE), "s1": ("student", LARGE), "s2": ("student", LARGE)},
}
UNEQUAL = {"t1": ("teacher", "wrn-16-4"), "t2": ("teacher", SMALL), "s": ("student", TINY)}
ONE_PROCESS = {"placement": "replicated", "coordinator": "off"}
COMPILED = {"compute": {"compile": True}}

Networks = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Candidate:
    """One configuration of ours."""

    name: str
    settings: Mapping[str, Any]
    processes: int | None = None


@dataclass(frozen=True)
class Case:
    """One comparison."""

    figure: str
    networks: Networks
    candidates: tuple[Candidate, ...]
    target: float | None = None
    precision: str = "fp32"
    strategy: str = "switokd"
    what: str = ""


@dataclass
class Seen:
    """What the runs of a case showed beside their speed."""

    ours: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)


def whole(compiled: bool = True) -> tuple[Candidate, ...]:
    """Configurations in which each network sees whole batches."""
    eager = (
        Candidate("one process", ONE_PROCESS),
        Candidate("a rank per network", {"placement": "dedicated"}),
    )
    more = tuple(Candidate(f"{c.name}, compiled", c.settings | COMPILED) for c in eager)  # type: ignore[operator]
    return eager + (more if compiled else ())


def packed(networks: Networks) -> tuple[Candidate, ...]:
    """The largest network on a rank of its own, the others together on another."""
    first, *rest = networks
    table = {first: [0], **{name: [1] for name in rest}}
    eager = Candidate("two ranks, the largest alone", {"placement": table})
    return eager, Candidate(f"{eager.name}, compiled", {**eager.settings, **COMPILED})


def sharded() -> tuple[Candidate, ...]:
    """Every network on as many ranks as there are cores."""
    eager = Candidate("replicated on all cores", {"placement": "replicated"}, cores())
    return eager, Candidate(f"{eager.name}, compiled", {**eager.settings, **COMPILED}, cores())


def cases(quick: bool) -> list[Case]:
    """All comparisons; the first is plain_fp32."""
    two_one, anywhere = EQUAL["2T1S"], (*whole(), *packed(UNEQUAL), *sharded())
    if quick:
        return [
            Case("plain_fp32", two_one, whole(False)[:1], 2.0),
            Case("plain_bf16", two_one, whole(False)[:1], 3.0, "bf16"),
            Case("unequal_fp32", UNEQUAL, whole(False)[:1], 2.0),
        ]
    return [
        Case("plain_fp32", two_one, whole(), 2.0),
        Case("plain_bf16", two_one, whole(), 3.0, "bf16"),
        Case("unequal_fp32", UNEQUAL, anywhere, 2.0),
        Case("plain_fp32_dml", two_one, whole(), strategy="dml"),
        Case("plain_fp32_1t1s", EQUAL["1T1S"], whole()),
        Case("plain_fp32_1t2s", EQUAL["1T2S"], whole()),
    ]


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give plain_fp32, plain_bf16, unequal_fp32 and their siblings, each as soon as it is there."""
    steps, rounds = (4, 2) if quick else (10, 3)
    known: dict[str, str] = {}
    for case in cases(quick):
        yield _measure(case, steps, rounds, known, say)


def _measure(case: Case, steps: int, rounds: int, known: dict[str, str], say: Say) -> Figure:
    compute = {"precision": case.precision}
    base = runs.run_file(case.networks, steps, distillation={"strategy": case.strategy})
    seen = Seen()

    def ours(candidate: Candidate) -> runs.Record:
        settings = dict(candidate.settings)
        settings["compute"] = compute | settings.get("compute", {})
        return runs.train({**base, **settings}, candidate.processes)

    trials = {}
    for candidate in case.candidates:
        say(f"{case.figure}: trying {candidate.name}")
        trials[candidate.name] = ours(candidate).step_seconds
    best = min(case.candidates, key=lambda c: trials[c.name])
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.pt"
        torch.save(plain_inputs(base), inputs)
        for i in range(rounds):
            say(f"{case.figure}: round {i + 1} of {rounds}, {best.name} against plain")
            theirs, modes_paused = plain(inputs, steps)
            record = ours(best)
            pairs.append((theirs, record.step_seconds))
            seen.plain.append(modes_paused)
            seen.ours.append(record.paused)
    return Figure.of_pairs(
        case.figure,
        pairs,
        target=case.target,
        what=f"plain fp32 loop's seconds per step over ours ({case.precision}), "
        + ", ".join(model for _, model in case.networks.values()),
        details={
            "configuration": best.name,
            "tried_seconds_per_step": trials,
            "paused_ours": mean(seen.ours),
            "paused_plain": mean(seen.plain),
            "batch_size": runs.BATCH,
            "steps": steps,
            "strategy": case.strategy,
        },
    )


def plain_inputs(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the plain loop needs to train as ours does: first weights, batches, roles."""
    from switokd.config import Config
    from switokd.data import open_images
    from switokd.setup import make_model

    made = Config.model_validate_json(json.dumps(config))
    images = open_images(made.data, made.seed)
    stream = images.stream(made.schedule.epochs * images.steps_per_epoch)
    return {
        "roles": {name: network.role for name, network in made.networks.items()},
        "models": {name: network.model for name, network in made.networks.items()},
        "weights": {name: make_model(made, name, images).state_dict() for name in made.networks},
        "batches": list(stream),
        "classes": images.classes,
        "lr": runs.LEARNING_RATE,
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
