"""Soft targets, that is distributions over the classes: label smoothing, mixup, cutmix.

    label smoothing   y = (1 - s) y + s / C                            Szegedy et al., CVPR 2016
    mixup             x = l x + (1 - l) x', y likewise                 Zhang et al., ICLR 2018
    cutmix            a box of x' in x, y by the shares of the area    Yun et al., ICCV 2019

(x', y') is the sample's partner: the next sample of the same batch, whose order is random. So a
rank with a part of a batch loads one sample more than the part. l is drawn from Beta(alpha, alpha)
and the box's centre uniformly, both from the sample's key: they do not depend on ranks or loader
processes. With mixup and cutmix both on, the key selects one of them with probability 1/2.

Not covered: one l for a whole batch, as in the papers' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from switokd.config.data_section import Data
from switokd.data.augment import Keys, draw, mix
from switokd.runtime.device import to_device

# Streams of `draw`; crop_and_flip uses 1 to 3.
WHICH, SHARE, TOP, LEFT = 4, 5, 6, 7


@dataclass(frozen=True)
class SoftTargets:
    """Label smoothing, mixup and cutmix of a run; the settings are those of `Data`."""

    classes: int
    """Number of classes."""
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @classmethod
    def of(cls, data: Data, classes: int) -> SoftTargets | None:
        """Make them from a run file's settings; None if targets are labels."""
        if not data.has_soft_targets:
            return None
        return cls(classes, data.label_smoothing, data.mixup, data.cutmix)

    @property
    def mixes(self) -> bool:
        """Whether samples need a partner."""
        return self.mixup > 0 or self.cutmix > 0

    def targets(self, labels: Tensor) -> Tensor:
        """Turn labels `[B]` into distributions `[B, classes]` in float32."""
        return self._smooth(F.one_hot(labels, self.classes).float())

    def mixed(
        self, x: Sequence[Tensor], labels: Sequence[Tensor], keys: Keys
    ) -> tuple[Tensor, Tensor]:
        """Mix samples with their partners: images `[B, C, H, W]`, targets `[B, classes]`.

        x: images of the samples and of their partners, each `[B, C, H, W]` in float32.
        labels: their labels, each `[B]`. keys: of the samples, `[B]`.
        """
        device, (own, other) = x[0].device, x
        is_cut = draw(keys, WHICH, 2).numpy().astype(bool)
        if not (self.mixup and self.cutmix):
            is_cut[:] = self.cutmix > 0
        shares = beta_draws(keys, np.where(is_cut, self.cutmix, self.mixup))
        boxes, shares_outside = _boxes(keys, shares, own.shape[2], own.shape[3])
        share = to_device(
            device, torch.from_numpy(np.where(is_cut, shares_outside, shares)).float()
        )
        cut = to_device(device, torch.from_numpy(is_cut))[:, None, None, None]
        # Products and sums round the same at every position of a batch. torch.lerp does not: its
        # vectorised loop and the loop for the remainder differ.
        weight = share[:, None, None, None]
        blended = weight * own + (1 - weight) * other
        x_mixed = torch.where(cut, torch.where(to_device(device, boxes), other, own), blended)
        y, y_other = (F.one_hot(part, self.classes).float() for part in labels)
        y_mixed = share[:, None] * y + (1 - share[:, None]) * y_other
        return x_mixed, self._smooth(y_mixed)

    def _smooth(self, y: Tensor) -> Tensor:
        """Apply label smoothing to distributions `[B, classes]`."""
        s = self.label_smoothing
        return (1 - s) * y + s / self.classes if s else y


def beta_draws(keys: Keys, alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draw from Beta(alpha, alpha), as a function of key and alpha; both `[B]`."""
    bits = np.random.Philox(key=0)
    generator, state = np.random.Generator(bits), bits.state
    draws = []
    seeds = mix(keys.astype(np.int64), SHARE)
    for seed, alpha in zip(seeds.tolist(), alphas.tolist(), strict=True):
        state["state"]["key"][0] = seed  # a new generator per key would take ten times as long
        bits.state = state
        draws.append(generator.beta(alpha, alpha))
    return np.array(draws)


def _boxes(
    keys: Keys, shares: NDArray[np.float64], height: int, width: int
) -> tuple[Tensor, NDArray[np.float64]]:
    """Return cutmix's boxes as a mask `[B, 1, H, W]`, and the shares of the area outside `[B]`.

    A box has 1 - share of an image's area; a box over the edge is cut off and has less.
    """
    sides = np.sqrt(1 - shares) / 2
    inside = []
    for stream, length in ((TOP, height), (LEFT, width)):
        centre, half = draw(keys, stream, length).numpy(), (sides * length).astype(np.int64)
        at = np.arange(length)
        inside.append((at >= (centre - half)[:, None]) & (at < (centre + half)[:, None]))
    rows, columns = inside
    area = rows.sum(axis=1) * columns.sum(axis=1)
    mask = rows[:, :, None] & columns[:, None, :]
    return torch.from_numpy(mask)[:, None], 1 - area / (height * width)
