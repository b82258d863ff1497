"""The inputs of `switokd plan`: pauses, facts about the data, and a profile.

Torch is imported only to measure a profile, or where the data set has to be opened.

Not covered: the options (`cli/plan.py`); measuring (`planning/profiler.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from switokd.config.config import Config
from switokd.config.sections import Auto
from switokd.data.catalog import known
from switokd.errors import UsageError
from switokd.planning.cost_model import shard_sizes
from switokd.planning.pauses import Pauses, expected_pauses, parse_shares
from switokd.planning.profile import Profile, saved_profile
from switokd.runtime.environment import cores
from switokd.runtime.threads import stay_within_limits

if TYPE_CHECKING:
    import torch


class DataFacts(NamedTuple):
    """The facts about the data that a plan needs."""

    image: tuple[int, int, int]
    """Channels, height, width."""
    classes: int
    batch: int
    """Images of a batch: data.batch_size, or all training images if there are fewer."""


def data_facts(config: Config) -> DataFacts:
    """Return shape, classes and batch size; open the data set only if the catalog cannot tell.

    Raises UsageError if the data set must be opened and cannot be.
    """
    catalogued, held_out = known(config.data), config.method.strategy.held_out
    is_subset = config.data.train_samples is not None or held_out > 0
    if catalogued and not is_subset and config.data.batch_size <= catalogued.samples:
        return DataFacts(catalogued.image, catalogued.classes, config.data.batch_size)
    from switokd.data.synthetic import images_for

    images = images_for(config)
    return DataFacts(images.shape, images.classes, images.size_of(0))


def pauses_for(config: Config, shares: list[str], run: Path | None) -> Pauses:
    """Return the pauses that --paused (`shares`) or --run says, else those of the run file."""
    if shares and run:
        raise UsageError("--paused and --run both say how often teachers pause; give one of them")
    auto = config.auto
    if run:
        auto = Auto(run=str(run))
    elif shares:
        auto = Auto(paused=parse_shares(shares, config.topology))
    return expected_pauses(config.method, auto)


def make_profile(
    config: Config, data: DataFacts, path: Path | None, save_as: Path | None, devices: int
) -> Profile:
    """Read the profile at `path`, or measure a profile and write it to `save_as`."""
    if path:
        return saved_profile(config, path, data.image, data.classes)
    device = _device_to_measure(config, devices)
    if save_as:  # before measuring, which may take minutes
        _check_writable(save_as)
    if config.compute.keep_memory and device.type == "cpu":  # as in training
        from switokd.runtime.allocator import keep_freed_memory

        keep_freed_memory()
    from switokd.planning.profiler import profile

    sizes = shard_sizes(data.batch, max(devices, config.compute.micro_batches))
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%")
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("profiling")

        def show(network: str, done: int, total: int) -> None:
            bar.update(task, description=f"profiling {network}", completed=done, total=total)

        measured = profile(config, data.image, data.classes, device, sizes, show)
    if save_as:
        measured.save(save_as)
    return measured


def _check_writable(path: Path) -> None:
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
        raise UsageError(
            f"--save-profile: {path} cannot be written; name a file in a folder that you may write"
        )


def _device_to_measure(config: Config, devices: int) -> torch.device:
    """Choose a GPU if there is one, else the CPU with the threads that each rank would have."""
    import torch

    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise UsageError(
            "device: cuda, and there is no GPU to measure on; use --profile with a file that was "
            "saved on a machine with a GPU"
        )
    if has_gpu and config.device != "cpu":
        return torch.device("cuda", 0)
    stay_within_limits()
    if devices > 1 and "OMP_NUM_THREADS" not in os.environ:  # as `switokd train` starts its ranks
        torch.set_num_threads(max(cores() // devices, 1))
    return torch.device("cpu")
