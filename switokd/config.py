"""The run file's shape: frozen, typed sections, each setting with its default and meaning.

Not covered: reading one (`runfile.py`); whether data, networks and processes fit together
(`data`, `models`, `world`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from switokd.errors import nearest
from switokd.placement import Placement, dedicated, replicated
from switokd.strategy import STRATEGIES
from switokd.topology import Role, Topology

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
KeyText = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: frozen, strict, no unknown keys, no NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Data(Section):
    """Where the images come from, and how they are varied."""

    dataset: KeyText = "digits"
    """digits, fashion-mnist, cifar10, cifar100, image-folder, or package.module:callable."""
    root: str = "data"
    """Folder that holds the data set; not used by digits."""
    download: bool = False
    """Let torchvision download a missing data set into root."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images per step; every network sees all of them."""
    crop_padding: Annotated[int, Field(ge=0)] | None = None
    """Random crop after padding by so many pixels; null: the data set's default."""
    flip: bool | None = None
    """Random horizontal flip; null: the data set's default."""
    image_size: Annotated[int, Field(ge=8)] = 224
    """Side of the square that image-folder pictures are cropped to."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank; they never change what is loaded."""
    drop_last: bool = True
    """Leave out the last batch of an epoch when it is smaller than the others."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments for a data set named by import string."""

    @model_validator(mode="after")
    def _kwargs_are_for_own_data(self) -> Data:
        if self.kwargs and ":" not in self.dataset:
            raise ValueError("kwargs only where dataset is package.module:callable")
        return self


class SGD(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    """sgd or adam; the settings of sgd:"""
    lr: Positive = 0.1
    """Learning rate at the start."""
    momentum: Fraction = 0.9
    """Share of the previous update that is kept."""
    weight_decay: NonNegative = 5e-4
    """L2 penalty."""
    nesterov: bool = False
    """Nesterov's form of momentum."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov only with a momentum above 0")
        return self


class Adam(Section):
    """Adam."""

    name: Literal["adam"]
    """adam; its settings:"""
    lr: Positive = 1e-3
    """Learning rate at the start."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the running means of gradient and squared gradient."""
    weight_decay: NonNegative = 0.0
    """L2 penalty."""


def _check_placement(value: Any) -> Any:
    """Refuse what is no placement with one sentence, where a union's types would give several."""
    if isinstance(value, dict):
        try:
            Placement.of({name: _row(row) for name, row in value.items()})
        except ValueError as error:
            raise ValueError(f"a table {{NETWORK: [RANK, ...]}}: {error}") from None
    elif value not in ("dedicated", "replicated", "auto"):
        raise ValueError("dedicated, replicated, auto, or a table {NETWORK: [RANK, ...]}")
    return value


def _row(row: Any) -> list[int] | dict[int, float]:
    """One network's ranks: a list, or {rank: weight}, whose keys JSON has made text."""
    words = f"a network's ranks are [0, 1], or {{0: 2, 1: 1}} with weights, got {row!r}"
    if isinstance(row, list):
        is_right = all(type(rank) is int and rank >= 0 for rank in row)
        if not is_right or len(set(row)) < len(row):
            raise ValueError(words)
        return row
    try:
        return {int(rank): float(weight) for rank, weight in row.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(words) from None


PlacementSetting = Annotated[
    Union[str, dict[str, Union[list[int], dict[str, float]]]],  # noqa: UP007
    BeforeValidator(_check_placement),
]


def _optimizer_name(optimizer: Any) -> str:
    """Which optimizer a section describes: SGD unless it says otherwise."""
    if isinstance(optimizer, dict):
        return str(optimizer.get("name", "sgd"))
    return str(getattr(optimizer, "name", "sgd"))


class Network(Section):
    """One network of the run."""

    role: Literal["teacher", "student"]
    """teacher or student; a run needs one of each at least."""
    model: KeyText
    """wrn-DEPTH-WIDTH, mobilenet-WIDTH, a torchvision name, or package.module:callable."""
    model_kwargs: dict[str, Any] = {}
    """Keyword arguments for the model's callable."""
    ranks: Annotated[int, Field(ge=1)] = 1
    """Processes that train this network, each on its part of the batch (placement: dedicated)."""
    optimizer: Annotated[
        Annotated[SGD, Tag("sgd")] | Annotated[Adam, Tag("adam")], Discriminator(_optimizer_name)
    ] = SGD()


class Distillation(Section):
    """The method's settings."""

    strategy: str = "switokd"
    """switokd, or dml (nobody pauses)."""
    temperature: Annotated[float, Field(ge=0.001)] = 1.0
    """tau: softens predictions in distances and KL terms."""
    alpha: NonNegative = 1.0
    """Weight of the KL terms in a student's loss."""
    beta: NonNegative = 1.0
    """Weight of the KL terms in a teacher's loss."""

    @field_validator("strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STRATEGIES:
            allowed = ", ".join(STRATEGIES)
            raise ValueError(f"one of {allowed}{nearest(value, STRATEGIES)}")
        return value


class Schedule(Section):
    """How long, and with which learning rate."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training images."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many steps even if epochs are left."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """After so many epochs each, the learning rates are multiplied by gamma."""
    gamma: Positive = 0.1
    """Factor of the learning rates at each milestone."""


class Compute(Section):
    """How the arithmetic is done."""

    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """fp32; tf32 (GPU matrix products); bf16 (forward in bfloat16, weights and losses in fp32)."""
    channels_last: bool = True
    """Keep images and convolutions in NHWC order, which most processors are faster in."""
    compile: bool = False
    """Compile each network with torch.compile: a minute at the start, faster steps after it."""
    fused_optimizer: bool = True
    """Update all of a network's weights by one fused kernel."""
    keep_memory: bool = True
    """On CPUs: keep freed memory for the next step, instead of returning it to the system."""
    data_on_device: bool | None = None
    """Hold all images on the GPU and augment them there; null: where they fit."""
    batch_norm: Literal["rank", "sync"] = "rank"
    """Statistics of a network on several ranks: each rank's own, or all ranks' (GPU only)."""


class Coordinator(Section):
    """Who decides, and where it listens."""

    address: KeyText = "auto"
    """auto: rank 0 starts one; HOST:PORT of one that runs already; off: one process by itself."""
    http_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of /metrics of the coordinator that rank 0 starts; 0 takes a free one."""
    timeout: Positive = 60.0
    """Seconds without a sign of a rank or of the coordinator before the run stops."""

    @field_validator("address", mode="before")
    @classmethod
    def _host_and_port(cls, value: Any) -> Any:
        if value is False:  # what YAML makes of a bare off
            return "off"
        if isinstance(value, str) and value not in ("auto", "off"):
            port = re.fullmatch(r".+:(\d{1,5})", value)
            if not (port and 0 < int(port[1]) < 65536):
                raise ValueError("auto, off, or HOST:PORT")
        return value


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
    save_initial_weights: bool = False
    """Keep the weights before the first step as well, in weights/initial/."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs where there are any, else the CPU."""
    placement: PlacementSetting = "dedicated"
    """dedicated, replicated (all on every rank), auto (measured), or {NETWORK: [RANK, ...]}."""
    data: Data = Data()
    networks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], Network]
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
                f"networks.{spread[0]}.ranks is for placement: dedicated; a table says itself "
                "which ranks a network has"
            )
        if isinstance(self.placement, dict) and set(self.placement) != set(self.networks):
            odd = sorted(set(self.placement) ^ set(self.networks))
            raise ValueError(f"placement: the table must name each network once; see {odd[0]}")
        return self

    @field_validator("networks")
    @classmethod
    def _both_roles(cls, value: dict[str, Network]) -> dict[str, Network]:
        roles = {network.role for network in value.values()}
        if roles != {"teacher", "student"}:
            missing = " and ".join(sorted({"teacher", "student"} - roles))
            raise ValueError(f"at least one teacher and one student (there is no {missing})")
        return value

    def placement_on(self, world_size: int) -> Placement:
        """Where the networks go; `world_size` matters to replicated only. Not for auto."""
        if isinstance(self.placement, dict):
            table = {name: _row(self.placement[name]) for name in self.topology}
            return Placement.of(table)
        if self.placement == "replicated":
            return replicated(self.topology, world_size)
        return dedicated(self.topology, {name: n.ranks for name, n in self.networks.items()})

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
        return Topology(tuple((name, Role(n.role)) for name, n in self.networks.items()))

    def must_agree(self) -> dict[str, Any]:
        """All that must be equal on every rank: not where a machine has its data."""
        agreed = self.model_dump(mode="json", exclude={"run_dir", "description"})
        for own in ("root", "workers", "download"):
            del agreed["data"][own]
        return agreed

    def trajectory(self) -> dict[str, Any]:
        """Of that, all that the course of the training depends on."""
        agreed = self.must_agree()
        return {
            key: value
            for key, value in agreed.items()
            if key not in ("coordinator", "save_initial_weights", "device")
        }

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
        "data": ((Data, ""),),
        "networks": ((Network, "NAME."),),
        "optimizer": ((SGD, ""), (Adam, "")),
        "distillation": ((Distillation, ""),),
        "schedule": ((Schedule, ""),),
        "compute": ((Compute, ""),),
        "coordinator": ((Coordinator, ""),),
    }
    for key, field in section.model_fields.items():
        yield prefix + key, field
        for child, name in inner.get(key, ()):
            yield from known_settings(child, f"{prefix}{key}.{name}")
