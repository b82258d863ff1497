"""The sections of a run file: frozen, typed, each setting with its default and meaning.

Not covered: what holds between sections (`config.py`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Union

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from switokd.config.base import Fraction, KeyText, NonNegative, Positive, Section, Temperature
from switokd.config.optimizers import SGD, Adam, AdamW, optimizer_name
from switokd.distillation.semantics import SEMANTICS
from switokd.distillation.strategies import make_strategy
from switokd.distillation.strategies.base import Strategy
from switokd.errors import UsageError


class Data(Section):
    """Where the images come from, and how they are varied."""

    dataset: KeyText = "digits"
    """digits, fashion-mnist, cifar10, cifar100, tiny-imagenet, imagenet, image-folder, mine:data"""
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
    label_smoothing: Fraction = 0.0
    """Share of each target that is spread evenly over all classes."""
    mixup: NonNegative = 0.0
    """Blend each image with another of its batch, by shares of Beta(mixup, mixup); 0: not."""
    cutmix: NonNegative = 0.0
    """Likewise, but by pasting in a box of the other; with mixup: half the images each."""
    image_size: Annotated[int, Field(ge=8)] = 224
    """Side of the square that image-folder's and imagenet's pictures are cropped to."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank; they never change what is loaded."""
    train_samples: Annotated[int, Field(ge=2)] | None = None
    """Train on only so many of the training images, the same for every seed; null: on all."""
    drop_last: bool = True
    """Leave out the last batch of an epoch when it is smaller than the others."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments for a data set named by import string."""

    @property
    def has_soft_targets(self) -> bool:
        """Whether targets are distributions over the classes, not labels."""
        return self.label_smoothing > 0 or self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _kwargs_are_for_own_data(self) -> Data:
        if self.kwargs and ":" not in self.dataset:
            raise ValueError("kwargs only where dataset is package.module:callable")
        return self


def _check_shares(value: Any) -> Any:
    """Refuse what is no share of steps with one sentence, likewise."""
    for share in value.values() if isinstance(value, dict) else [value]:
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if value is not None and not (is_number and 0 <= share <= 1):
            raise ValueError("a share from 0 to 1 for every teacher, or {TEACHER: SHARE, ...}")
    return value


class Auto(Section):
    """What placement: auto is told, where it would measure or assume otherwise."""

    profiles: tuple[KeyText, ...] = ()
    """Files instead of measuring: a run's profiles/, or of 'switokd plan --save-profile'."""
    run: KeyText | None = None
    """Folder of an earlier run: teachers pause as often, and together with whom, as they did."""
    paused: Annotated[
        Union[float, dict[str, float], None],  # noqa: UP007
        BeforeValidator(_check_shares),
    ] = None
    """Share of its steps that a teacher is paused: 0.5 for all, or {TEACHER: 0.5}; null: 0.3."""


class Network(Section):
    """One network of the run."""

    role: Literal["teacher", "student"]
    """teacher or student; a run needs one of each at least."""
    model: KeyText
    """A network's name (see 'switokd networks'), or package.module:callable."""
    model_kwargs: dict[str, Any] = {}
    """Keyword arguments for the model's callable."""
    ranks: Annotated[int, Field(ge=1)] = 1
    """Processes that train this network, each on its part of the batch (placement: dedicated)."""
    optimizer: Annotated[
        Annotated[SGD, Tag("sgd")] | Annotated[Adam, Tag("adam")] | Annotated[AdamW, Tag("adamw")],
        Discriminator(optimizer_name),
    ] = SGD()
    clip_norm: Positive | None = None
    """Longest gradient, as the L2 norm over all parameters; longer ones are scaled down to it."""
    weights: KeyText | None = None
    """A state dict to start from (weights/NAME.pt of a run): fine-tuning, or a frozen teacher."""
    temperature: Temperature | None = None
    """tau of the KL terms this network learns by (a student's: of its pairs' distances too)."""
    alpha: NonNegative | None = None
    """Students only: weight of its KL terms, instead of distillation.alpha."""
    beta: NonNegative | None = None
    """Teachers only: weight of its KL terms, instead of distillation.beta."""

    @model_validator(mode="after")
    def _weight_of_its_role(self) -> Network:
        other = "beta" if self.role == "student" else "alpha"
        if getattr(self, other) is not None:
            mine = "alpha" if self.role == "student" else "beta"
            raise ValueError(f"{other} is not for a {self.role}; its weight is {mine}")
        return self


class PairSettings(Section):
    """One teacher with one student: what differs from the networks' and the run's settings."""

    enabled: bool = True
    """false: the two neither learn from each other nor switch."""
    temperature: Temperature | None = None
    """tau of this pair's distances and KL terms."""
    alpha: NonNegative | None = None
    """Weight of the teacher's KL term in this student's loss."""
    beta: NonNegative | None = None
    """Weight of the student's KL term in this teacher's loss."""


class Distillation(Section):
    """The method's settings."""

    strategy: KeyText = "switokd"
    """switokd, threshold, vanilla, dml, kd, kdcl-naive/-linear/-minlogit/-general, module:name."""
    strategy_kwargs: dict[str, Any] = {}
    """The strategy's arguments, such as {delta: 0.5} for threshold."""
    semantics: str = "paper"
    """paper, or published: the released code's departures from it (2T1S and 1T2S)."""
    temperature: Temperature = 1.0
    """tau: softens predictions in distances and KL terms."""
    alpha: NonNegative = 1.0
    """Weight of the KL terms in a student's loss."""
    beta: NonNegative = 1.0
    """Weight of the KL terms in a teacher's loss."""

    @model_validator(mode="after")
    def _known(self) -> Distillation:
        if self.semantics not in SEMANTICS:
            raise ValueError(f"semantics: one of {', '.join(SEMANTICS)}")
        if ":" not in self.strategy:  # a user's own is imported once its folder can be
            self.make_strategy()
        return self

    def make_strategy(self) -> Strategy:
        """Make the strategy; ValueError, with a sentence, if that cannot be."""
        try:
            return make_strategy(self.strategy, self.strategy_kwargs)
        except UsageError as error:
            raise ValueError(str(error)) from None


class Schedule(Section):
    """How long, and with which learning rate."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training images."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many steps even if epochs are left."""
    name: Literal["multistep", "cosine"] = "multistep"
    """multistep (by milestones), or cosine (step by step from the learning rates to min_lr)."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """multistep: after so many epochs each, the learning rates are multiplied by gamma."""
    gamma: Positive = 0.1
    """multistep: factor of the learning rates at each milestone."""
    min_lr: NonNegative = 0.0
    """cosine: the learning rate where all epochs end; max_steps cuts the curve short."""
    warmup_epochs: NonNegative = 0.0
    """Epochs over which the learning rates first rise in proportion to the step; may be 0.5."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Update every so many steps, by their gradients' mean; a paused step adds none to it."""
    ema_decay: Fraction | None = None
    """Keep a moving average of the weights, tested beside them; 0.999 is usual, null is none."""
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Test the networks after every so many epochs, and always after the last."""

    @model_validator(mode="after")
    def _settings_of_its_kind(self) -> Schedule:
        if self.name == "cosine" and self.milestones:
            raise ValueError("milestones are for multistep; set schedule.milestones=[] with cosine")
        if self.name == "multistep" and self.min_lr:
            raise ValueError("min_lr is for cosine; set schedule.name=cosine, or leave it out")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be fewer than epochs, found {self.warmup_epochs:g} of "
                f"{self.epochs}"
            )
        return self


class Compute(Section):
    """How the arithmetic is done."""

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """fp32 (as PyTorch has it); tf32 (GPUs); bf16, fp16 (forward only; fp16 with loss scaling)."""
    channels_last: bool = True
    """Keep images and convolutions in NHWC order, which most processors are faster in."""
    compile: bool = False
    """Compile each network with torch.compile: a minute at the start, faster steps after it."""
    cuda_graphs: bool | None = None
    """On GPUs: record work and launch it as a whole; null: all, but for networks of others."""
    fused_optimizer: bool = True
    """Update all of a network's weights by one fused kernel."""
    keep_memory: bool = True
    """On CPUs: keep freed memory for the next step, and in huge pages where the system has them."""
    data_on_device: bool | None = None
    """Hold all images on the GPU and augment them there; null: if they are arrays, and small."""
    copy_ahead: bool = True
    """On GPUs: bring the next batch there while this one is worked on, from pinned memory."""
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

    @model_validator(mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """Read `coordinator: off`, in YAML a truth value, as the address."""
        if value is False or value == "off":
            return {"address": "off"}
        if not isinstance(value, dict | Coordinator):
            raise ValueError("off, or keys and values such as {address: HOST:PORT}")
        return value

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
