"""Sends every network's logits and targets to every rank, by one collective per step.

Each rank sends the logits and targets of its shards, behind a header with the step number and the
configuration's digest. All ranks receive the same data. Therefore all ranks detect an error in the
same step: a rank that is out of step, another configuration, other data, or a network that has
diverged. In a run of one process nothing is sent; the rest is the same.

Not covered: logits that are too large to send to every rank (language models).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntFlag
from functools import cache, partial, reduce
from operator import or_

import torch
import torch.distributed as dist
from torch import Tensor

from switokd.errors import NonFiniteError, PeerError, UsageError
from switokd.models.outputs import not_logits
from switokd.runtime.device import to_device
from switokd.runtime.placement import LocalPlacement, Placement
from switokd.runtime.process_group import collective_errors
from switokd.runtime.watchdog import Watchdog
from switokd.training.cuda_graphs import GraphedFunctions

# PyTorch 2.14 renames the function and warns about the old name.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
HEADER = 4
"""Length of the header in int64: step, digest, request, applied decisions. One int64 needs as many
bytes as two float32."""


class Request(IntFlag):
    """What a rank asks of all ranks after a step; the requests of all ranks hold together."""

    NOTHING = 0
    CHECKPOINT = 1
    """Save a checkpoint."""
    STOP = 2
    """Save a checkpoint and end the run."""
    COMMAND = 4
    """Take the commands that wait at rank 0."""


Offsets = dict[str, dict[int, tuple[int, int]]]
"""By network and rank: the start of its shard in the rank's row, and its number of samples."""


@dataclass(frozen=True)
class Gathered:
    """The logits and targets of a whole batch, as all ranks have received them.

    With CUDA graphs the next exchange overwrites the tensors; use `copies` to keep them.
    """

    logits: Mapping[str, Tensor]
    """By network: `[n, C]`, float32, detached."""
    y: Tensor
    """Labels `[n]`, or with soft targets distributions `[n, C]` in float32."""
    health: Tensor
    """Input of `Exchange.check`, once it is on the host."""
    seconds: float | None
    """Duration of the collective, mostly the wait for the slowest rank; None on a GPU."""

    def copies(self) -> tuple[Mapping[str, Tensor], Tensor]:
        """Return copies of the logits and of the targets."""
        return {name: z.clone() for name, z in self.logits.items()}, self.y.clone()


def gradient_sum(step: int) -> str:
    """Return the name of the operation that ranks wait for after the exchange of `step`."""
    return f"adding up the gradients of step {step}"


class Exchange:
    """Gathers logits and targets over a process group of all ranks.

    digest: the configuration's, in hexadecimal. classes: number of classes C. group: None is the
    default process group. transport: device that the collective needs its tensors on; None: the
    logits' device. soft_targets: whether targets are distributions. functions: captures the work
    before and after the collective. watchdog: reports an exchange that takes too long, for
    collectives without a timeout of their own.
    """

    def __init__(
        self,
        local_placement: LocalPlacement,
        digest: str,
        classes: int,
        group: dist.ProcessGroup | None = None,
        transport: torch.device | None = None,
        soft_targets: bool = False,
        functions: GraphedFunctions | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.local_placement = local_placement
        self.seconds: float | None = None
        """Duration of all collectives so far; None if it is not measured."""
        self._digest = int(digest[:12], 16)  # 48 bits, which float64 represents exactly
        self._classes, self._soft_targets = classes, soft_targets
        # Floats per target: a distribution, or a label's 64 bits.
        self._target_length = classes if soft_targets else 2
        self._group, self._transport = group, transport
        self._functions, self._watchdog = functions or GraphedFunctions(), watchdog
        self._header: Tensor | None = None
        """Kept on the logits' device, so that no step copies it there."""
        self._request, self._applied = Request.NOTHING, 0
        self.asked = Request.NOTHING
        """The requests of all ranks in the last exchange; the same on all ranks."""
        self.applied: list[int] = []
        """By rank: what it has sent in the last exchange as applied in the step before."""
        self._layout = cache(self._make_layout)

    def ask(self, request: Request, applied: int = 0) -> None:
        """Send a request to all ranks with the next exchange, and with all later ones.

        applied: see `Agreement.applied`.
        """
        if self._header is not None:
            if request != self._request:
                self._header[2:3].fill_(request)
            if applied != self._applied:
                self._header[3:].fill_(applied)
        self._request, self._applied = request, applied

    def __call__(
        self, step: int, z: Mapping[str, Tensor], y: Mapping[str, Tensor], n: int
    ) -> Gathered:
        """Send this rank's shards of a batch of `n` samples, and receive all shards.

        z: by network, logits `[b, C]`; no entry for an empty shard. y: by network, labels `[b]` or
        distributions `[b, C]`.
        CollectiveError if the collective fails, UsageError if z is not of shape `[b, classes]`.
        """
        doing = f"exchanging the logits of step {step}"
        offsets, length = self._layout(n)
        self._check_shapes(z, y)
        if self._watchdog:
            self._watchdog.begin(doing)
        if self._header is None:
            device = next(iter(y.values())).device
            values = [step, self._digest, self._request, self._applied]
            self._header = to_device(device, torch.tensor(values))
        self._header[:1].fill_(step)
        names = [name for name in self.local_placement.networks if name in z]
        shards = [tensor for name in names for tensor in (z[name].detach(), y[name])]
        row = self._functions(("pack", length), partial(_pack, length), self._header, *shards)
        sent = self._for_transport(row)  # waits for a GPU's forward passes
        started = time.perf_counter()
        rows = self._gather(sent, doing)
        seconds = time.perf_counter() - started if rows.device.type == "cpu" else None
        if seconds is not None:
            self.seconds = (self.seconds or 0.0) + seconds
        rows, unpack = rows.to(row.device), partial(self._unpack, offsets)
        health, targets, *logits = self._functions(("unpack", n), unpack, rows)
        return Gathered(dict(zip(offsets, logits, strict=True)), targets, health, seconds)

    def _unpack(self, offsets: Offsets, rows: Tensor) -> list[Tensor]:
        """Return health, targets, and each network's logits, from all ranks' rows."""
        logits, targets = [], []
        for shards in offsets.values():
            logit_parts, target_parts = [], []
            for rank, (start, b) in shards.items():
                middle = start + b * self._classes
                stop = middle + b * self._target_length
                logit_parts.append(rows[rank, start:middle].view(b, self._classes))
                target_parts.append(self._as_targets(rows[rank, middle:stop].clone()))
            logits.append(torch.cat(logit_parts) if len(logit_parts) > 1 else logit_parts[0])
            targets.append(torch.cat(target_parts) if len(target_parts) > 1 else target_parts[0])
        headers = rows[:, : 2 * HEADER].flatten().view(torch.int64)
        not_finite = (~torch.stack(logits).isfinite()).flatten(1).sum(dim=1)
        different = (torch.stack(targets) != targets[0]).flatten(1).sum(dim=1)
        return [torch.cat([headers, not_finite, different]).double(), targets[0], *logits]

    def check(self, health: Sequence[float]) -> None:
        """Raise an error if ranks are out of step, or if a network has diverged; set `asked`.

        health: the values of `Gathered.health`.
        NonFiniteError and PeerError are raised on all ranks in the same step.
        """
        if self._watchdog:
            self._watchdog.over()
        placement = self.local_placement.placement
        header_length = HEADER * placement.world_size
        headers, counts = health[:header_length], health[header_length:]
        step = int(headers[0])
        _check_steps(placement, headers)
        names = placement.networks
        for name, different in zip(names, counts[len(names) :], strict=True):
            if different:
                raise PeerError(
                    f"ranks are out of step: {placement.whose(name)} has other labels than "
                    f"{placement.whose(names[0])} at step {step}: its data differ"
                )
        self.asked = Request(reduce(or_, map(int, set(headers[2::HEADER]))))
        self.applied = [int(code) for code in headers[3::HEADER]]
        for name, not_finite in zip(names, counts[: len(names)], strict=True):
            if not_finite:
                raise NonFiniteError(
                    f"network {placement.whose(name)} has logits that are not finite at step "
                    f"{step}; the step was not applied. The usual remedy is a lower "
                    f"networks.{name}.optimizer.lr"
                )

    def tell_all(self, mine: tuple[int, int], step: int) -> list[tuple[int, int]]:
        """Return the two numbers of every rank, in rank order; every rank must call this."""
        device = self._transport or (None if self._header is None else self._header.device)
        with self.watched(doing := f"looking for values that are not finite at step {step}"):
            rows: list[list[int]] = self._gather(torch.tensor(mine, device=device), doing).tolist()
        return [(first, second) for first, second in rows]

    def watched(self, doing: str) -> AbstractContextManager[None]:
        """Watch a block that may wait for other ranks; `doing` names the operation in the report.

        On a GPU, reading a value waits for all collectives in the queue, so watch such reads too.
        """
        return self._watchdog.during(doing) if self._watchdog else nullcontext()

    def for_labels(self) -> Exchange:
        """Return an exchange of the same ranks for targets that are labels."""
        ranks = self._group, self._transport, False, None, self._watchdog
        return Exchange(self.local_placement, f"{self._digest:012x}", self._classes, *ranks)

    def _as_targets(self, received: Tensor) -> Tensor:
        """Return a shard's labels `[b]` or distributions `[b, C]` from the received floats."""
        if self._soft_targets:
            return received.view(-1, self._classes)
        return received.view(torch.int64)

    def _check_shapes(self, z: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> None:
        """Check the shapes here, because a failing collective would end all ranks silently."""
        for name, z_i in z.items():
            n = len(y[name])
            if found := not_logits(z_i, n, self._classes):
                raise UsageError(
                    f"network {name}: in training the model must turn {n} images into logits of "
                    f"shape ({n}, {self._classes}), got {found}",
                    every_rank=False,
                )

    def _make_layout(self, n: int) -> tuple[Offsets, int]:
        """Return where the shards of a batch of `n` lie in the ranks' rows, and the rows' length.

        All rows are as long as the longest row, because Gloo gathers only rows of equal length.
        """
        placement = self.local_placement.placement
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
        """Return this rank's row on the device that the collective needs."""
        is_local = self._transport is None or self.local_placement.placement.world_size == 1
        return row if is_local else row.to(self._transport)

    def _gather(self, row: Tensor, doing: str) -> Tensor:
        """Return all ranks' rows `[world size, length]`."""
        world_size = self.local_placement.placement.world_size
        if world_size == 1:
            return row[None]
        rows = row.new_empty(world_size * len(row))
        with collective_errors(doing):
            all_gather(rows, row, group=self._group)
        return rows.view(world_size, len(row))


def _check_steps(placement: Placement, headers: Sequence[float]) -> None:
    """PeerError if a rank is at another step than rank 0, or has another configuration."""
    for rank in range(placement.world_size):
        rank_step, digest, *_ = headers[HEADER * rank : HEADER * (rank + 1)]
        who, problem = placement.who(rank), None
        if digest != headers[1]:
            problem = f"{who} was started with another configuration than rank 0"
        elif rank_step != headers[0]:
            problem = f"{who} is at step {int(rank_step)}, rank 0 at step {int(headers[0])}"
        if problem:
            raise PeerError(f"ranks are out of step: {problem}")


def _pack(length: int, header: Tensor, *shards: Tensor) -> Tensor:
    """Return one float32 row of `length`: the header, then each network's logits and targets.

    Integers are sent bit by bit. Zeros fill the rest of the row.
    """
    pieces = [t if t.is_floating_point() else t.view(torch.float32) for t in (header, *shards)]
    row = torch.cat([piece.float().flatten() for piece in pieces])
    missing = length - len(row)
    return torch.cat([row, row.new_zeros(missing)]) if missing else row
