"""switokd against the plain loop: same networks, first weights, batches, steps, losses and rule.

Ours is run as a user would, `switokd train`, on all cores. For 2T1S, once for equal and once for
unequal networks in each precision, several configurations are tried in turn, twice, those near the
fastest also compiled; the best is then measured in turn with the plain loop, which has a process of
its own and all cores as well (`plain.py`). The other topologies take what was best there.

Both sides have as many threads as PyTorch takes by itself, and these wait for each other alike
(`switokd/threads.py`).

Rounding makes decisions differ in time, hence the shares of expert mode beside each figure, and a
figure with `dml`, where nobody pauses. With two students (1T2S) both sides follow the published
code, in which no teacher pauses; `plain_fp32_1t2s_paper` has ours follow the paper against it.

For `plain_*` each network sees whole batches, as in the plain loop; for `unequal_*` it may be
sharded, with BatchNorm's statistics by shard.

Not covered: accuracies; a plain loop that is compiled or channels_last.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench import runs
from bench.figures import Figure, Say
from bench.in_process import ONE_PROCESS, configured
from bench.machine import describe
from switokd.data.images import Images, open_images
from switokd.runtime.environment import cores
from switokd.training.build import make_model

LARGE = "wrn-16-2"
EQUAL = {
    "2T1S": {"t1": ("teacher", LARGE), "t2": ("teacher", LARGE), "s": ("student", LARGE)},
    "1T1S": {"t1": ("teacher", LARGE), "s": ("student", LARGE)},
    "1T2S": {"t1": ("teacher", LARGE), "s1": ("student", LARGE), "s2": ("student", LARGE)},
}
LARGEST, SMALLER, SMALLEST = "wrn-16-4", "wrn-16-1", "mobilenet-0.5"
UNEQUAL = {
    "2T1S": {"t1": ("teacher", LARGEST), "t2": ("teacher", SMALLER), "s": ("student", SMALLEST)},
    "1T1S": {"t1": ("teacher", LARGEST), "s": ("student", SMALLEST)},
    "1T2S": {"t1": ("teacher", LARGEST), "s1": ("student", SMALLER), "s2": ("student", SMALLEST)},
}
TARGETS = {"plain_fp32": 1.5, "plain_bf16": 3.0, "unequal_fp32": 1.3}
QUICK = "plain_fp32_1t2s"
"""Both sides follow one rule there, and so decide alike."""
SEARCH_STEPS = 5
SEARCH_TIMES = 2
"""Each candidate is tried so often; its fastest run counts, as others may use the machine."""
NEAR = 0.25
"""So much slower than the fastest may what is tried compiled be, each eager. Compiling shortens
what is no convolution, a fifth of a step, for all alike; it hardly moves one past another that was
faster by more than that."""

Networks = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Candidate:
    """One configuration of ours."""

    name: str
    settings: Mapping[str, Any]
    processes: int
    compiled: bool = False

    def __str__(self) -> str:
        """Its name, and whether it is compiled."""
        return f"{self.name}, compiled" if self.compiled else self.name


def whole(networks: Networks) -> tuple[Candidate, ...]:
    """Configurations in which each network sees whole batches."""
    return (
        Candidate("one process", ONE_PROCESS, 1),
        Candidate("a rank per network", {"placement": "dedicated"}, len(networks)),
    )


def anywhere(networks: Networks) -> tuple[Candidate, ...]:
    """Those, and others for unequal networks."""
    first, *rest = networks
    most = min(cores(), runs.BATCH // 2)  # two images for each at least
    alone = {first: [0], **{name: [1] for name in rest}}
    return (
        *whole(networks),
        Candidate("two ranks, the largest alone", {"placement": alone}, 2),
        Candidate("replicated, a rank per core", {"placement": "replicated"}, most),
    )


@dataclass(frozen=True)
class Case:
    """One comparison."""

    figure: str
    networks: Networks
    candidates: tuple[Candidate, ...]
    precision: str = "fp32"
    strategy: str = "switokd"
    semantics: str = "paper"
    """Ours; the plain loop's are those of the published code where there are two students."""
    searched: bool = False
    """Whether the best of the candidates is looked for; else it is what was best for another."""

    def run_file(self, steps: int) -> dict[str, Any]:
        """Ours, but for where the networks are and how they compute."""
        method = {"strategy": self.strategy, "semantics": self.semantics}
        return runs.run_file(self.networks, steps, distillation=method)

    def ours(self, candidate: Candidate, steps: int) -> runs.Record:
        """Train in one configuration."""
        compute = {"precision": self.precision, "compile": candidate.compiled}
        config = {**self.run_file(steps), **candidate.settings, "compute": compute}
        return runs.train(config, candidate.processes)

    def like(self, best: Candidate) -> Candidate:
        """The configuration for these networks that another case's best one is for its own."""
        (mine,) = (c for c in self.candidates if c.name == best.name)
        return replace(mine, compiled=best.compiled)


def cases() -> list[Case]:
    """All comparisons; of each kind and precision that in which the best is looked for is first."""
    found = []
    for prefix, by_topology, candidates in (
        ("plain", EQUAL, whole),
        ("unequal", UNEQUAL, anywhere),
    ):
        for precision in ("fp32", "bf16"):
            for topology, networks in by_topology.items():
                is_first = topology == "2T1S"
                suffix = "" if is_first else f"_{topology.lower()}"
                found.append(
                    Case(
                        f"{prefix}_{precision}{suffix}",
                        networks,
                        candidates(networks),
                        precision,
                        semantics="published" if topology == "1T2S" else "paper",
                        searched=is_first,
                    )
                )
    first, *_ = found
    (published,) = (case for case in found if case.figure == "plain_fp32_1t2s")
    return [
        *found,
        replace(first, figure="plain_fp32_dml", strategy="dml", searched=False),
        replace(published, figure="plain_fp32_1t2s_paper", semantics="paper"),
    ]


FIGURES = tuple(case.figure for case in cases())


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give plain_fp32, plain_bf16, unequal_fp32 and their siblings, each as soon as it is there."""
    best: dict[tuple[str, str], Candidate] = {}
    for case in cases():
        kind = case.figure.partition("_")[0], case.precision
        tried: dict[str, float] = {}
        if quick:
            if case.figure == QUICK:
                yield compare(case, case.candidates[0], 2, 1, tried, say)
            continue
        if case.searched:
            best[kind] = fastest(case, SEARCH_STEPS, tried, say)
        steps, rounds = (10, 3) if case.figure in TARGETS else (5, 2)
        yield compare(case, case.like(best[kind]), steps, rounds, tried, say)


def fastest(case: Case, steps: int, tried: dict[str, float], say: Say) -> Candidate:
    """The candidate that is fastest, eager or compiled; fills `tried`."""

    def seconds(candidates: Sequence[Candidate]) -> list[float]:
        for each in [*candidates] * SEARCH_TIMES:  # in turn
            say(f"{case.figure}: trying {each}")
            taken = case.ours(each, steps).step_seconds
            tried[str(each)] = min(taken, tried.get(str(each), taken))
        return [tried[str(each)] for each in candidates]

    eager = list(zip(seconds(case.candidates), case.candidates, strict=True))
    limit = (1 + NEAR) * min(taken for taken, _ in eager)
    near = [replace(each, compiled=True) for taken, each in eager if taken <= limit]
    return min([*eager, *zip(seconds(near), near, strict=True)], key=lambda pair: pair[0])[1]


def compare(
    case: Case, best: Candidate, steps: int, rounds: int, tried: dict[str, float], say: Say
) -> Figure:
    """Ours and plain in turn."""
    pairs, experts, paused = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.pt"
        torch.save(plain_inputs(case.run_file(steps)), inputs)
        for i in range(rounds):
            say(f"{case.figure}: round {i + 1} of {rounds}, {best} against plain")
            theirs, theirs_experts = plain(inputs, steps)
            record = case.ours(best, steps)
            pairs.append((theirs, record.step_seconds))
            experts.append(
                [_share(side, case.networks) for side in (theirs_experts, record.experts)]
            )
            paused.append(record.paused)
    follows = {"published": ", both as published", "paper": ", ours as in the paper"}
    both = follows[case.semantics] if len(case.networks) > 2 > _teachers(case.networks) else ""
    return Figure.of_pairs(
        case.figure,
        pairs,
        target=target_of(case),
        what=f"plain fp32 loop's seconds per step over ours ({case.precision}, {best}{both}), "
        + ", ".join(model for _, model in case.networks.values()),
        details={
            "configuration": str(best),
            "tried_seconds_per_step": tried,
            "expert_plain_and_ours": experts,
            "paused_ours": paused,
            "batch_size": runs.BATCH,
            "steps": steps,
            "strategy": case.strategy,
            "semantics": case.semantics,
        },
    )


def target_of(case: Case) -> float | None:
    """What to reach; in bf16 only on a processor that has it."""
    hardware = describe()["hardware"]
    has_bf16 = hardware["avx512_bf16"] or hardware["amx_bf16"]
    return TARGETS.get(case.figure) if case.precision == "fp32" or has_bf16 else None


def _teachers(networks: Networks) -> int:
    return sum(role == "teacher" for role, _ in networks.values())


def _share(experts: Sequence[Collection[str]], networks: Networks) -> float:
    """Of the teachers' steps: those in expert mode with all students."""
    return sum(map(len, experts)) / (len(experts) * _teachers(networks))


def plain_inputs(config: Mapping[str, Any], images: Images | None = None) -> dict[str, Any]:
    """What the plain loop needs to train as ours does: first weights, batches, roles.

    images: instead of the run file's.
    """
    made = configured(config)
    images = images or open_images(made.data, made.seed)
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


def plain(inputs: Path, warm_up: int) -> tuple[float, list[list[str]]]:
    """Seconds per step after `warm_up`, and by step the teachers in expert mode with all."""
    command = [sys.executable, "-m", "bench.plain", str(inputs)]
    trace = json.loads(runs.output(command, seconds=600))
    return mean(trace["seconds"][warm_up:]), trace["experts"]
