"""switokd against the plain loop, with the same networks, initial weights, batches and losses.

Our side runs `switokd train` on all cores, like a user. For 2T1S, several configurations are tried
twice, for equal and unequal networks and for each precision. The configurations close to the
fastest are also tried compiled. The best one is then measured alternately with the plain loop
(`plain.py`), which also has a process of its own and all cores. The other topologies use the
configuration that was best for 2T1S.

Both sides use PyTorch's default number of threads, and their threads wait for each other in the
same way (`switokd/runtime/threads.py`).

Because of rounding, decisions of both sides differ after some steps. Each figure therefore has the
shares of expert mode, and one figure uses `dml`, which never pauses. With two students (1T2S) both
sides follow the published code, in which no teacher pauses. In `plain_fp32_1t2s_paper` our side
follows the paper.

For `plain_*` each network gets whole batches, as in the plain loop. For `unequal_*` a network may
be sharded, with BatchNorm statistics per shard.

Not covered: accuracy; a plain loop that is compiled or uses channels_last.
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
"""Figure to measure with --quick: both sides follow the same rule and make the same decisions."""
SEARCH_STEPS = 5
SEARCH_TIMES = 2
"""Number of runs per candidate; the fastest counts, because others may use the machine."""
NEAR = 0.25
"""Candidates up to this much slower than the fastest are also tried compiled.

Compiling shortens everything but the convolutions, about a fifth of a step, for all candidates
alike. A candidate that is slower by more than that hardly becomes the fastest.
"""

Networks = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Candidate:
    """One configuration of switokd."""

    name: str
    settings: Mapping[str, Any]
    processes: int
    compiled: bool = False

    def __str__(self) -> str:
        """Name, and whether networks are compiled."""
        return f"{self.name}, compiled" if self.compiled else self.name


def whole(networks: Networks) -> tuple[Candidate, ...]:
    """Configurations in which each network gets whole batches."""
    return (
        Candidate("one process", ONE_PROCESS, 1),
        Candidate("a rank per network", {"placement": "dedicated"}, len(networks)),
    )


def anywhere(networks: Networks) -> tuple[Candidate, ...]:
    """The configurations of `whole`, and further ones for unequal networks."""
    first, *rest = networks
    most = min(cores(), runs.BATCH // 2)  # at least two images per rank
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
    """Semantics of our side; the plain loop with two students follows the published code."""
    searched: bool = False
    """Whether to search for the best candidate; else the best one of another case is used."""
    batch: int = runs.BATCH

    def run_file(self, steps: int) -> dict[str, Any]:
        """Run file of our side, without placement and compute settings."""
        method = {"strategy": self.strategy, "semantics": self.semantics}
        return runs.run_file(self.networks, steps, self.batch, distillation=method)

    def ours(self, candidate: Candidate, steps: int) -> runs.RunResult:
        """Train with switokd in one configuration."""
        compute = {"precision": self.precision, "compile": candidate.compiled}
        config = {**self.run_file(steps), **candidate.settings, "compute": compute}
        return runs.train(config, candidate.processes)

    def like(self, best: Candidate) -> Candidate:
        """This case's candidate that corresponds to the best candidate of another case."""
        (candidate,) = (c for c in self.candidates if c.name == best.name)
        return replace(candidate, compiled=best.compiled)


def cases() -> list[Case]:
    """All comparisons. The first one of each kind and precision searches for the best candidate."""
    all_cases = []
    for prefix, by_topology, candidates in (
        ("plain", EQUAL, whole),
        ("unequal", UNEQUAL, anywhere),
    ):
        for precision in ("fp32", "bf16"):
            for topology, networks in by_topology.items():
                is_first = topology == "2T1S"
                suffix = "" if is_first else f"_{topology.lower()}"
                all_cases.append(
                    Case(
                        f"{prefix}_{precision}{suffix}",
                        networks,
                        candidates(networks),
                        precision,
                        semantics="published" if topology == "1T2S" else "paper",
                        searched=is_first,
                    )
                )
    first, *_ = all_cases
    (published,) = (case for case in all_cases if case.figure == "plain_fp32_1t2s")
    return [
        *all_cases,
        replace(first, figure="plain_fp32_dml", strategy="dml", searched=False),
        replace(published, figure="plain_fp32_1t2s_paper", semantics="paper"),
    ]


FIGURES = tuple(case.figure for case in cases())


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield plain_fp32, plain_bf16, unequal_fp32 and the figures of the other topologies."""
    best: dict[tuple[str, str], Candidate] = {}
    for case in cases():
        kind = case.figure.partition("_")[0], case.precision
        tried: dict[str, float] = {}
        if quick:
            if case.figure == QUICK:
                small = replace(case, batch=runs.QUICK_BATCH)
                yield compare(small, small.candidates[0], 2, 1, tried, say)
            continue
        if case.searched:
            best[kind] = fastest(case, SEARCH_STEPS, tried, say)
        steps, rounds = (10, 3) if case.figure in TARGETS else (5, 2)
        yield compare(case, case.like(best[kind]), steps, rounds, tried, say)


def fastest(case: Case, steps: int, tried: dict[str, float], say: Say) -> Candidate:
    """Find the fastest candidate, eager or compiled; adds seconds per step to `tried`."""

    def seconds(candidates: Sequence[Candidate]) -> list[float]:
        for candidate in [*candidates] * SEARCH_TIMES:  # alternately
            say(f"{case.figure}: trying {candidate}")
            taken = case.ours(candidate, steps).step_seconds
            tried[str(candidate)] = min(taken, tried.get(str(candidate), taken))
        return [tried[str(candidate)] for candidate in candidates]

    eager = list(zip(seconds(case.candidates), case.candidates, strict=True))
    limit = (1 + NEAR) * min(taken for taken, _ in eager)
    near = [replace(c, compiled=True) for taken, c in eager if taken <= limit]
    return min([*eager, *zip(seconds(near), near, strict=True)], key=lambda pair: pair[0])[1]


def compare(
    case: Case, best: Candidate, steps: int, rounds: int, tried: dict[str, float], say: Say
) -> Figure:
    """Measure our side and the plain loop alternately."""
    pairs, experts, paused = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.pt"
        torch.save(plain_inputs(case.run_file(steps)), inputs)
        for i in range(rounds):
            say(f"{case.figure}: round {i + 1} of {rounds}, {best} against plain")
            plain_seconds, plain_experts = plain(inputs, steps)
            result = case.ours(best, steps)
            pairs.append((plain_seconds, result.step_seconds))
            experts.append(
                [_share(side, case.networks) for side in (plain_experts, result.experts)]
            )
            paused.append(result.paused)
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
            "batch_size": case.batch,
            "steps": steps,
            "strategy": case.strategy,
            "semantics": case.semantics,
        },
    )


def target_of(case: Case) -> float | None:
    """Target of a case; None for bf16 on a processor without bf16 instructions."""
    hardware = describe()["hardware"]
    has_bf16 = hardware["avx512_bf16"] or hardware["amx_bf16"]
    return TARGETS.get(case.figure) if case.precision == "fp32" or has_bf16 else None


def _teachers(networks: Networks) -> int:
    return sum(role == "teacher" for role, _ in networks.values())


def _share(experts: Sequence[Collection[str]], networks: Networks) -> float:
    """Share of the teachers' steps that are in expert mode with all students."""
    return sum(map(len, experts)) / (len(experts) * _teachers(networks))


def plain_inputs(config: Mapping[str, Any], images: Images | None = None) -> dict[str, Any]:
    """Input of the plain loop for the same training: initial weights, batches, roles.

    images: data to use instead of the run file's.
    """
    checked = configured(config)
    images = images or open_images(checked.data, checked.seed)
    stream = images.stream(checked.schedule.epochs * images.steps_per_epoch)
    return {
        "roles": {name: network.role for name, network in checked.networks.items()},
        "models": {name: network.model for name, network in checked.networks.items()},
        "weights": {
            name: make_model(checked, name, images).state_dict() for name in checked.networks
        },
        "batches": list(stream),
        "classes": images.classes,
        "lr": {name: network.optimizer.lr for name, network in checked.networks.items()},
        "strategy": checked.distillation.strategy,
    }


def plain(inputs: Path, warm_up: int) -> tuple[float, list[list[str]]]:
    """Seconds per step after `warm_up` steps; teachers in expert mode, by step."""
    command = [sys.executable, "-m", "bench.plain", str(inputs)]
    trace = json.loads(runs.output(command, seconds=600))
    return mean(trace["seconds"][warm_up:]), trace["experts"]
