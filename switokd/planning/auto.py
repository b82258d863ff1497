"""`placement: auto`: where the networks go, and on CPUs on how many processes, before training.

A GPU is one process's; cores may be the threads of few processes or of many. Where the launcher
leaves the number open (`Environment.crews`) it has started the largest. Then, for one number of
processes after the other, so many of them measure at the same time, as they will compute (some
share memory, or a GPU), while the others stand still. What is chosen needs no new start: processes
that are not needed end, the others go on with the threads that each then has.

Not covered: other numbers of processes than the launcher offers (`launcher.py`); machines of
unequal speed (only what rank 0 measures counts); load that comes or goes later.
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
    most_devices,
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
    """Where the networks go."""

    placement: Placement
    measured: Mapping[ProcessLayout, Profile] = field(default_factory=dict)
    """What was found out for it; on rank 0 only."""


@dataclass(frozen=True)
class Option:
    """The best that so many processes can do."""

    layout: ProcessLayout
    best: Prediction


def choose_placement(config: Config, world: World, images: Images) -> Choice:
    """Give the fastest placement; it needs fewer ranks than there are where fewer are faster.

    Every rank must call it, and has the threads that go with the choice afterwards. UsageError
    for files that cannot be used, and for networks that cannot be built.
    """
    env, batch = world.env, images.size_of(0)
    layouts = env.layouts or (ProcessLayout(env.world_size, torch.get_num_threads()),)
    most = most_devices(config.topology, batch)  # a small data set may be too few images for many
    layouts = tuple(layout for layout in layouts if layout.processes <= most) or layouts[-1:]
    pauses = world.on_rank_0(lambda: expected_pauses(config.method, config.auto))
    measured: dict[ProcessLayout, Profile] = {}
    if config.auto.profiles:
        given = world.on_rank_0(lambda: saved_profiles(config, world, images, layouts))
    elif env.world_size == 1:
        return Choice(replicated(config.topology, 1))
    else:
        given = measured = measured_profiles(config, world, images, layouts)

    def pick() -> Option:
        assert given is not None
        assert pauses is not None

        def best(layout: ProcessLayout, processes: int) -> Prediction:
            own = own_memory(world, layout)
            found = given[layout].model_copy(update={"device_memory_bytes": own})
            return choose(found, config.topology, batch, processes, pauses)

        offers = [Option(layout, best(layout, layout.processes)) for layout in given]
        chosen = fewest_of_the_best(offers)
        alone = None
        if not env.layouts and world.device.type == "cpu":  # as many as the user has started
            alone = best(chosen.layout, 1)
        print(describe(chosen, offers, pauses, alone), flush=True)
        return chosen

    chosen = world.broadcast(world.on_rank_0(pick))
    assert isinstance(chosen, Option)
    if env.layouts:
        torch.set_num_threads(chosen.layout.threads)
    return Choice(chosen.best.placement, measured)


def fewest_of_the_best(offers: Sequence[Option]) -> Option:
    """Of what is within `NOISE` of the fastest, the fewest processes."""
    first = min(offers, key=lambda offer: (not offer.best.fits, offer.best.step_seconds))
    near = [
        offer
        for offer in offers
        if offer.best.fits == first.best.fits
        and offer.best.step_seconds <= first.best.step_seconds * (1 + NOISE)
    ]
    return min(near, key=lambda offer: offer.layout.processes)


def describe(
    chosen: Option, offers: Sequence[Option], pauses: Pauses, alone: Prediction | None
) -> str:
    """What was chosen and from what, in one line.

    alone: what a single process would do that nobody has asked for; said where it is faster.
    """
    words = [f"auto: {chosen.layout}, {chosen.best.step_seconds:.3g} s a step"]
    words += [f"{o.layout} {o.best.step_seconds:.3g} s" for o in offers if o is not chosen]
    if not chosen.best.fits:
        most = max(chosen.best.memory_bytes) / 1e9
        words.append(f"no placement fits into memory, this one needs {most:.3g} GB on a rank")
    if alone and alone.step_seconds * (1 + NOISE) < chosen.best.step_seconds:
        words.append(f"a single process with as many threads {alone.step_seconds:.3g} s")
    return "; ".join([*words, f"pauses: {pauses.source}"])


def measured_profiles(
    config: Config, world: World, images: Images, layouts: Sequence[ProcessLayout]
) -> dict[ProcessLayout, Profile]:
    """Measure links and networks with each crew; what comes of it is on rank 0 only."""
    measured = {}
    for layout in layouts:
        measured[layout] = _measured(config, world, images, layout)
        if world.device.type == "cpu":
            give_back_freed_memory()  # of networks and batches that this rank may never see again
    return {layout: found for layout, found in measured.items() if found is not None}


def _measured(
    config: Config, world: World, images: Images, layout: ProcessLayout
) -> Profile | None:
    is_in = world.rank < layout.processes
    if is_in and world.env.layouts:
        torch.set_num_threads(layout.threads)
    links = _links(world, layout.processes)
    sizes = shard_sizes(images.size_of(0), layout.processes)
    memory = own_memory(world, layout)
    given = config, images.shape, images.classes, world.device, sizes
    measure = partial(profile, *given, links=links, memory=memory)
    if is_in and world.rank > 0:
        with suppress(SwitokdError):  # rank 0 finds the same, and says so
            measure()
    return world.on_rank_0(measure)  # which all wait for


def _links(world: World, processes: int) -> Communication | None:
    with world.first(processes) as few:
        is_in = world.rank < processes
        return measure_links(few, ASSUMED_DECISION_SECONDS) if is_in else None


def saved_profiles(
    config: Config, world: World, images: Images, layouts: Sequence[ProcessLayout]
) -> dict[ProcessLayout, Profile]:
    """Read the profiles that the run file names, each for the crews with as many threads.

    Where the number of processes is given, a single profile is theirs, whatever its threads.
    UsageError if one cannot be used, or if none remains.
    """
    by_threads: dict[int, Profile] = {}
    for path in config.auto.profiles:
        found = saved_profile(config, Path(path), images.shape, images.classes)
        if (found.device == "cpu") != (world.device.type == "cpu"):
            raise UsageError(
                f"auto.profiles: {path} was measured on {found.device}, and this run computes on "
                f"{world.device.type}; name one that was measured there"
            )
        if found.threads in by_threads:
            raise UsageError(
                f"auto.profiles: {path} is the second with {found.threads} CPU "
                f"thread{'s' * (found.threads > 1)}; name one for each number of threads"
            )
        by_threads[found.threads] = found
    if len(by_threads) == 1 and not world.env.layouts:
        by_threads = {layout.threads: found for layout in layouts for found in by_threads.values()}
    fitting = {
        layout: by_threads[layout.threads] for layout in layouts if layout.threads in by_threads
    }
    if not fitting:
        raise UsageError(
            f"auto.profiles: measured with {_listed(by_threads)} CPU threads, and here it would be "
            f"{' or '.join(str(layout) for layout in layouts)}; profile again with --devices "
            f"{_listed(layout.processes for layout in layouts)}"
        )
    return fitting


def _listed(numbers: Iterable[int]) -> str:
    return " or ".join(str(number) for number in numbers)


def own_memory(world: World, layout: ProcessLayout) -> int:
    """Bytes for each rank, which shares the machine's or its GPU's memory with others."""
    on_cpu = world.device.type == "cpu"
    sharing = min(layout.processes, world.env.local_world_size) if on_cpu else world.sharing
    return device_memory(world.device) // sharing
