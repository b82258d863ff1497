"""One training step of one rank. This is the whole of it.

Symbols as in the paper: z are logits `[B, C]`, y labels `[B]` or target distributions `[B, C]`. A
rank holds one network or several (`learners`), and of each batch the part that its place gives it.

Not covered: where the batch comes from, logging, evaluation (`trainer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from switokd.coordination.decider import Decider
from switokd.distillation.distances import (
    Parts,
    as_parts,
    count_correct,
    pair_sums,
    to_host,
)
from switokd.distillation.method import Method
from switokd.distillation.topology import Pair
from switokd.training.exchange import Exchange, Gathered, adding_up
from switokd.training.learner import Learner


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind for whoever watches: the whole batch's logits and targets.

    `losses` are this rank's parts of the batch's mean losses, of those networks that learned;
    `correct` is how many samples of its part each of its networks had right; `paused` names those
    of its teachers that did not learn. By CUDA graphs the next step writes over the tensors.
    """

    logits: Mapping[str, Tensor]
    y: Tensor
    losses: Mapping[str, Tensor]
    correct: Mapping[str, int]
    paused: tuple[str, ...]

    @cached_property
    def labels(self) -> Tensor:
        """Each sample's class `[n]`; where targets are distributions, the one with most of it."""
        return self.y if self.y.dim() == 1 else self.y.argmax(dim=1)


def train_step(
    learners: Sequence[Learner],
    step: int,
    x: Tensor,
    y: Tensor,
    n: int,
    method: Method,
    exchange: Exchange,
    decider: Decider,
) -> StepResult:
    """Train on one batch of `n` samples, of which x `[b, ...]` and y are this rank's part."""
    place = exchange.place
    # Forward, in train mode also when paused, so that BatchNorm's statistics keep moving.
    mine = {learner.name: place.local(learner.name, n) for learner in learners}
    shards = {learner.name: place.shard(learner.name, n) for learner in learners}
    z: dict[str, Tensor] = {}
    for learner in learners:
        shard = shards[learner.name]
        if shard.stop > shard.start:
            z[learner.name] = learner.forward(x[mine[learner.name]], step, shard.start)
    everyone = exchange(step, z, {name: y[mine[name]] for name in mine}, n)  # detached, all of it

    # The distances of this rank's teachers to their students, by shard. A student needs none.
    parts, correct = _measure(everyone, shards, method, exchange, decider.pairs)
    decider.report(step, parts, everyone.seconds)

    # While the report travels: whoever has the numbers can decide, and a student need not wait.
    early = decider.decide_early(step, parts)
    peers = dict(everyone.logits)
    if method.combines:
        peers |= method.strategy.combine(*everyone.copies())
    losses: dict[str, Tensor] = {}
    learning = []
    ordered = sorted(learners, key=lambda learner: learner.is_teacher)
    for learner in ordered:
        decision = (early or decider.decision(step)) if learner.is_teacher else None
        if decision is not None and learner.name in decision.paused:
            continue  # weights, momentum, weight decay: all untouched; no gradients travel
        learning.append(learner)
        loss = None
        if learner.name in z:
            shard = shards[learner.name]
            logits = {name: z_i[shard] for name, z_i in peers.items()}
            terms = method.terms(learner.name, decision)
            loss = learner.loss(z[learner.name], everyone.y[shard], logits, terms)
            if (share := (shard.stop - shard.start) / n) != 1:
                loss = loss * share  # of the batch's mean
            losses[learner.name] = loss.detach()
            if decision is not None and method.zeroes_loss(learner.name, decision):
                loss = loss * 0  # as published for 1T2S: momentum and weight decay go on
        learner.backward(loss, step)

    for learner in ordered:
        if learner.is_teacher and learner.updates.are_due(step):
            decider.decision(step)  # nothing is applied that the authority has not decided
        with exchange.watched(adding_up(step)):
            learner.update(step)  # by what it has learned, in this step or in several
    paused = tuple(learner.name for learner in learners if learner not in learning)
    return StepResult(everyone.logits, everyone.y, losses, correct, paused)


def _measure(
    everyone: Gathered,
    own: Mapping[str, slice],
    method: Method,
    exchange: Exchange,
    pairs: Sequence[Pair],
) -> tuple[Parts, dict[str, int]]:
    """Distances of these pairs, and how many samples each network of `own` has right in its shard.

    They come to the host with the exchange's vitals, which are checked: the step's only wait for
    the device.
    """
    n, place = len(everyone.y), exchange.place
    shards = {pair.teacher: place.shards(pair.teacher, n) for pair in pairs}

    def measured(y: Tensor, *z: Tensor) -> tuple[Tensor, Tensor]:
        logits = dict(zip(everyone.logits, z, strict=True))
        return pair_sums(pairs, logits, y, shards, method.taus), count_correct(logits, y, own)

    found = exchange.graphed_functions("measured", measured, everyone.y, *everyone.logits.values())
    health, sums, right = to_host(everyone.health, *found)
    exchange.check(health)
    correct = {name: int(number) for name, number in zip(own, right, strict=True)}
    return as_parts(pairs, shards, sums), correct
