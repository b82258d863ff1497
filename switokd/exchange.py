"""Each step's logits, from every network to every network, by one collective.

A rank sends its logits with the step number, the configuration's digest and a checksum of the
labels in front. All ranks receive all of it, so all of them find at once, and find the same, if
one is out of step, was started differently, has other data, or has diverged.

Not covered: shards of a batch over several ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from switokd.errors import NonFiniteError, PeerError, UsageError
from switokd.placement import Placement
from switokd.world import naming


class Header(NamedTuple):
    """What travels in front of the logits, as int64."""

    step: int
    digest: int
    labels: int
    is_finite: int


class Exchange:
    """Gathers logits over the default process group."""

    def __init__(self, placement: Placement, digest: str, classes: int) -> None:
        self._placement = placement
        self._classes = classes
        self._digest = int(digest[:15], 16)

    def __call__(self, step: int, z: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Every network's logits `[B, C]` in float32, detached, by name.

        z: this rank's `[B, C]`; y: labels `[B]`. NonFiniteError and PeerError are raised on every
        rank alike; PeerError on this rank alone if the collective fails, UsageError if z is not
        of shape `[B, classes]`.
        """
        shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        if shape != (len(y), self._classes):  # would end all ranks without a word
            error = UsageError(
                f"in training the model must turn {len(y)} images into logits of shape "
                f"({len(y)}, {self._classes}), got {shape}"
            )
            error.seen_by_every_rank = False
            raise error
        z = z.detach().float()
        header = torch.tensor([step, self._digest, 0, 0], device=z.device)
        header[2] = (y * torch.arange(1, len(y) + 1, device=y.device)).sum()  # order matters
        header[3] = z.isfinite().all()
        mine = torch.cat([header.view(torch.float32), z.flatten()])  # the bits travel as they are
        everyone = mine.new_empty(self._placement.world_size * len(mine))
        with naming(f"exchanging the logits of step {step}"):
            dist.all_gather_into_tensor(everyone, mine)
            everyone = everyone.view(self._placement.world_size, -1)
            in_front = 2 * len(header)
            headers = everyone[:, :in_front].contiguous().view(torch.int64).tolist()
        self._check([Header(*h) for h in headers])
        return {
            name: everyone[rank, in_front:].view_as(z)
            for rank, name in enumerate(self._placement.network_of)
        }

    def _check(self, headers: list[Header]) -> None:
        """Raise if the ranks are not at the same point of the same run, or one has diverged."""
        first = headers[0]
        for rank, header in enumerate(headers):
            who = f"rank {rank} ({self._placement.network_of[rank]})"
            problem = None
            if header.digest != first.digest:
                problem = f"{who} was started with another configuration than rank 0"
            elif header.step != first.step:
                problem = f"{who} is at step {header.step}, rank 0 at step {first.step}"
            elif header.labels != first.labels:
                problem = (
                    f"{who} has other labels than rank 0 at step {first.step}: its data differ"
                )
            if problem:
                raise PeerError(f"ranks are out of step: {problem}")
        for rank, header in enumerate(headers):
            if not header.is_finite:
                name = self._placement.network_of[rank]
                raise NonFiniteError(
                    f"network {name} (rank {rank}) has logits that are not finite at step "
                    f"{header.step}; the step was not applied. The usual remedy is a lower "
                    f"networks.{name}.optimizer.lr"
                )
