"""Each step's logits and targets, from every network to every rank, by one collective.

A rank sends the logits and targets of its shards with the step number and the configuration's
digest in front. All ranks receive all of it, so all of them find at once, and find the same, if
one is out of step, was started differently, has other data, or has diverged. In a run of one
process nothing travels, and all else is the same.

Not covered: logits too large to go to everyone (a language model's).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from switokd.errors import NonFiniteError, PeerError, UsageError
from switokd.runtime.device import to_device
from switokd.runtime.placement import LocalPlacement
from switokd.runtime.process_group import collective_errors
from switokd.runtime.watchdog import Watchdog
from switokd.training.cuda_graphs import GraphedFunctions

# PyTorch 2.14 renames it, and warns of the old name.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
HEADER = 2  # step, digest: int64, each as long as two float32

Offsets = dict[str, dict[int, tuple[int, int]]]
"""By network and rank: where its shard begins in the rank's row, and its samples."""


@dataclass(frozen=True)
class Gathered:
    """Every network's logits `[n, C]` in float32, detached, by name; the batch's targets.

    Those are labels `[n]`, or distributions `[n, C]` in float32 where they are soft. All of it is
    the step's: by CUDA graphs the next exchange writes over it; whoever may keep it takes `copies`.

    `vitals` is for `Exchange.check`, once it is on the host. `seconds`: what the collective took,
    mostly waiting for the slowest rank; unknown where it runs in a GPU's queue.
    """

    logits: Mapping[str, Tensor]
    y: Tensor
    health: Tensor
    seconds: float | None

    def copies(self) -> tuple[Mapping[str, Tensor], Tensor]:
        """Logits and targets in memory of their own."""
        return {name: z.clone() for name, z in self.logits.items()}, self.y.clone()


def adding_up(step: int) -> str:
    """What ranks wait for after a step's exchange, in words."""
    return f"adding up the gradients of step {step}"


class Exchange:
    """Gathers logits over a process group of all ranks, None for the default one.

    place: this rank's. transport: device of the collective's tensors, None for the logits' own.
    soft_targets: whether targets are distributions; from the configuration, so that ranks agree.
    routines: what records the work before and after the collective, by default nothing.
    """

    def __init__(
        self,
        place: LocalPlacement,
        digest: str,
        classes: int,
        group: dist.ProcessGroup | None = None,
        transport: torch.device | None = None,
        soft_targets: bool = False,
        graphed_functions: GraphedFunctions | None = None,
    ) -> None:
        self.place = place
        self.graphed_functions = graphed_functions or GraphedFunctions()
        self.passed_at = 0.0
        """When the last exchange was over, on the clock of `time.perf_counter`."""
        self.watchdog: Watchdog | None = None
        """Who tells of an exchange that takes too long, where none of its timeouts does."""
        self._group = group
        self.seconds: float | None = None
        """What all collectives so far have taken; None where it is not known."""
        self._classes = classes
        self._soft = soft_targets
        # What a sample's target takes, in float32: a label's 64 bits, or a distribution.
        self._target_length = classes if soft_targets else 2
        self._digest = int(digest[:12], 16)  # 48 bits: exact in float64 as well
        self._header: Tensor | None = None
        """On the logits' device, where nothing has to be brought to."""
        self._transport = transport
        self._layout = cache(self._lay_out)

    def __call__(
        self, step: int, z: Mapping[str, Tensor], y: Mapping[str, Tensor], n: int
    ) -> Gathered:
        """Send this rank's shards of a batch of `n`, and receive everyone's.

        z: logits `[b, C]` by network, none for an empty shard. y: labels `[b]` or
        distributions `[b, C]` by network.
        CollectiveError if the collective fails, UsageError if z is not of shape `[b, classes]`.
        """
        doing = f"exchanging the logits of step {step}"
        offsets, length = self._layout(n)
        self._check_shapes(z, y)
        if self.watchdog:
            self.watchdog.begin(doing)
        if self._header is None:
            device = next(iter(y.values())).device
            self._header = to_device(device, torch.tensor([step, self._digest]))
        self._header[:1].fill_(step)
        names = [name for name in self.place.networks if name in z]
        mine = [tensor for name in names for tensor in (z[name].detach(), y[name])]
        row = self.graphed_functions(("pack", length), partial(_pack, length), self._header, *mine)
        sent = self._for_transport(row)  # from a GPU it comes when its forward passes are over
        started = time.perf_counter()
        everyone = self._gather(sent, doing)
        seconds = time.perf_counter() - started if everyone.device.type == "cpu" else None
        if seconds is not None:
            self.seconds = (self.seconds or 0.0) + seconds
        everyone, unpack = everyone.to(row.device), partial(self._unpack, offsets)
        health, targets, *logits = self.graphed_functions(("unpack", n), unpack, everyone)
        return Gathered(dict(zip(offsets, logits, strict=True)), targets, health, seconds)

    def _unpack(self, offsets: Offsets, everyone: Tensor) -> list[Tensor]:
        """Vitals, targets, and each network's logits, of all ranks' rows."""
        logits, labels = [], []
        for shards in offsets.values():
            rows, targets = [], []
            for rank, (start, b) in shards.items():
                middle = start + b * self._classes
                stop = middle + b * self._target_length
                rows.append(everyone[rank, start:middle].view(b, self._classes))
                targets.append(self._as_targets(everyone[rank, middle:stop].clone()))
            logits.append(torch.cat(rows) if len(rows) > 1 else rows[0])
            labels.append(torch.cat(targets) if len(targets) > 1 else targets[0])
        headers = everyone[:, : 2 * HEADER].flatten().view(torch.int64)
        bad = (~torch.stack(logits).isfinite()).flatten(1).sum(dim=1)
        other = (torch.stack(labels) != labels[0]).flatten(1).sum(dim=1)
        return [torch.cat([headers, bad, other]).double(), labels[0], *logits]

    def check(self, health: Sequence[float]) -> None:
        """Raise if the ranks are not at the same point of the same run, or one has diverged.

        NonFiniteError and PeerError are raised on every rank alike.
        """
        self.passed_at = time.perf_counter()
        if self.watchdog:
            self.watchdog.over()
        placement = self.place.placement
        in_front = HEADER * placement.world_size
        headers, rest = health[:in_front], health[in_front:]
        step = int(headers[0])
        for rank in range(placement.world_size):
            theirs, digest = headers[HEADER * rank : HEADER * (rank + 1)]
            who, problem = placement.who(rank), None
            if digest != headers[1]:
                problem = f"{who} was started with another configuration than rank 0"
            elif theirs != step:
                problem = f"{who} is at step {int(theirs)}, rank 0 at step {step}"
            if problem:
                raise PeerError(f"ranks are out of step: {problem}")
        names = placement.networks
        for name, others in zip(names, rest[len(names) :], strict=True):
            if others:
                raise PeerError(
                    f"ranks are out of step: {placement.whose(name)} has other labels than "
                    f"{placement.whose(names[0])} at step {step}: its data differ"
                )
        for name, bad in zip(names, rest[: len(names)], strict=True):
            if bad:
                raise NonFiniteError(
                    f"network {placement.whose(name)} has logits that are not finite at step "
                    f"{step}; the step was not applied. The usual remedy is a lower "
                    f"networks.{name}.optimizer.lr"
                )

    def watched(self, doing: str) -> AbstractContextManager[None]:
        """For what waits for other ranks by itself, or by reading a GPU's numbers: the sums before
        them in its queue.
        """
        return self.watchdog.during(doing) if self.watchdog else nullcontext()

    def for_labels(self) -> Exchange:
        """One of the same place and group for targets that are labels."""
        digest = f"{self._digest:012x}"
        made = Exchange(self.place, digest, self._classes, self._group, self._transport)
        made.watchdog = self.watchdog
        return made

    def _as_targets(self, received: Tensor) -> Tensor:
        """A shard's labels `[b]` or distributions `[b, C]`, as they were sent."""
        if self._soft:
            return received.view(-1, self._classes)
        return received.view(torch.int64)

    def _check_shapes(self, z: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> None:
        """Find the wrong shape here: in the collective it would end all ranks without a word."""
        for name, z_i in z.items():
            shape = tuple(z_i.shape) if isinstance(z_i, Tensor) else type(z_i).__name__
            if shape != (len(y[name]), self._classes):
                error = UsageError(
                    f"in training the model must turn {len(y[name])} images into logits of shape "
                    f"({len(y[name])}, {self._classes}), got {shape}"
                )
                error.seen_by_every_rank = False
                raise error

    def _lay_out(self, n: int) -> tuple[Offsets, int]:
        """Where the shards of a batch of `n` lie in the ranks' rows, and the rows' length.

        Rows are as long as the longest, because Gloo gathers only equal ones.
        """
        placement = self.place.placement
        offsets: Offsets = {}
        ends = dict.fromkeys(range(placement.world_size), 2 * HEADER)
        for name in placement.networks:
            offsets[name] = {}
            for rank, shard in placement.shards(name, n).items():
                b = shard.stop - shard.start
                offsets[name][rank] = ends[rank], b
                ends[rank] += b * (self._classes + self._target_length)
        return offsets, max(ends.values())

    def _for_transport(self, row: Tensor) -> Tensor:
        """What this rank sends, where the collective needs it."""
        alone = self._transport is None or self.place.placement.world_size == 1
        return row if alone else row.to(self._transport)

    def _gather(self, row: Tensor, doing: str) -> Tensor:
        """All ranks' rows `[world size, length]`."""
        world_size = self.place.placement.world_size
        if world_size == 1:
            return row[None]
        everyone = row.new_empty(world_size * len(row))
        with collective_errors(doing):
            all_gather(everyone, row, group=self._group)
        return everyone.view(world_size, len(row))


def _pack(length: int, header: Tensor, *mine: Tensor) -> Tensor:
    """One row of a rank's header, and of its networks' logits and targets in turn.

    It is as long as everyone's. Whole numbers travel as the bits that they are.
    """
    pieces = [t if t.is_floating_point() else t.view(torch.float32) for t in (header, *mine)]
    row = torch.cat([piece.float().flatten() for piece in pieces])
    missing = length - len(row)
    return torch.cat([row, row.new_zeros(missing)]) if missing else row
