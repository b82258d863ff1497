"""One training step of one rank, from the images to the optimizer step.

Source: Qian et al., Switchable Online Knowledge Distillation, ECCV 2022, arXiv:2209.04996.
Symbols as in the paper: z are logits `[B, C]`; y are labels `[B]` or target distributions
`[B, C]`. A rank holds one or several networks (`learners`), and the part of each batch that its
placement assigns to it.

Not covered: loading batches, logging, evaluation (`trainer.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from zlib import crc32

import torch
from torch import Tensor

from switokd.coordination.decider import Decider
from switokd.data.augment import mix_one, seed_generators
from switokd.distillation.couplings import Term
from switokd.distillation.decision import Decision
from switokd.distillation.distances import (
    Parts,
    as_parts,
    count_correct,
    pair_sums,
    to_host,
)
from switokd.distillation.method import Method
from switokd.errors import NonFiniteError
from switokd.runtime.phase import ACTIVITY, Phase
from switokd.training.cuda_graphs import GraphedFunctions
from switokd.training.exchange import Exchange, Gathered, gradient_sum
from switokd.training.learner import Learner
from switokd.training.micro_batches import aligned
from switokd.training.nonfinite import Guard


@dataclass(frozen=True)
class StepContext:
    """Everything that the steps of one rank share."""

    learners: Sequence[Learner]
    """This rank's networks."""
    method: Method
    exchange: Exchange
    decider: Decider
    functions: GraphedFunctions = field(default_factory=GraphedFunctions)
    """Captures the distances."""
    guard: Guard | None = None
    """Looks for values that are not finite; None: only at logits, and gradients on a CPU."""
    seed: int = 0
    """The run's seed, for random numbers of a user's strategy."""

    def combined(self, step: int, gathered: Gathered) -> Mapping[str, Tensor]:
        """Return the logits `[n, C]` of the peers that the strategy combines, by name."""
        if not self.method.combines:
            return {}
        self._seed_strategy(step, gathered.y)
        peers = self.method.strategy.combine(*gathered.copies())
        # A user's strategy may keep them and change them in a later call.
        return {k: z.detach().clone() for k, z in peers.items()} if self.method.is_own else peers

    def terms(self, step: int, y: Tensor, name: str, decision: Decision | None) -> Sequence[Term]:
        """Return the KL terms of a network's loss; `decision` is None for a student."""
        self._seed_strategy(step, y, name)
        return list(self.method.terms(name, decision))

    def _seed_strategy(self, step: int, y: Tensor, network: str = "") -> None:
        """Seed the generators before a call of a user's strategy, the same on all ranks."""
        if self.method.is_own:
            key = mix_one(self.seed, step, crc32(f"strategy {network}".encode()))
            seed_generators(key, y.device)


@dataclass(frozen=True)
class StepResult:
    """What one step computed; with CUDA graphs the next step overwrites the tensors."""

    logits: Mapping[str, Tensor]
    """By network: the whole batch's logits `[n, C]`."""
    y: Tensor
    """The whole batch's labels `[n]` or distributions `[n, C]`."""
    losses: Mapping[str, Tensor]
    """This rank's share of the batch's mean loss, for its networks that were not paused; the shares
    of its micro-batches if it has several."""
    correct: Mapping[str, int]
    """By network of this rank: number of correct samples in its shard."""
    applied: Mapping[str, Decision]
    """By teacher of this rank: the decision that it has applied."""
    exchanged_at: float
    """When the exchange was complete, on the clock of `time.perf_counter`."""
    peers: Mapping[str, Tensor] = field(default_factory=dict)
    """Logits `[n, C]` that networks have learned from, by name."""
    terms: Mapping[str, Sequence[Term]] = field(default_factory=dict)
    """By network of this rank that has learned: the KL terms of its loss."""

    @property
    def paused(self) -> tuple[str, ...]:
        """This rank's teachers that were paused."""
        return tuple(name for name, decision in self.applied.items() if name in decision.paused)

    @cached_property
    def labels(self) -> Tensor:
        """Class of each sample `[n]`; of a soft target, the class with the largest probability."""
        return self.y if self.y.dim() == 1 else self.y.argmax(dim=1)


def train_step(context: StepContext, step: int, x: Tensor, y: Tensor, n: int) -> StepResult:
    """Train on one batch of `n` samples; x `[b, ...]` and y are the part that this rank loaded.

    NonFiniteError, PeerError: as in `Exchange.check`, `Guard.check`; no weight has changed here.
    """
    learners, method, decider = context.learners, context.method, context.decider
    exchange, placement, guard = context.exchange, context.exchange.local_placement, context.guard
    ACTIVITY.begin(Phase.FORWARD, step)
    if guard:
        guard.begin()
    # Forward in train mode, also for paused teachers: their BatchNorm statistics keep moving.
    y_own = {learner.name: y[placement.local(learner.name, n)] for learner in learners}
    shards = {learner.name: placement.shard(learner.name, n) for learner in learners}
    parts = {learner.name: placement.parts(learner.name, n) for learner in learners}
    z = {  # by network: logits of each micro-batch; usually the shard is the only one
        li.name: li.forward_parts(x[placement.local(li.name, n)], step, parts[li.name], n)
        for li in learners
    }
    ACTIVITY.begin(Phase.EXCHANGE)
    gathered = exchange(step, _whole_shards(z), y_own, n)  # detached

    # Distances between this rank's teachers and their students; a student's rank needs none.
    ACTIVITY.begin(Phase.DECIDING)
    sums, correct = _measure(context, step, gathered, shards)
    exchanged = time.perf_counter()
    decider.report(step, sums, gathered.seconds)

    # While the report travels, a teacher's rank may decide early; students need no decision.
    early = decider.decide_early(step, sums)
    peers = {**gathered.logits, **context.combined(step, gathered)}
    losses: dict[str, Tensor] = {}
    used: dict[str, Sequence[Term]] = {}
    applied: dict[str, Decision] = {}
    students_first = sorted(learners, key=lambda learner: learner.is_teacher)
    for learner in students_first:
        name = learner.name
        decision = (early or decider.decision(step)) if learner.is_teacher else None
        if decision is not None:
            applied[name] = decision
            if name in decision.paused:
                continue  # no backward pass: weights and momentum stay unchanged
        ACTIVITY.begin(Phase.BACKWARD)
        terms = partial(context.terms, step, gathered.y, name, decision)
        own, used[name] = _losses(learner, z[name], gathered.y, peers, parts[name], terms)
        if present := [loss.detach() for loss in own if loss is not None]:
            losses[name] = present[0] if len(present) == 1 else torch.stack(present)
        if decision is not None and method.zeroes_loss(name, decision):
            # published 1T2S code: momentum and weight decay go on
            own = [None if loss is None else loss * 0 for loss in own]
        with exchange.watched(gradient_sum(step)) if learner.buffers else nullcontext():
            learner.backward_parts(own, step, [part.start for part in parts[name]])

    if guard:
        guard.check(step, losses)
    for learner in students_first:
        if learner.is_teacher and learner.optimizer_step.is_due(step):
            decider.decision(step)  # an early decision must be confirmed before weights change
        with exchange.watched(gradient_sum(step)):
            learner.update(step)
    return StepResult(gathered.logits, gathered.y, losses, correct, applied, exchanged, peers, used)


def _whole_shards(z: Mapping[str, Sequence[Tensor | None]]) -> dict[str, Tensor]:
    """Join the logits of each network's micro-batches; no entry for an empty shard."""
    shards = {}
    for name, parts in z.items():
        present = [z_part for z_part in parts if z_part is not None]
        if present:  # the exchange refuses anything that is not logits `[b, C]`
            are_logits = all(isinstance(p, Tensor) and p.dim() == 2 for p in present)
            can_join = len(present) > 1 and are_logits
            shards[name] = torch.cat([p.detach() for p in present]) if can_join else present[0]
    return shards


def _losses(
    learner: Learner,
    z: Sequence[Tensor | None],
    y: Tensor,
    peers: Mapping[str, Tensor],
    parts: Sequence[slice],
    terms: Callable[[], Sequence[Term]],
) -> tuple[list[Tensor | None], Sequence[Term]]:
    """Return what each micro-batch adds to the whole batch's mean loss, and the KL terms.

    The former is None for an empty micro-batch.
    z: logits of the micro-batches. y, peers: targets and peers' logits of the whole batch. terms:
    returns those of the network's loss; not called if all micro-batches are empty.
    """
    if all(z_part is None for z_part in z):
        return [None for _ in z], ()
    terms_of_loss = terms()
    cut = aligned if learner.buffers else (lambda tensor: tensor)
    losses: list[Tensor | None] = []
    for z_part, part in zip(z, parts, strict=True):
        if z_part is None:
            losses.append(None)
            continue
        logits = {name: cut(z_i[part]) for name, z_i in peers.items()}
        loss = learner.loss(z_part, cut(y[part]), logits, terms_of_loss)
        share = (part.stop - part.start) / len(y)
        losses.append(loss if share == 1 else loss * share)
    return losses, terms_of_loss


def _report_nothing(context: StepContext, step: int, gathered: Gathered) -> None:
    """Report the distances that logits of zeros have, for a step that is not applied."""
    pairs, n = context.decider.pairs, len(gathered.y)
    shards = {p.teacher: context.exchange.local_placement.shards(p.teacher, n) for p in pairs}
    zeros = {name: z.new_zeros(z.shape) for name, z in gathered.logits.items()}
    sums = pair_sums(pairs, zeros, gathered.y, shards, context.method.taus).tolist()
    context.decider.report(step, as_parts(pairs, shards, sums))


def _measure(
    context: StepContext, step: int, gathered: Gathered, own_shards: Mapping[str, slice]
) -> tuple[Parts, dict[str, int]]:
    """Return the pairs' distances by shard, and each own network's number of correct samples.

    Both are copied to the host together with the exchange's health, which is checked here. This
    copy is the only time that a step waits for the device.
    """
    pairs, exchange = context.decider.pairs, context.exchange
    n, taus = len(gathered.y), context.method.taus
    exact = exchange.local_placement.placement.micro_batches > 1
    shards = {pair.teacher: exchange.local_placement.shards(pair.teacher, n) for pair in pairs}

    def measure(y: Tensor, *z: Tensor) -> tuple[Tensor, Tensor]:
        logits = dict(zip(gathered.logits, z, strict=True))
        return pair_sums(pairs, logits, y, shards, taus, exact), count_correct(
            logits, y, own_shards
        )

    tensors = gathered.y, *gathered.logits.values()
    health, sums, counts = to_host(
        gathered.health, *context.functions("measure", measure, *tensors)
    )
    try:
        exchange.check(health)
    except NonFiniteError:
        if context.guard and context.guard.skips:
            _report_nothing(context, step, gathered)  # the record must not have a hole
        raise
    correct = {name: int(count) for name, count in zip(own_shards, counts, strict=True)}
    return as_parts(pairs, shards, sums), correct
