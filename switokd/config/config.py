"""The run file as a whole: its sections, and what must hold between them.

Not covered: the sections themselves (`sections.py`); reading one (`run_file.py`); whether data,
networks and processes fit together (`data`, `models`, `world`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from switokd.config.base import KeyText, Section
from switokd.config.optimizers import SGD, Adam, AdamW
from switokd.config.placement_setting import PlacementSetting, ranks_of_row
from switokd.config.sections import (
    Auto,
    Compute,
    Coordinator,
    Data,
    Distillation,
    Network,
    PairSettings,
    Schedule,
)
from switokd.distillation.couplings import Coupling, Couplings
from switokd.distillation.method import Method
from switokd.distillation.semantics import problem as problem_of_semantics
from switokd.distillation.semantics import problem_of_strategy
from switokd.distillation.strategies import make_strategy
from switokd.distillation.strategies.base import Strategy
from switokd.distillation.topology import Pair, Role, Topology
from switokd.errors import UsageError, nearest
from switokd.models.families import is_own
from switokd.plugins import is_object
from switokd.runtime.placement import Placement, dedicated, replicated

NetworkName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
T = TypeVar("T")


class Config(Section):
    """A whole run file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the run in its folder and in the metrics."""
    description: str = ""
    """A line for 'switokd recipes'."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides first weights, order and augmentation."""
    run_dir: KeyText | None = None
    """Folder of the run's results; null makes a new one under runs/."""
    import_from: tuple[str, ...] = ()
    """More folders with modules of your own, from the run file's folder; a run adds that one."""
    save_initial_weights: bool = False
    """Keep the weights before the first step as well, in weights/initial/."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs where there are any, else the CPU."""
    placement: PlacementSetting = "dedicated"
    """dedicated, replicated (all on every rank), auto (measured), or {NETWORK: [RANK, ...]}."""
    auto: Auto = Auto()
    data: Data = Data()
    networks: dict[NetworkName, Network]
    pairs: dict[NetworkName, dict[NetworkName, PairSettings]] = Field(default={})
    """By teacher and student, what differs for one pair."""
    distillation: Distillation = Distillation()
    schedule: Schedule = Schedule()
    compute: Compute = Compute()
    coordinator: Coordinator = Coordinator()

    @field_validator("coordinator", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        if value is False or value == "off":
            return {"address": "off"}
        if not isinstance(value, dict | Coordinator):
            raise ValueError("off, or keys and values such as {address: HOST:PORT}")
        return value

    @model_validator(mode="after")
    def _placement_fits(self) -> Config:
        spread = [name for name, network in self.networks.items() if network.ranks > 1]
        if spread and self.placement != "dedicated":
            raise ValueError(
                f"networks.{spread[0]}.ranks is for placement: dedicated; leave it out, for "
                + (
                    "the table says which ranks a network has"
                    if isinstance(self.placement, dict)
                    else f"{self.placement} gives each network its ranks itself"
                )
            )
        if isinstance(self.placement, dict):
            words = "placement: the table must name each network once"
            for name in self.placement:
                if name not in self.networks:
                    known = ", ".join(self.networks)
                    hint = nearest(name, self.networks)
                    raise ValueError(f"{words}: no network {name!r}{hint} (networks: {known})")
            for name in self.networks:
                if name not in self.placement:
                    raise ValueError(f"{words}: {name} is missing")
        return self

    @model_validator(mode="after")
    def _networks_fit(self) -> Config:
        for teacher, students in self.pairs.items():
            for student in students:
                _check_pair(self.networks, teacher, student)
        d = self.distillation
        if problem := self.topology.problem() or problem_of_semantics(d.semantics, self.topology):
            raise ValueError(problem)
        if ":" not in d.strategy:  # a user's own is imported later, see `method`
            try:
                self._check(d.make_strategy())
            except UsageError as error:
                raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _auto_fits(self) -> Config:
        given = [key for key, value in self.auto if value != getattr(Auto(), key)]
        if given and self.placement != "auto":
            raise ValueError(
                f"auto.{given[0]} is for placement: auto; set placement=auto, or leave it out with "
                "auto={}"
            )
        if self.auto.run is not None and self.auto.paused is not None:
            raise ValueError("auto.run and auto.paused both say how often teachers pause; give one")
        teachers = self.topology.teachers
        for name in self.auto.paused if isinstance(self.auto.paused, dict) else ():
            if name not in teachers:
                raise ValueError(
                    f"auto.paused: no teacher {name!r}{nearest(name, teachers)} (teachers: "
                    f"{', '.join(teachers)})"
                )
        return self

    @model_validator(mode="after")
    def _pairs_have_an_effect(self) -> Config:
        if self.pairs and self.distillation.strategy.startswith("kdcl-"):
            raise ValueError(
                f"pairs: strategy {self.distillation.strategy} combines the logits of all networks "
                "into one teacher, so that settings of single pairs have no effect; leave pairs out"
            )
        return self

    @model_validator(mode="after")
    def _one_process_decides_by_itself(self) -> Config:
        ranks = self.world_size
        if self.coordinator.address == "off" and ranks not in (None, 1):
            raise ValueError(
                f"coordinator: off is for a run of one process, and placement {self.placement} "
                f"needs {ranks}; leave it on auto, or set placement=replicated"
            )
        return self

    @model_validator(mode="after")
    def _statistics_can_be_shared(self) -> Config:
        if self.compute.batch_norm == "sync" and self.device == "cpu":
            raise ValueError(
                "compute.batch_norm: sync is for GPUs, and device is cpu; use batch_norm=rank"
            )
        if self.compute.cuda_graphs and self.schedule.accumulate > 1:
            raise ValueError(
                "compute.cuda_graphs: a recorded backward pass cannot add to another's gradients; "
                "use schedule.accumulate=1 or compute.cuda_graphs=false"
            )
        if self.compute.cuda_graphs and self.compute.batch_norm == "sync":
            raise ValueError(
                "compute.batch_norm: sync cannot be recorded; use batch_norm=rank or "
                "compute.cuda_graphs=false"
            )
        if self.compute.batch_norm == "sync" and self.compute.compile:
            # Each rank compiles its own shards' sizes by real passes, and those would wait for
            # all of the network's ranks.
            raise ValueError(
                "compute.batch_norm: sync cannot be compiled; use batch_norm=rank or compile=false"
            )
        return self

    @model_validator(mode="after")
    def _rates_fall_to_the_least(self) -> Config:
        least = self.schedule.min_lr
        for name, network in self.networks.items():
            if network.optimizer.lr < least:
                raise ValueError(
                    f"schedule.min_lr: {least:g} is more than the learning rate that {name} starts "
                    f"with (networks.{name}.optimizer.lr: {network.optimizer.lr:g})"
                )
        return self

    def _check(self, strategy: Strategy) -> None:
        """UsageError if a strategy does not fit the semantics or the teachers."""
        if problem := problem_of_strategy(self.distillation.semantics, strategy):
            raise UsageError(f"distillation.semantics: {problem}")
        if strategy.frozen_teachers and (problem := self._untrained_teacher()):
            raise UsageError(problem)

    def _untrained_teacher(self) -> str:
        """A teacher without weights, in words: it must not be left as it comes. Empty if none is.

        An object of the program (`switokd.distil`) may come trained.
        """
        for name in self.topology.teachers:
            network = self.networks[name]
            if network.weights is None and not is_object(network.model):
                return (
                    f"networks.{name}.weights: strategy {self.distillation.strategy} leaves its "
                    "teachers as they come; name the weights of a trained one (weights/NAME.pt of "
                    "a run)"
                )
        return ""

    def placement_on(self, world_size: int) -> Placement:
        """Where the networks go; `world_size` matters to replicated only. Not for auto."""
        if isinstance(self.placement, dict):
            table = {name: ranks_of_row(self.placement[name]) for name in self.topology}
            return Placement.of(table)
        if self.placement == "replicated":
            return replicated(self.topology, world_size)
        return dedicated(self.topology, {name: n.ranks for name, n in self.networks.items()})

    def check_batch(self, world_size: int) -> None:
        """UsageError if a batch is too small for so many ranks. placement: auto sees to that."""
        if self.placement == "auto":
            return
        if problem := self.placement_on(world_size).problem_with(self.data.batch_size):
            raise UsageError(problem)

    def wants_cuda_graphs(self, name: str) -> bool:
        """Whether a GPU launches a network as CUDA graphs: as the file says, else if it is safe.

        A network of someone else's may choose anew in each step what it does.
        """
        if self.compute.cuda_graphs is None:
            can_be = self.schedule.accumulate == 1 and self.compute.batch_norm == "rank"
            return can_be and is_own(self.networks[name].model)
        return self.compute.cuda_graphs

    @property
    def world_size(self) -> int | None:
        """Ranks that the placement needs; None if it fits any number."""
        if self.placement in ("replicated", "auto"):
            return None
        return self.placement_on(1).world_size

    def who(self, rank: int, world_size: int) -> str:
        """A rank as people know it: "rank 1 (teacher2)", as far as the run file tells."""
        if self.placement == "auto":
            return f"rank {rank}"
        return self.placement_on(world_size).who(rank)

    @cached_property
    def topology(self) -> Topology:
        """Networks and roles, in the file's order."""
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
        """Weight and temperature of each KL term."""
        usual = self.distillation
        own: dict[str, Coupling] = {}
        particular: dict[tuple[str, str], Coupling] = {}
        for name, n in self.networks.items():
            weight = n.alpha if n.role == "student" else n.beta
            default = usual.alpha if n.role == "student" else usual.beta
            own[name] = Coupling(_first(weight, default), _first(n.temperature, usual.temperature))
        for teacher, students in self.pairs.items():
            for student, pair in students.items():
                for network, peer, weight in (
                    (student, teacher, pair.alpha),
                    (teacher, student, pair.beta),
                ):
                    particular[network, peer] = Coupling(
                        _first(weight, own[network].weight),
                        _first(pair.temperature, own[network].tau),
                    )
        return Couplings(self.topology, own, particular)

    @cached_property
    def method(self) -> Method:
        """Who teaches whom and when. UsageError if a strategy of the user's cannot be made or does
        not fit, also if it leaves teachers as they come and one comes without weights.
        """
        d = self.distillation
        strategy = make_strategy(d.strategy, d.strategy_kwargs)
        self._check(strategy)
        return Method(self.couplings, strategy, d.semantics)

    def must_agree(self) -> dict[str, Any]:
        """All that must be equal on every rank: not where a machine has its data."""
        agreed = self.model_dump(mode="json", exclude={"run_dir", "description", "import_from"})
        for own in ("root", "workers", "download"):
            del agreed["data"][own]
        return agreed

    def trajectory(self) -> dict[str, Any]:
        """Of that, all that the course of the training depends on."""
        agreed = self.must_agree()
        return {
            key: value
            for key, value in agreed.items()
            if key not in ("auto", "coordinator", "save_initial_weights", "device")
        }

    @property
    def has_own_modules(self) -> bool:
        """Whether anything is named as package.module:callable."""
        models = (network.model for network in self.networks.values())
        names = (self.data.dataset, self.distillation.strategy, *models)
        return any(":" in name and not is_object(name) for name in names)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `trajectory`, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.trajectory()).encode()).hexdigest()

    def dump(self) -> str:
        """The effective configuration as YAML; loading it gives this configuration again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_settings(
    section: type[Section] = Config, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of the run file, with NAME for a network's, and what is known of it."""
    inner: dict[str, tuple[tuple[type[Section], str], ...]] = {
        "auto": ((Auto, ""),),
        "data": ((Data, ""),),
        "networks": ((Network, "NAME."),),
        "pairs": ((PairSettings, "TEACHER.STUDENT."),),
        "optimizer": ((SGD, ""), (Adam, ""), (AdamW, "")),
        "distillation": ((Distillation, ""),),
        "schedule": ((Schedule, ""),),
        "compute": ((Compute, ""),),
        "coordinator": ((Coordinator, ""),),
    }
    for key, field in section.model_fields.items():
        yield prefix + key, field
        for child, name in inner.get(key, ()):
            yield from known_settings(child, f"{prefix}{key}.{name}")


def _first(*values: T | None) -> T:
    """The first that is given; the last always is."""
    return next(value for value in values if value is not None)


def _check_pair(networks: Mapping[str, Network], teacher: str, student: str) -> None:
    """ValueError unless the two are a teacher and a student of the run."""
    for name, role in ((teacher, "teacher"), (student, "student")):
        allowed = [n for n, network in networks.items() if network.role == role]
        if name not in allowed:
            raise ValueError(
                f"pairs.{teacher}.{student}: no {role} {name!r}{nearest(name, allowed)} "
                f"({role}s: {', '.join(allowed)}); a pair is {{TEACHER: {{STUDENT: ...}}}}"
            )
