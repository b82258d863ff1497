"""What the planner foresees of networks that compute, against what is measured: unequal, fp32.

Each configuration that `against.py` tries eagerly is predicted from a profile taken just before it
is run. Ranks that share the cores are profiled as they compute: as many processes at once, each
with its part of the threads, its links measured and its memory kept; the profile is rank 0's.
Pauses are those of the steps that were measured.

Not covered: more ranks than cores, which the planner does not cover; they are in the details, not
in the figure; compiled networks.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from bench import ranks
from bench.against import Candidate, Case, cases
from bench.figures import Figure, Say
from bench.in_process import configured
from switokd.config.config import Config
from switokd.planning.cost_model import predict
from switokd.planning.pauses import Pauses
from switokd.planning.profile import Profile
from switokd.runtime.environment import cores

FIGURES = ("plan_error_real",)
CASE = "unequal_fp32"


@dataclass(frozen=True)
class Foreseen:
    """One configuration, predicted and measured."""

    configuration: str
    ranks: int
    predicted_seconds: float
    measured_seconds: float
    paused: float
    """Share of the teachers' measured steps."""

    @property
    def error(self) -> float:
        """How far the prediction was off, as a share of what was measured."""
        return abs(self.predicted_seconds - self.measured_seconds) / self.measured_seconds

    @property
    def is_covered(self) -> bool:
        """Whether the planner says that it covers this."""
        return self.ranks <= cores()

    def record(self) -> dict[str, Any]:
        """For results.json."""
        return {**vars(self), "error": self.error, "covered": self.is_covered}


def measure(quick: bool, say: Say) -> Iterable[Figure]:
    """Give plan_error_real."""
    (case,) = (case for case in cases() if case.figure == CASE)
    steps, rounds = (3, 1) if quick else (8, 2)
    candidates = [c for c in case.candidates if not quick or c.processes == 1]
    found = [each for _ in range(rounds) for each in _round(case, candidates, steps, say)]
    covered = [each for each in found if each.is_covered]
    yield Figure(
        "plan_error_real",
        tuple(each.error for each in covered),
        tuple((each.predicted_seconds, each.measured_seconds) for each in covered),
        target=0.15,
        at_least=False,
        what="|predicted - measured| / measured, median over configurations, "
        + ", ".join(model for _, model in case.networks.values()),
        details={
            "rows": [each.record() for each in found],
            "worst_of_all": max(each.error for each in covered),
            **_choice(covered),
        },
    )


def _round(case: Case, candidates: Sequence[Candidate], steps: int, say: Say) -> Iterable[Foreseen]:
    """Profile, predict and measure every candidate once."""
    for candidate in candidates:
        say(f"planning: {candidate}, profile and run")
        config = configured({**case.run_file(steps), **candidate.settings})
        size = candidate.processes
        profiled = profile_as_ranks(config, size)
        record = case.ours(candidate, steps)
        pauses = pauses_of(record.experts[record.warm_up :])
        placement, batch = config.placement_on(size), config.data.batch_size
        yield Foreseen(
            str(candidate),
            size,
            predict(profiled, placement, batch, pauses).step_seconds,
            record.step_seconds,
            mean(pauses.share(teacher) for teacher in config.topology.teachers),
        )


def pauses_of(experts: Sequence[frozenset[str]]) -> Pauses:
    """How often which teachers were paused together, by step."""
    patterns = tuple((paused, n / len(experts)) for paused, n in Counter(experts).items())
    return Pauses(patterns, f"of {len(experts)} measured steps")


def profile_as_ranks(config: Config, size: int) -> Profile:
    """Profile in so many processes at once."""
    with tempfile.TemporaryDirectory() as folder:
        ranks.run(_profiling_rank, size, config.model_dump(mode="json"), Path(folder))
        return Profile.load(Path(folder) / "profile.json")


def _profiling_rank(folder: Path, arguments: Mapping[str, Any]) -> None:
    """One of the ranks; all measure at the same time, as they will compute."""
    import torch

    from switokd.data.images import open_images
    from switokd.planning.auto import measured_profiles
    from switokd.runtime.allocator import keep_freed_memory
    from switokd.runtime.environment import ProcessLayout, environment
    from switokd.runtime.process_group import join_world

    keep_freed_memory()  # as in training, by default
    env, config = environment(), configured(arguments)
    layout = ProcessLayout(env.world_size, max(cores() // env.world_size, 1))
    torch.set_num_threads(layout.threads)
    images = open_images(config.data, config.seed)
    with join_world(env, torch.device("cpu"), config.coordinator.timeout) as world:
        for found in measured_profiles(config, world, images, [layout]).values():  # on rank 0
            found.save(folder / "profile.json")


def _choice(found: Sequence[Foreseen]) -> dict[str, Any]:
    """Which configuration the predictions choose, and what that costs against the fastest."""
    by_name: dict[str, list[Foreseen]] = {}
    for each in found:
        by_name.setdefault(each.configuration, []).append(each)
    predicted = {name: mean(e.predicted_seconds for e in each) for name, each in by_name.items()}
    measured = {name: mean(e.measured_seconds for e in each) for name, each in by_name.items()}
    chosen, fastest = (min(side, key=side.__getitem__) for side in (predicted, measured))
    return {
        "chosen": chosen,
        "fastest": fastest,
        "chosen_over_fastest": measured[chosen] / measured[fastest],
    }
