"""`placement: auto`: chooses the placement before training, on CPUs also the number of processes.

A GPU serves one process, but CPU cores can be the threads of few processes or of many. If the
launcher leaves the number open, `Environment.layouts` lists the process layouts to choose from, and
the launcher has started the largest one. The layouts are measured one after the other. The ranks of
a layout measure at the same time, because in training they also share memory and GPUs; the other
ranks wait. The chosen layout needs no restart: surplus processes end, and the others set their
number of threads.

Not covered: numbers of processes that the launcher does not list (`launcher.py`); machines of
unequal speed (only the measurements of rank 0 count); changes of the machine's load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from switokd.config.config import Config
from switokd.data.images import Images
from switokd.errors import SwitokdError, UsageError
from switokd.planning.cost_model import (
    NOISE,
    Prediction,
    choose,
    max_devices,
    shard_sizes,
)
from switokd.planning.measure_links import measure_links
from switokd.planning.pauses import Pauses, expected_pauses
from switokd.planning.profile import ASSUMED_DECISION_SECONDS, Communication, Profile, saved_profile
from switokd.planning.profiler import profile
from switokd.runtime.allocator import give_back_freed_memory
from switokd.runtime.device import device_memory
from switokd.runtime.environment import ProcessLayout
from switokd.runtime.placement import Placement, replicated
from switokd.runtime.process_group import World


@dataclass(frozen=True)
class Choice:
    """The chosen placement, and the profiles that were measured for the choice."""

    placement: Placement
    measured: Mapping[ProcessLayout, Profile] = field(default_factory=dict)
    """Profiles by process layout; on rank 0 only. Empty if saved profiles were read."""


@dataclass(frozen=True)
class Option:
    """A process layout with its best placement."""

    layout: ProcessLayout
    best: Prediction


def choose_placement(config: Config, world: World, images: Images) -> Choice:
    """Return the fastest placement. It may need fewer ranks than there are.

    Every rank must call it. Afterwards each rank has the number of threads of the chosen layout.
    Raises UsageError if a saved profile or run cannot be used, or if a network cannot be built.
    """
    env, batch = world.env, images.size_of(0)
    layouts = env.layouts or (ProcessLayout(env.world_size, torch.get_num_threads()),)
    most = max_devices(config.topology, batch)  # a small data set may have too few images
    layouts = tuple(layout for layout in layouts if layout.processes <= most) or layouts[-1:]
    pauses = world.on_rank_0(lambda: expected_pauses(config.method, config.auto))
    measured: dict[ProcessLayout, Profile] = {}
    if config.auto.profiles:
        profiles = world.on_rank_0(lambda: saved_profiles(config, world, images, layouts))
    elif env.world_size == 1:
        return Choice(replicated(config.topology, 1))
    else:
        profiles = measured = measured_profiles(config, world, images, layouts)

    def pick() -> Option:
        assert profiles is not None
        assert pauses is not None

        def best(layout: ProcessLayout, processes: int) -> Prediction:
            memory = memory_per_rank(world, layout)
            profile = profiles[layout].model_copy(update={"device_memory_bytes": memory})
            return choose(profile, config.topology, batch, processes, pauses)

        options = [Option(layout, best(layout, layout.processes)) for layout in profiles]
        chosen = fewest_of_the_best(options)
        single = None
        if not env.layouts and world.device.type == "cpu":  # the user chose the number of processes
            single = best(chosen.layout, 1)
        print(describe(chosen, options, pauses, single), flush=True)
        return chosen

    chosen = world.broadcast(world.on_rank_0(pick))
    assert isinstance(chosen, Option)
    if env.layouts:
        torch.set_num_threads(chosen.layout.threads)
    return Choice(chosen.best.placement, measured)


def fewest_of_the_best(options: Sequence[Option]) -> Option:
    """Return the option with fewest processes among those within `NOISE` of the fastest."""
    fastest = min(options, key=lambda option: (not option.best.fits, option.best.step_seconds))
    close = [
        option
        for option in options
        if option.best.fits == fastest.best.fits
        and option.best.step_seconds <= fastest.best.step_seconds * (1 + NOISE)
    ]
    return min(close, key=lambda option: option.layout.processes)


def describe(
    chosen: Option, options: Sequence[Option], pauses: Pauses, single: Prediction | None
) -> str:
    """Describe the choice and the other options in one line.

    single: prediction for a single process, mentioned if it is faster.
    """
    parts = [f"auto: {chosen.layout}, {chosen.best.step_seconds:.3g} s a step"]
    parts += [f"{o.layout} {o.best.step_seconds:.3g} s" for o in options if o is not chosen]
    if not chosen.best.fits:
        most = max(chosen.best.memory_bytes) / 1e9
        parts.append(f"no placement fits into memory, this one needs {most:.3g} GB on a rank")
    if single and single.step_seconds * (1 + NOISE) < chosen.best.step_seconds:
        parts.append(f"a single process with as many threads {single.step_seconds:.3g} s")
    return "; ".join([*parts, f"pauses: {pauses.source}"])


def measured_profiles(
    config: Config, world: World, images: Images, layouts: Sequence[ProcessLayout]
) -> dict[ProcessLayout, Profile]:
    """Measure links and networks with each process layout; the profiles are on rank 0 only."""
    measured = {}
    for layout in layouts:
        measured[layout] = _measured(config, world, images, layout)
        if world.device.type == "cpu":
            give_back_freed_memory()  # this rank may not need the measured networks again
    return {layout: profile for layout, profile in measured.items() if profile is not None}


def _measured(
    config: Config, world: World, images: Images, layout: ProcessLayout
) -> Profile | None:
    """Measure one process layout; every rank must call it, and rank 0 returns the profile."""
    takes_part = world.rank < layout.processes
    if takes_part and world.env.layouts:
        torch.set_num_threads(layout.threads)
    links = _links(world, layout.processes)
    sizes = shard_sizes(images.size_of(0), layout.processes)
    memory = memory_per_rank(world, layout)
    arguments = config, images.shape, images.classes, world.device, sizes
    measure = partial(profile, *arguments, links=links, memory=memory)
    if takes_part and world.rank > 0:
        with suppress(SwitokdError):  # rank 0 gets the same error and reports it
            measure()
    return world.on_rank_0(measure)  # all ranks wait for rank 0


def _links(world: World, processes: int) -> Communication | None:
    """Measure the links between the first `processes` ranks; None on the other ranks."""
    with world.first(processes) as first_ranks:
        takes_part = world.rank < processes
        return measure_links(first_ranks, ASSUMED_DECISION_SECONDS) if takes_part else None


def saved_profiles(
    config: Config, world: World, images: Images, layouts: Sequence[ProcessLayout]
) -> dict[ProcessLayout, Profile]:
    """Read the profiles that the run file names; return those that fit, by process layout.

    A profile fits a layout with the same number of threads. If the user chose the number of
    processes, a single profile fits whatever its threads.
    Raises UsageError if a profile cannot be used, or if no profile fits.
    """
    by_threads: dict[int, Profile] = {}
    for path in config.auto.profiles:
        profile = saved_profile(config, Path(path), images.shape, images.classes)
        if (profile.device == "cpu") != (world.device.type == "cpu"):
            raise UsageError(
                f"auto.profiles: {path} was measured on {profile.device}, and this run computes on "
                f"{world.device.type}; name a profile that was measured on {world.device.type}"
            )
        if profile.threads in by_threads:
            raise UsageError(
                f"auto.profiles: {path} is the second profile with {profile.threads} CPU "
                f"thread{'s' * (profile.threads > 1)}; name one for each number of threads"
            )
        by_threads[profile.threads] = profile
    if len(by_threads) == 1 and not world.env.layouts:
        by_threads = {layout.threads: p for layout in layouts for p in by_threads.values()}
    fitting = {
        layout: by_threads[layout.threads] for layout in layouts if layout.threads in by_threads
    }
    if not fitting:
        raise UsageError(
            f"auto.profiles: measured with {_alternatives(by_threads)} CPU threads, and this "
            f"machine needs {' or '.join(str(layout) for layout in layouts)}; profile again with "
            f"--devices {_alternatives(layout.processes for layout in layouts)}"
        )
    return fitting


def _alternatives(numbers: Iterable[int]) -> str:
    return " or ".join(str(number) for number in numbers)


def memory_per_rank(world: World, layout: ProcessLayout) -> int:
    """Return the bytes for one rank; ranks share the memory of the machine or of their GPU."""
    on_cpu = world.device.type == "cpu"
    sharing = min(layout.processes, world.env.local_world_size) if on_cpu else world.sharing
    return device_memory(world.device) // sharing
