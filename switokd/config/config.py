"""The run file as a whole: its sections, and the values derived from them.

Not covered: the sections (`sections.py`); checks between them (`checks.py`); reading a run file
(`run_file.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from switokd.config.base import KeyText, Section
from switokd.config.checks import (
    check_auto,
    check_compute,
    check_coordinator,
    check_learning_rates,
    check_method,
    check_micro_batches,
    check_names,
    check_pairs,
    check_pairs_have_an_effect,
    check_placement,
    check_resume,
    check_strategy,
)
from switokd.config.data_section import Data
from switokd.config.dotted import flatten
from switokd.config.optimizers import SGD, Adam, AdamW
from switokd.config.placement_setting import PlacementSetting, ranks_of_row
from switokd.config.sections import (
    Auto,
    Checkpoint,
    Compute,
    Coordinator,
    Distillation,
    Network,
    PairSettings,
    Schedule,
)
from switokd.config.tls import Tls
from switokd.config.tracking import Tracking, check_observers
from switokd.config.yaml_loader import dump_yaml
from switokd.distillation.couplings import Coupling, Couplings
from switokd.distillation.method import Method
from switokd.distillation.strategies import make_strategy
from switokd.distillation.topology import Pair, Role, Topology
from switokd.errors import UsageError
from switokd.models.families import is_own
from switokd.plugins import own_modules_in
from switokd.runtime.placement import Placement, dedicated, replicated

MOST_LETTERS = 100
"""In a name that becomes part of a file name; most file systems allow 255 bytes in all."""
NetworkName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=MOST_LETTERS)]
T = TypeVar("T")


class Config(Section):
    """A whole run file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MOST_LETTERS)]
    """Name of the run, for its folder and the coordinator's metrics."""
    description: str = ""
    """One line for 'switokd recipes'."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initial weights, order of the images and augmentation."""
    run_dir: KeyText | None = None
    """Folder for the run's results; null: a new folder under runs/."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue the run in run_dir from its last checkpoint, if the folder holds a run."""
    import_from: tuple[str, ...] = ()
    """Folders with your own modules, relative to the run file's folder. The run file's folder
    itself is always searched."""
    save_initial_weights: bool = False
    """Save the weights before the first step as well, in weights/initial/."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if the machine has any, else the CPU."""
    placement: PlacementSetting = "dedicated"
    """Ranks of the networks: dedicated (own ranks for every network), replicated (all networks
    on every rank), auto (measured and planned), or a table {NETWORK: [RANK, ...]}."""
    auto: Auto = Auto()
    data: Data = Data()
    networks: dict[NetworkName, Network]
    pairs: dict[NetworkName, dict[NetworkName, PairSettings]] = Field(default={})
    """Settings of single pairs, by teacher and student."""
    distillation: Distillation = Distillation()
    schedule: Schedule = Schedule()
    compute: Compute = Compute()
    checkpoint: Checkpoint = Checkpoint()
    coordinator: Coordinator = Coordinator()
    observers: tuple[KeyText, ...] = ()
    """What watches the training: tensorboard, mlflow, wandb, or package.module:Class for your own;
    see docs/reports-and-trackers.md."""
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _check_sections(self) -> Config:
        """Run the checks between sections; ValueError with a line per problem."""
        if problems := _problems_between_sections(self):
            raise ValueError("\n".join(problems))
        return self

    def placement_on(self, world_size: int) -> Placement:
        """Return the table of networks and ranks; not for placement: auto.

        world_size: number of ranks; only placement: replicated depends on it.
        """
        if isinstance(self.placement, dict):
            table = {name: ranks_of_row(self.placement[name]) for name in self.topology}
            placement = Placement.of(table)
        elif self.placement == "replicated":
            placement = replicated(self.topology, world_size)
        else:
            ranks = {name: n.ranks for name, n in self.networks.items()}
            placement = dedicated(self.topology, ranks)
        return replace(placement, micro_batches=self.compute.micro_batches)

    def check_batch(self, world_size: int) -> None:
        """UsageError if a batch is too small for `world_size` ranks.

        With placement: auto, the planner chooses the ranks by the batch.
        """
        if self.placement == "auto":
            return
        if problem := self.placement_on(world_size).problem_with(self.data.batch_size):
            raise UsageError(problem)

    def wants_cuda_graphs(self, name: str) -> bool:
        """Whether a GPU launches the network `name` as CUDA graphs.

        By default, only the package's own networks: another network may run different kernels in
        every step.
        """
        if self.compute.cuda_graphs is None:
            can_be = self.schedule.accumulate == 1 and self.compute.batch_norm == "rank"
            can_be = can_be and self.compute.micro_batches == 1
            return can_be and is_own(self.networks[name].model)
        return self.compute.cuda_graphs

    @property
    def world_size(self) -> int | None:
        """Number of ranks that the placement needs; None if any number fits."""
        if self.placement in ("replicated", "auto"):
            return None
        return self.placement_on(1).world_size

    def who(self, rank: int, world_size: int) -> str:
        """Describe a rank with its networks: "rank 1 (teacher2)".

        With placement: auto, the run file does not tell the networks: "rank 1".
        """
        if self.placement == "auto":
            return f"rank {rank}"
        return self.placement_on(world_size).who(rank)

    @cached_property
    def topology(self) -> Topology:
        """Networks and roles in the run file's order, without the pairs that are off."""
        return Topology(
            tuple((name, Role(n.role)) for name, n in self.networks.items()),
            frozenset(
                Pair(teacher, student)
                for teacher, students in self.pairs.items()
                for student, settings in students.items()
                if not settings.enabled
            ),
        )

    @cached_property
    def couplings(self) -> Couplings:
        """Weight and temperature of every KL term.

        A pair's setting wins over the network's, and the network's over the run's.
        """
        run = self.distillation
        by_network: dict[str, Coupling] = {}
        by_pair: dict[tuple[str, str], Coupling] = {}
        for name, n in self.networks.items():
            weight = n.alpha if n.role == "student" else n.beta
            default = run.alpha if n.role == "student" else run.beta
            temperature = _first_set(n.temperature, run.temperature)
            by_network[name] = Coupling(_first_set(weight, default), temperature)
        for teacher, students in self.pairs.items():
            for student, pair in students.items():
                for network, peer, weight in (
                    (student, teacher, pair.alpha),
                    (teacher, student, pair.beta),
                ):
                    by_pair[network, peer] = Coupling(
                        _first_set(weight, by_network[network].weight),
                        _first_set(pair.temperature, by_network[network].tau),
                    )
        return Couplings(self.topology, by_network, by_pair)

    @cached_property
    def method(self) -> Method:
        """The rules of the distillation: which network teaches which, and when.

        UsageError if a strategy of the user's own cannot be made, or does not fit the semantics or
        the teachers.
        """
        d = self.distillation
        strategy = make_strategy(d.strategy, d.strategy_kwargs)
        check_strategy(strategy, d, self.topology, self.networks)
        return Method(self.couplings, strategy, d.semantics)

    def must_agree(self) -> dict[str, Any]:
        """Return, by dotted key, all settings that must be equal on every rank."""
        return flatten(self._shared())

    def _shared(self) -> dict[str, Any]:
        """All sections without settings that may differ between machines, such as data.root."""
        shared = self.model_dump(mode="json", exclude={"run_dir", "description", "import_from"})
        for key in ("root", "workers", "download"):
            del shared["data"][key]
        for key in ("tls", "token_file"):
            del shared["coordinator"][key]
        return shared

    @property
    def own_modules(self) -> list[tuple[str, str]]:
        """Settings that name the user's own code, with package.module:callable."""
        return list(own_modules_in(self.model_dump()))

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all settings that the training's result depends on."""
        no_effect = (
            *("auto", "coordinator", "save_initial_weights", "device"),
            *("checkpoint", "resume", "observers", "tracking"),
        )
        settings = {key: value for key, value in self._shared().items() if key not in no_effect}
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def dump(self) -> str:
        """Return the effective configuration as YAML; loading it gives an equal configuration."""
        return dump_yaml(self.model_dump(mode="json"))


def known_settings(
    section: type[Section] = Config, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted key and pydantic field of every setting and section of a run file.

    NAME stands for a network's name, TEACHER.STUDENT for a pair. A description is one line.
    """
    sections: dict[str, tuple[tuple[type[Section], str], ...]] = {
        "auto": ((Auto, ""),),
        "data": ((Data, ""),),
        "networks": ((Network, "NAME."),),
        "pairs": ((PairSettings, "TEACHER.STUDENT."),),
        "optimizer": ((SGD, ""), (Adam, ""), (AdamW, "")),
        "distillation": ((Distillation, ""),),
        "schedule": ((Schedule, ""),),
        "compute": ((Compute, ""),),
        "checkpoint": ((Checkpoint, ""),),
        "coordinator": ((Coordinator, ""),),
        "tls": ((Tls, ""),),
        "tracking": ((Tracking, ""),),
    }
    for key, field in section.model_fields.items():
        described = copy(field)
        described.description = " ".join((field.description or "").split())
        yield prefix + key, described
        for child, name in sections.get(key, ()):
            yield from known_settings(child, f"{prefix}{key}.{name}")


def _first_set(setting: T | None, default: T) -> T:
    """Return `setting`, or `default` if it is None."""
    return default if setting is None else setting


def _problems_between_sections(config: Config) -> list[str]:
    """Return all problems that the checks between sections find."""
    problems: list[str] = []

    def check(run: Callable[..., None], *arguments: object) -> None:
        try:
            run(*arguments)
        except ValueError as error:
            problems.append(str(error))

    check(check_placement, config.placement, config.networks)
    check(check_pairs, config.pairs, config.networks)
    if not problems:  # otherwise the topology would only say the same again
        check(check_method, config.distillation, config.topology, config.networks)
    has_ranks = not problems
    check(check_resume, config.resume, config.run_dir)
    check(check_names, config.networks)
    check(check_auto, config.auto, config.placement, config.topology)
    check(check_pairs_have_an_effect, config.pairs, config.distillation.strategy)
    if has_ranks:
        check(check_coordinator, config.coordinator, config.placement, config.world_size)
    check(check_compute, config.compute, config.device, config.schedule.accumulate)
    check(check_micro_batches, config.compute, config.placement)
    check(check_learning_rates, config.schedule, config.networks)
    check(check_observers, config.observers, config.tracking)
    return problems
