"""Step times that the planner predicts, against measured ones, for unequal networks in fp32.

Every eager configuration of `against.py` is predicted from a profile that is measured just before
its run. Ranks that share cores are profiled at the same time, with the threads and the memory
settings of a training, and with measured links. The profile of rank 0 is used. The prediction uses
the pauses of the measured steps.

Not covered: more ranks than cores, which the planner does not cover either (the details have these
configurations); compiled networks.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from bench import ranks
from bench.against import Candidate, Case, cases
from bench.figures import Figure, Say
from bench.in_process import configured
from bench.runs import QUICK_BATCH
from switokd.config.config import Config
from switokd.planning.cost_model import predict
from switokd.planning.pauses import Pauses
from switokd.planning.profile import Profile
from switokd.runtime.environment import cores

FIGURES = ("plan_error_real",)
CASE = "unequal_fp32"


@dataclass(frozen=True)
class PredictionCheck:
    """Predicted and measured step time of one configuration."""

    configuration: str
    ranks: int
    predicted_seconds: float
    measured_seconds: float
    paused: float
    """Share of the teachers' measured steps that were paused."""

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted_seconds - self.measured_seconds) / self.measured_seconds

    @property
    def is_covered(self) -> bool:
        """Whether the planner covers this configuration."""
        return self.ranks <= cores()

    def to_json(self) -> dict[str, Any]:
        """Content for results.json."""
        return {**vars(self), "error": self.error, "covered": self.is_covered}


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Yield plan_error_real."""
    (case,) = (case for case in cases() if case.figure == CASE)
    case = replace(case, batch=QUICK_BATCH) if quick else case
    steps, rounds = (3, 1) if quick else (8, 2)
    candidates = [c for c in case.candidates if not quick or c.processes == 1]
    predictions = [p for _ in range(rounds) for p in _round(case, candidates, steps, say)]
    covered = [p for p in predictions if p.is_covered]
    yield Figure(
        "plan_error_real",
        tuple(p.error for p in covered),
        tuple((p.predicted_seconds, p.measured_seconds) for p in covered),
        target=0.15,
        at_least=False,
        what="|predicted - measured| / measured, median over configurations, "
        + ", ".join(model for _, model in case.networks.values()),
        details={
            "rows": [p.to_json() for p in predictions],
            "worst_of_all": max(p.error for p in covered),
            **_choice(covered),
        },
    )


def _round(
    case: Case, candidates: Sequence[Candidate], steps: int, say: Say
) -> Iterable[PredictionCheck]:
    """Profile, predict and measure every candidate once."""
    for candidate in candidates:
        say(f"planning: {candidate}, profile and run")
        config = configured({**case.run_file(steps), **candidate.settings})
        size = candidate.processes
        profiled = profile_as_ranks(config, size)
        result = case.ours(candidate, steps)
        pauses = pauses_of(result.experts[result.warm_up :])
        placement, batch = config.placement_on(size), config.data.batch_size
        yield PredictionCheck(
            str(candidate),
            size,
            predict(profiled, placement, batch, pauses).step_seconds,
            result.step_seconds,
            mean(pauses.share(teacher) for teacher in config.topology.teachers),
        )


def pauses_of(experts: Sequence[frozenset[str]]) -> Pauses:
    """Shares of the steps in which the same teachers were paused.

    experts: teachers in expert mode with all their students, by step.
    """
    patterns = tuple((paused, n / len(experts)) for paused, n in Counter(experts).items())
    return Pauses(patterns, f"of {len(experts)} measured steps")


def profile_as_ranks(config: Config, size: int) -> Profile:
    """Profile the networks in `size` processes at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        ranks.run(_profiling_rank, size, config.model_dump(mode="json"), Path(folder))
        return Profile.load(Path(folder) / "profile.json")


def _profiling_rank(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Body of one rank. All ranks measure at the same time, because they train at the same time."""
    import torch

    from switokd.data.images import open_images
    from switokd.planning.auto import measured_profiles
    from switokd.runtime.allocator import keep_freed_memory
    from switokd.runtime.environment import ProcessLayout, environment
    from switokd.runtime.process_group import join_world

    keep_freed_memory()  # the default in training
    env, config = environment(), configured(arguments)
    layout = ProcessLayout(env.world_size, max(cores() // env.world_size, 1))
    torch.set_num_threads(layout.threads)
    images = open_images(config.data, config.seed)
    with join_world(env, torch.device("cpu"), config.coordinator.timeout) as world:
        profiles = measured_profiles(config, world, images, [layout])  # empty except on rank 0
        for profile in profiles.values():
            profile.save(folder / "profile.json")


def _choice(predictions: Sequence[PredictionCheck]) -> dict[str, Any]:
    """The configuration that is predicted to be the fastest, and its time over the real fastest."""
    by_name: dict[str, list[PredictionCheck]] = {}
    for prediction in predictions:
        by_name.setdefault(prediction.configuration, []).append(prediction)
    predicted = {name: mean(p.predicted_seconds for p in ps) for name, ps in by_name.items()}
    measured = {name: mean(p.measured_seconds for p in ps) for name, ps in by_name.items()}
    chosen, fastest = (min(side, key=side.__getitem__) for side in (predicted, measured))
    return {
        "chosen": chosen,
        "fastest": fastest,
        "chosen_over_fastest": measured[chosen] / measured[fastest],
    }
