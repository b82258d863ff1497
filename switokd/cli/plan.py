"""The command `switokd plan`: from a run file to a table of placements, best first.

`main.py` registers `plan`. Torch is imported only to measure: with --profile it is not needed.

Not covered: the model behind the numbers (`cost_model.py`); starting anything.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from switokd.config.config import Config
from switokd.config.run_file import load_importable
from switokd.config.sections import Auto
from switokd.data.catalog import known
from switokd.errors import SwitokdError, UsageError
from switokd.planning.cost_model import (
    NOISE,
    Prediction,
    check_devices,
    rank_placements,
    shard_sizes,
    simplest_of_the_best,
)
from switokd.planning.pauses import Pauses, expected_pauses, parse_shares
from switokd.planning.profile import Profile, saved_profile
from switokd.runtime.environment import cores
from switokd.runtime.placement import Placement
from switokd.runtime.threads import stay_within_limits

if TYPE_CHECKING:
    import torch

OTHER_COLUMNS = 56
"""Characters that a row needs beside its placement."""

RECIPE_HELP = "A recipe's name (see 'switokd recipes') or a run file."
SETTINGS_HELP = "Settings on top of the file, such as data.batch_size=256; see 'switokd settings'."
DEVICES_HELP = "Ranks to place the networks on, each with a device like the profiled one."
PROFILE_HELP = "Use the measurements of this file instead of measuring."
SAVE_HELP = "Keep the measurements in this file."
PAUSED_HELP = (
    "Share of its steps that a teacher is paused, 0 to 1: 0.5 for all, or teacher1=0.5; may be "
    "given several times. Default: what the run file's auto says, else 0.3. Always 0 where the "
    "strategy pauses nobody, and 1 for frozen teachers."
)
RUN_HELP = "Take pauses from this earlier run's folder: which teachers were paused together."
JSON_HELP = "Print JSON: all placements, times in seconds, sizes in bytes."
TOP_HELP = "Rows of the table."


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE_OR_FILE", help=RECIPE_HELP)],
    devices: Annotated[int, typer.Option(min=1, help=DEVICES_HELP)],
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045, typer reads it at run time
        typer.Argument(metavar="KEY.KEY=VALUE", help=SETTINGS_HELP),
    ] = None,
    profile: Annotated[Optional[Path], typer.Option(metavar="FILE", help=PROFILE_HELP)] = None,  # noqa: UP045
    save_profile: Annotated[Optional[Path], typer.Option(metavar="FILE", help=SAVE_HELP)] = None,  # noqa: UP045
    paused: Annotated[Optional[list[str]], typer.Option(metavar="SHARE", help=PAUSED_HELP)] = None,  # noqa: UP045
    run: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help=RUN_HELP)] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    top: Annotated[int, typer.Option(min=1, help=TOP_HELP)] = 10,
) -> None:
    """Predict which placement of the networks trains fastest on so many devices.

    Measures each network on the device at hand, by shard size, and prints what
    a step would take under each placement, best first, and the setting to use.
    For example:

    switokd plan cifar100-2t1s --devices 8 --save-profile h100.json

    switokd plan cifar100-2t1s --devices 16 --profile h100.json --paused 0.5
    """
    try:
        if profile and save_profile:
            raise UsageError(
                "--save-profile keeps what is measured, and --profile measures nothing"
            )
        config = load_importable(recipe, settings or [])
        pauses = _pauses(config, paused or [], run)
        data = _data(config)
        check_devices(config.topology, data.batch, devices)
        timings = _profile(config, data, profile, save_profile, devices)
        found = rank_placements(timings, config.topology, data.batch, devices, pauses)
    except SwitokdError as error:
        print(f"switokd: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    if as_json:
        print(json.dumps(_as_json(config, data.batch, timings, pauses, found), indent=2))
    else:
        _print([recipe, *(settings or [])], config, timings, pauses, found, top)


def setting(placement: Placement, config: Config) -> list[str]:
    """Give what chooses `placement` on top of `config`, each as KEY=VALUE."""
    names = [name for name, _ in placement.table]
    rows = [placement.ranks_of(name) for name in names]
    is_even = all(len({weight for _, weight in row}) == 1 for _, row in placement.table)
    wanted, ranks = "dedicated", dict.fromkeys(names, 1)
    if is_even and sum(rows, ()) == tuple(range(placement.world_size)):
        ranks = {name: len(row) for name, row in zip(names, rows, strict=True)}
    elif is_even and all(len(row) == placement.world_size for row in rows):
        wanted = "replicated"
    else:
        table = (f"{name}: {_row(row)}" for name, row in placement.table)
        wanted = f"{{{', '.join(table)}}}"
    changed = [f"networks.{n}.ranks={k}" for n, k in ranks.items() if config.networks[n].ranks != k]
    if config.auto != Auto():  # is for placement: auto
        changed.append("auto={}")
    if config.coordinator.address == "off" and placement.world_size > 1:
        changed.append("coordinator.address=auto")
    is_default = config.placement == wanted == "dedicated"
    return changed if changed and is_default else [f"placement={wanted}", *changed]


def arguments_for(placement: Placement, config: Config) -> list[str]:
    """Give what `switokd train` needs on top of `config`: where any number of processes would do,
    that as well.
    """
    settings = setting(placement, config)
    if "placement=replicated" not in settings:
        return settings
    return [*settings, f"--processes={placement.world_size}"]


def _row(row: tuple[tuple[int, float], ...]) -> str:
    if len({weight for _, weight in row}) == 1:
        return str([rank for rank, _ in row])
    return "{" + ", ".join(f"{rank}: {weight:g}" for rank, weight in row) + "}"


def _pauses(config: Config, paused: list[str], run: Path | None) -> Pauses:
    if paused and run:
        raise UsageError("--paused and --run both say how often teachers pause; give one")
    given = config.auto
    if run:
        given = Auto(run=str(run))
    elif paused:
        given = Auto(paused=parse_shares(paused, config.topology))
    return expected_pauses(config.method, given)


def _profile(
    config: Config, data: _Data, given: Path | None, save_as: Path | None, devices: int
) -> Profile:
    """Read the profile, or measure one, and save it."""
    if given:
        return saved_profile(config, given, data.image, data.classes)
    device = _device(config, devices)
    if save_as:  # measuring may take minutes
        _check_writable(save_as)
    if config.compute.keep_memory and device.type == "cpu":  # as in training
        from switokd.runtime.allocator import keep_freed_memory

        keep_freed_memory()
    from switokd.planning.profiler import profile

    sizes = shard_sizes(data.batch, devices)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%")
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("profiling")

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"profiling {name}", completed=done, total=total)

        measured = profile(config, data.image, data.classes, device, sizes, show)
    if save_as:
        measured.save(save_as)
    return measured


def _check_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(
            f"--save-profile: {path} cannot be written; name a file in a folder of yours"
        )


class _Data(NamedTuple):
    """What a plan has to know of the data."""

    image: tuple[int, int, int]
    """Channels, height, width."""
    classes: int
    batch: int
    """Images of a batch: data.batch_size, or all where there are fewer."""


def _data(config: Config) -> _Data:
    """Opens the data only where it must."""
    found, held_out = known(config.data), config.method.strategy.held_out
    is_part = config.data.train_samples is not None or held_out > 0
    if found and not is_part and config.data.batch_size <= found.samples:
        return _Data(found.image, found.classes, config.data.batch_size)
    from switokd.data.synthetic import images_for

    images = images_for(config)
    return _Data(images.shape, images.classes, images.size_of(0))


def _device(config: Config, devices: int) -> torch.device:
    """A GPU where there is one, else the CPU with as many threads as each rank would have."""
    import torch

    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise UsageError(
            "device: cuda, and there is no GPU to measure on; use --profile with a file that was "
            "saved where there is one"
        )
    if has_gpu and config.device != "cpu":
        return torch.device("cuda", 0)
    stay_within_limits()
    if devices > 1 and "OMP_NUM_THREADS" not in os.environ:  # as `switokd train` starts its ranks
        torch.set_num_threads(max(cores() // devices, 1))
    return torch.device("cpu")


def _as_json(
    config: Config, batch: int, profile: Profile, pauses: Pauses, found: list[Prediction]
) -> dict[str, Any]:
    return {
        "name": config.name,
        "batch_size": batch,
        "devices": found[0].placement.world_size,
        "pauses": [{"paused": sorted(paused), "share": share} for paused, share in pauses.patterns],
        "placements": [
            {
                "placement": str(p.placement),
                "table": {name: dict(row) for name, row in p.placement.table},
                "settings": setting(p.placement, config),
                "processes": p.placement.world_size,
                "step_seconds": p.step_seconds,
                "images_per_second": p.images_per_second,
                "efficiency": p.efficiency,
                "memory_bytes": p.memory_bytes,
                "fits": p.fits,
            }
            for p in found
        ],
        "chosen": found.index(simplest_of_the_best(found)),
        "profile": profile.model_dump(mode="json"),
    }


def _print(
    command: list[str],
    config: Config,
    profile: Profile,
    pauses: Pauses,
    found: list[Prediction],
    top: int,
) -> None:
    console = Console(highlight=False, soft_wrap=True)
    devices = found[0].placement.world_size
    for line in _assumptions(config, profile, pauses, devices):
        console.print(line, markup=False)
    words = [str(p.placement) for p in found[:top]]
    title = f"{config.name}: {config.topology.name} on {devices} device{'s' * (devices > 1)}"
    wraps = max(len(line) for line in words) + OTHER_COLUMNS > console.width
    table = Table(title=title, show_lines=wraps)
    table.add_column("placement")
    for heading in ("step", "images/s", "efficiency", "memory/rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    for p, where in zip(found, words, strict=False):
        table.add_row(
            where,
            _milliseconds(p.step_seconds),
            f"{p.images_per_second:,.0f}",
            f"{p.efficiency:.0%}",
            _memory(p) + ("" if p.fits else ", too much"),
        )
    console.print(table, soft_wrap=False)
    if len(found) > top:
        console.print(f"... and {len(found) - top} more (--top, --json)", markup=False)
    chosen = simplest_of_the_best(found)
    console.print(f"simplest within {NOISE:.0%} of the best  {chosen.placement}", markup=False)
    if _spreads(chosen.placement):
        own = "note  BatchNorm, where there is any, has statistics of each rank's own images"
        all_ranks = "note  compute.batch_norm=sync needs a GPU of its own for each rank"
        is_own = config.compute.batch_norm == "rank"
        console.print(own if is_own else all_ranks, markup=False)
    if not chosen.fits:
        console.print(
            f"note  no placement fits into memory, this one needs {_memory(chosen)} on a rank",
            markup=False,
        )
    arguments = shlex.join([*command, *arguments_for(chosen.placement, config)])
    console.print(f"to use it  switokd train {arguments}", markup=False)


def _spreads(placement: Placement) -> bool:
    return any(len(row) > 1 for _, row in placement.table)


def _assumptions(config: Config, profile: Profile, pauses: Pauses, devices: int) -> list[str]:
    """Say what the numbers rest on: a line each for device, communication and pauses."""
    link, sizes = profile.communication, ", ".join(str(n) for n in profile.sizes)
    threads = f"{profile.threads} thread{'s' * (profile.threads > 1)}"
    lines = [
        f"profiled on  {profile.device}, {threads}, torch {profile.torch}, shards of {sizes} "
        f"images of {' x '.join(str(n) for n in profile.image)}",
        f"between ranks  {link.description}: {1e6 * link.latency_seconds:g} us, "
        f"{link.bandwidth_bytes_per_second / 1e9:g} GB/s, decisions "
        f"{1000 * link.decision_seconds:g} ms",
        f"pauses  {pauses.source}",
    ]
    here = cores()
    if profile.device == "cpu" and devices * profile.threads > here:
        ranks = f"{devices} rank{'s' * (devices > 1)}"
        lines.append(f"note  {ranks}, {threads} each: slower on this machine's {here} cores")
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _memory(prediction: Prediction) -> str:
    """From the rank with least to the one with most."""
    most = max(prediction.memory_bytes)
    unit, name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    least, most_ = (f"{f(prediction.memory_bytes) / unit:.3g}" for f in (min, max))
    return f"{most_} {name}" if least == most_ else f"{least}-{most_} {name}"
