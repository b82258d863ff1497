"""What a plan takes as given, not measured: how often teachers pause, profiles from files.

Torch-free.

Not covered: measuring (`profile_networks.py`, `links.py`).
"""

from __future__ import annotations

from pathlib import Path

from switokd.config import Config
from switokd.errors import UsageError
from switokd.method import Method
from switokd.pauses import Pauses
from switokd.sections import Auto
from switokd.timings import Profile


def expected_pauses(method: Method, given: Auto) -> Pauses:
    """As `given` says by its run or its shares, else the usual; UsageError if that is no such run.

    What it says is of teachers that learn and pause by turns: where the strategy pauses nobody,
    or leaves its teachers as they come, it is certain already.
    """
    strategy, topology = method.strategy, method.topology
    if strategy.pauses and method.rule.pauses and not strategy.frozen_teachers:
        if given.run is not None:
            return Pauses.of_run(Path(given.run), topology)
        if given.paused is not None:
            own = given.paused if isinstance(given.paused, dict) else {}
            everyone = given.paused if isinstance(given.paused, int | float) else 0.0
            return Pauses.independent({t: own.get(t, everyone) for t in topology.teachers})
    return Pauses.usual(method)


def saved_profile(config: Config, path: Path, image: tuple[int, int, int], classes: int) -> Profile:
    """Read a profile for `config` and its images; UsageError if it is of something else."""
    found = Profile.load(path)
    try:
        recorded = [name for name in config.networks if config.wants_recording(name)]
        found.check(config.networks, config.method.strategy.frozen_teachers, recorded)
        found.check_conditions(image, classes, config.compute)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    soft, steps = config.data.has_soft_targets, config.schedule.accumulate
    return found.model_copy(update={"soft_targets": soft, "accumulate": steps})
