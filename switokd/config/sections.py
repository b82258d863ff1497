"""The sections of a run file: every setting with its type, default and meaning.

The docstring below a setting is its documentation: `switokd settings` prints it.

Not covered: the data set (`data_section.py`); the optimizers (`optimizers.py`); checks between
sections (`checks.py`).
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

from switokd.config.base import (
    MOST_RANKS,
    Fraction,
    KeyText,
    NonNegative,
    Positive,
    Seconds,
    Section,
    Temperature,
)
from switokd.config.optimizers import SGD, Adam, AdamW, optimizer_name
from switokd.config.tls import Tls
from switokd.distillation.semantics import SEMANTICS
from switokd.distillation.strategies import make_strategy
from switokd.distillation.strategies.base import Strategy
from switokd.errors import UsageError
from switokd.models.families import allowed_instead


def _check_shares(value: Any) -> Any:
    """Return a valid share of steps, or shares by teacher; ValueError otherwise.

    Checked before pydantic's union, which would report one error for every member type.
    """
    for share in value.values() if isinstance(value, dict) else [value]:
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if value is not None and not (is_number and 0 <= share <= 1):
            raise ValueError("a share from 0 to 1 for every teacher, or {TEACHER: SHARE, ...}")
    return value


class Auto(Section):
    """What the user already knows, so that placement: auto need not measure or assume it."""

    profiles: tuple[KeyText, ...] = ()
    """Saved profiles to use instead of measuring: files from a run's profiles/ or from
    'switokd plan --save-profile'."""
    run: KeyText | None = None
    """Folder of an earlier run; its teachers' pauses are the expected pauses of this run."""
    paused: Annotated[
        Union[float, dict[str, float], None],  # noqa: UP007
        BeforeValidator(_check_shares),
    ] = None
    """Expected share of steps in which a teacher pauses: 0.5 for all, or {TEACHER: 0.5};
    null: 0.3."""


def _check_key(value: Any) -> Any:
    """Return a valid key of an output; ValueError otherwise, in one line for all types."""
    if isinstance(value, bool) or not (value is None or isinstance(value, int | str)):
        raise ValueError("a key, an attribute or an index, such as logits or 0")
    return value


class Network(Section):
    """One network of the run: its role, model and optimizer."""

    role: Literal["teacher", "student"]
    """teacher or student; a run needs at least one of both."""
    model: KeyText
    """Name of the model (see 'switokd networks'), or package.module:callable."""
    model_kwargs: dict[str, Any] = {}
    """Keyword arguments for the model's callable."""
    output: Annotated[KeyText | int | None, BeforeValidator(_check_key)] = None
    """Where the logits are, if the model returns a tuple, a dict or an object: a key, an attribute
    or an index, such as logits or 0; null: guessed where only one part can be meant."""
    ranks: Annotated[int, Field(ge=1, le=MOST_RANKS)] = 1
    """Processes that share this network's batch; for placement: dedicated."""
    optimizer: Annotated[
        Annotated[SGD, Tag("sgd")] | Annotated[Adam, Tag("adam")] | Annotated[AdamW, Tag("adamw")],
        Discriminator(optimizer_name),
    ] = SGD()
    clip_norm: Positive | None = None
    """Largest L2 norm of the gradient over all parameters; larger gradients are scaled down;
    null: no limit."""
    weights: KeyText | None = None
    """File with a state dict to start from, such as weights/NAME.pt of a run; null: the
    model's own initial weights."""
    weights_key: KeyText | None = None
    """Where the state dict is in that file, such as state_dict_ema; null: the only one that
    fits, or the only one that is no moving average."""
    fresh_classifier: bool = False
    """Keep the model's own initial weights in a classifier that has another number of classes in
    that file; false: refuse the file."""
    temperature: Temperature | None = None
    """tau of the KL terms in this network's loss and, for a student, of its pairs' distances;
    null: distillation.temperature."""
    alpha: NonNegative | None = None
    """Students only: weight of the KL terms in the loss; null: distillation.alpha."""
    beta: NonNegative | None = None
    """Teachers only: weight of the KL terms in the loss; null: distillation.beta."""

    @field_validator("model")
    @classmethod
    def _check_model(cls, name: str) -> str:
        if allowed := allowed_instead(name):
            raise ValueError(f"{allowed}; see 'switokd networks'")
        return name

    @model_validator(mode="after")
    def _check_weights(self) -> Network:
        if self.weights is None and (self.weights_key is not None or self.fresh_classifier):
            key = "fresh_classifier" if self.fresh_classifier else "weights_key"
            raise ValueError(f"{key} is for weights from a file; set weights, or leave it out")
        return self

    @model_validator(mode="after")
    def _check_weight(self) -> Network:
        weight, other = ("alpha", "beta") if self.role == "student" else ("beta", "alpha")
        if getattr(self, other) is not None:
            raise ValueError(f"{other} is not a setting of a {self.role}; use {weight}")
        return self


class PairSettings(Section):
    """Settings of one teacher with one student, in place of the networks' and the run's."""

    enabled: bool = True
    """false: the two networks do not learn from each other, and the pair does not switch."""
    temperature: Temperature | None = None
    """tau of the pair's distances and KL terms; null: the networks' own."""
    alpha: NonNegative | None = None
    """Weight of the teacher's KL term in the student's loss; null: the student's alpha."""
    beta: NonNegative | None = None
    """Weight of the student's KL term in the teacher's loss; null: the teacher's beta."""


class Distillation(Section):
    """The distillation method: strategy, temperature and weights of the KL terms."""

    strategy: KeyText = "switokd"
    """switokd, threshold, vanilla, dml, kd, kdcl-naive, kdcl-linear, kdcl-minlogit,
    kdcl-general, or package.module:callable for your own."""
    strategy_kwargs: dict[str, Any] = {}
    """Keyword arguments for the strategy, such as {delta: 0.5} for threshold."""
    semantics: str = "paper"
    """paper: the paper's formulas; published: those of the released code, which differ in 2T1S
    and 1T2S."""
    temperature: Temperature = 1.0
    """tau: the logits are divided by tau in distances and KL terms."""
    alpha: NonNegative = 1.0
    """Weight of the KL terms in a student's loss."""
    beta: NonNegative = 1.0
    """Weight of the KL terms in a teacher's loss."""

    @model_validator(mode="after")
    def _check_method(self) -> Distillation:
        if self.semantics not in SEMANTICS:
            raise ValueError(f"semantics: one of {', '.join(SEMANTICS)}")
        if ":" not in self.strategy:  # the user's own is imported later, from `import_from`
            self.make_strategy()
        return self

    def make_strategy(self) -> Strategy:
        """Make the strategy; ValueError if its name or arguments are invalid."""
        try:
            return make_strategy(self.strategy, self.strategy_kwargs)
        except UsageError as error:
            raise ValueError(str(error)) from None


class Schedule(Section):
    """Length of the training, learning rates, accumulation and evaluation."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training images."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this number of steps, even within an epoch; null: after all epochs."""
    name: Literal["multistep", "cosine"] = "multistep"
    """multistep: the learning rates fall at milestones; cosine: they fall in every step, along
    half a cosine, to min_lr."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """multistep: numbers of finished epochs after which learning rates are multiplied by gamma."""
    gamma: Positive = 0.1
    """multistep: factor of the learning rates at every milestone."""
    min_lr: NonNegative = 0.0
    """cosine: learning rate at the end of the last epoch; max_steps stops before that."""
    warmup_epochs: NonNegative = 0.0
    """Epochs, 0.5 for instance, in which the learning rates rise linearly from 0; 0: none."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Steps per optimizer update, which uses the mean gradient; a step in which a teacher
    pauses counts as 0."""
    ema_decay: Fraction | None = None
    """Decay of a moving average of the weights, which is tested as well; 0.999 is usual;
    null: none."""
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    """Epochs between tests of the networks; the last epoch always ends with a test."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens if logits, a loss, a gradient or a buffer is not finite. stop: the run ends;
    skip: no network applies the step, and the run goes on."""
    max_skipped: Annotated[int, Field(ge=1)] = 3
    """skip: steps in a row that may be skipped; one more ends the run."""

    @model_validator(mode="after")
    def _check_schedule(self) -> Schedule:
        if self.name == "cosine" and self.milestones:
            raise ValueError("milestones are for multistep; set schedule.milestones=[] with cosine")
        if self.name == "multistep" and self.min_lr:
            raise ValueError("min_lr is for cosine; set schedule.name=cosine, or leave it out")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be less than epochs, found {self.warmup_epochs:g} of "
                f"{self.epochs}"
            )
        return self


class Compute(Section):
    """Precision, memory and kernels: how a rank computes."""

    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Number format: fp32; tf32 (GPUs only); bf16 or fp16 in the forward pass. fp16 scales the
    loss."""
    channels_last: bool = True
    """Keep images and convolutions in NHWC order, which is faster on most processors."""
    compile: bool = False
    """Compile every network with torch.compile: a minute more at the start, then faster steps."""
    cuda_graphs: bool | None = None
    """GPUs only: capture kernels as CUDA graphs and launch a graph as a whole; null: for
    switokd's own networks, if accumulate is 1 and batch_norm is rank."""
    fused_optimizer: bool = True
    """Update all weights of a network with one fused kernel."""
    keep_memory: bool = True
    """CPUs only: keep freed memory for the next step, in huge pages where the system has them."""
    data_on_device: bool | None = None
    """GPUs only: hold all images in GPU memory and augment them there; null: if the data
    set is in memory and takes less than a twentieth of the free GPU memory."""
    copy_ahead: bool = True
    """GPUs only: copy the next batch from pinned memory during the current step."""
    batch_norm: Literal["rank", "sync"] = "rank"
    """BatchNorm statistics of a network on several ranks: rank (every rank its own) or sync
    (over all its ranks; GPUs only)."""
    micro_batches: Annotated[int, Field(ge=1, le=MOST_RANKS)] = 1
    """Parts in which every network's batch is computed: 1, 2, 4, 8 and so on. From 2, the result
    is the same bits on 1 rank per network, on 2, and so on up to that number."""

    @field_validator("micro_batches")
    @classmethod
    def _check_micro_batches(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("1, 2, 4, 8 and so on")
        return value


class Checkpoint(Section):
    """When the state of the whole run is saved, so that the run can be continued."""

    every_minutes: Annotated[float, Field(gt=0)] | None = 5.0
    """Save a checkpoint when this many minutes have passed since the last one; null: never."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Save a checkpoint after every so many steps as well; null: never."""
    keep: Annotated[int, Field(ge=0)] = 2
    """Number of checkpoints that stay on the disk; 0: none is saved, also not after the last step
    and on SIGTERM."""


class Coordinator(Section):
    """The coordinator: address, identity, port for metrics, and timeout."""

    address: KeyText = "auto"
    """auto: rank 0 starts a coordinator; HOST:PORT: use a running one, or one of several separated
    by commas, which the run's id chooses; off: none, for a run of one process."""
    tls: Tls = Tls()
    token_file: KeyText | None = None
    """File with the token that the coordinator at `address` asks for; null: the environment
    variable SWITOKD_TOKEN, if it is set."""
    allow_plaintext: bool = False
    """Allow a coordinator on another machine without TLS: whoever is on the network between them
    can read the run and take part in it."""
    http_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port for /metrics of the coordinator that rank 0 starts; 0: any free port."""
    timeout: Seconds = 60.0
    """Seconds without a message from a rank or the coordinator after which the run stops."""
    on_loss: Literal["decide_alone", "wait", "stop"] = "decide_alone"
    """If the coordinator is lost or slow. decide_alone: a teacher's ranks decide by themselves, in
    the same way, until it is back; wait: they wait up to `timeout`; stop: the run stops."""
    deadline: Seconds = 1.0
    """Seconds that a teacher waits for a decision before its ranks decide alone."""

    @model_validator(mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        """Read `coordinator: off` as `coordinator: {address: off}`; YAML 1.1 reads false."""
        if value is False or value == "off":
            return {"address": "off"}
        if not isinstance(value, dict | Coordinator):
            raise ValueError("off, or keys and values such as {address: HOST:PORT}")
        return value

    @field_validator("address", mode="before")
    @classmethod
    def _check_address(cls, value: Any) -> Any:
        if value is False:  # what YAML 1.1 reads for off
            return "off"
        if isinstance(value, str) and value not in ("auto", "off"):
            for address in value.split(","):
                port = re.fullmatch(r"[^\s,]+:(\d{1,5})", address.strip())
                if not (port and 0 < int(port[1]) < 65536):
                    raise ValueError("auto, off, or HOST:PORT (several: with commas)")
        return value
