"""The settings and arguments with which `switokd train` uses a placement. Torch-free.

Not covered: choosing the placement (`cost_model.py`).
"""

from __future__ import annotations

from switokd.config.config import Config
from switokd.config.sections import Auto
from switokd.runtime.placement import Placement


def placement_settings(placement: Placement, config: Config) -> list[str]:
    """Return the settings, as KEY=VALUE, that make a run with `config` use `placement`."""
    names = [name for name, _ in placement.table]
    ranks_by_network = [placement.ranks_of(name) for name in names]
    is_even = all(len({weight for _, weight in row}) == 1 for _, row in placement.table)
    value, counts = "dedicated", dict.fromkeys(names, 1)
    if is_even and sum(ranks_by_network, ()) == tuple(range(placement.world_size)):
        counts = {name: len(ranks) for name, ranks in zip(names, ranks_by_network, strict=True)}
    elif is_even and all(len(ranks) == placement.world_size for ranks in ranks_by_network):
        value = "replicated"
    else:
        table = (f"{name}: {_yaml_row(row)}" for name, row in placement.table)
        value = f"{{{', '.join(table)}}}"
    changed = [
        f"networks.{name}.ranks={count}"
        for name, count in counts.items()
        if config.networks[name].ranks != count
    ]
    if config.auto != Auto():  # allowed with `placement: auto` only
        changed.append("auto={}")
    if config.coordinator.address == "off" and placement.world_size > 1:
        changed.append("coordinator.address=auto")
    is_default = config.placement == value == "dedicated"
    return changed if changed and is_default else [f"placement={value}", *changed]


def train_arguments(placement: Placement, config: Config) -> list[str]:
    """Return the arguments of `switokd train`: the settings and, where needed, --processes."""
    settings = placement_settings(placement, config)
    if "placement=replicated" not in settings:
        return settings
    return [*settings, f"--processes={placement.world_size}"]  # replicated fits any number


def _yaml_row(row: tuple[tuple[int, float], ...]) -> str:
    """Write a network's ranks as YAML: a list, or {rank: weight} where weights differ."""
    if len({weight for _, weight in row}) == 1:
        return str([rank for rank, _ in row])
    return "{" + ", ".join(f"{rank}: {weight:g}" for rank, weight in row) + "}"
