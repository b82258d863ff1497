"""Collaborative learning: all networks learn from one teacher that is combined from their logits.

Source: Guo et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020, the four
ways to combine. Every network's loss is CE + weight * tau^2 * KL(p_combined || p_self), and nobody
pauses.

Not covered: the paper's different augmentation for each network; here all see the same pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from switokd.distillation.couplings import Couplings, Term
from switokd.distillation.decision import Decision
from switokd.distillation.strategies.base import Strategy

if TYPE_CHECKING:
    from torch import Tensor

COMBINED = "(combined)"


class KDCL(Strategy, ABC):
    """Base of the four: `teacher` makes the combined logits."""

    def terms(self, network: str, couplings: Couplings, decision: Decision | None) -> list[Term]:
        """The combined teacher alone."""
        return couplings.terms(network, [COMBINED])

    def combine(self, logits: Mapping[str, Tensor], y: Tensor) -> Mapping[str, Tensor]:
        """The combined teacher's logits `[B, C]`, by its name."""
        import torch

        return {COMBINED: self.teacher(torch.stack(list(logits.values())), y)}

    @abstractmethod
    def teacher(self, z: Tensor, y: Tensor) -> Tensor:
        """Combined logits `[B, C]` of all networks' z `[M, B, C]` for labels or targets y."""


class Naive(KDCL):
    """For each sample the network with the least cross-entropy."""

    def teacher(self, z: Tensor, y: Tensor) -> Tensor:
        """See `KDCL`."""
        import torch

        best = _losses(z, y).argmin(dim=0)  # [B]
        return z[best, torch.arange(len(best), device=z.device)]


class Linear(KDCL):
    """The convex combination of the networks' logits that has the least cross-entropy.

    One set of weights for the whole batch: a convex problem in as many unknowns as there are
    networks, solved by a primal-dual interior-point method. That is a fixed number of
    Newton steps in float64, so that every rank does the same.
    """

    STEPS = 20
    BARRIER = 1e-12
    """Where the barrier that keeps the weights above 0 stops to fall: that much CE a network."""

    def teacher(self, z: Tensor, y: Tensor) -> Tensor:
        """See `KDCL`."""
        import torch

        weights = self.weights(z.double(), y)
        return torch.einsum("m,mbc->bc", weights, z.double()).to(z.dtype)

    def weights(self, z: Tensor, y: Tensor) -> Tensor:
        """Weights w `[M]`, none negative, that sum to 1; z `[M, B, C]` in float64.

        Newton's steps towards: gradient(CE) + v = s, sum(w) = 1, w_i s_i = barrier for every i,
        with multipliers s >= 0 of w >= 0, and v of the sum.
        """
        import torch

        networks, batch, classes = z.shape
        target = _as_distribution(y, classes)
        w, s = z.new_full((networks,), 1 / networks), z.new_ones(networks)
        system = z.new_ones(networks + 1, networks + 1)
        system[-1, -1] = 0
        halves = 0.5 ** torch.arange(8, dtype=z.dtype, device=z.device)
        for _ in range(self.STEPS):
            p = torch.einsum("m,mbc->bc", w, z).softmax(dim=1)
            gradient = torch.einsum("mbc,bc->m", z, p - target) / batch
            zp = z * p
            mean = zp.sum(dim=2)  # [M, B]
            hessian = (torch.einsum("mbc,nbc->mn", zp, z) - mean @ mean.T) / batch
            barrier = (0.1 * (w * s).mean()).clamp(min=self.BARRIER)
            system[:-1, :-1] = hessian + torch.diag(s / w)
            right = torch.cat([barrier / w - gradient, (1 - w.sum())[None]])
            dw = torch.linalg.solve_ex(system, right)[0][:-1]  # without waiting for a GPU
            ds = barrier / w - s - s / w * dw
            # As far as nothing becomes 0, and a whole step at most; of that or its halves the best.
            limit = 0.99 / torch.cat([-dw / w, -ds / s]).amax().clamp(min=0.99)
            tried = w + limit * halves[:, None] * dw  # [K, M]
            log_p = torch.einsum("km,mbc->kbc", tried, z).log_softmax(dim=2)
            error = -torch.einsum("kbc,bc->k", log_p, target) / batch
            best = (error - barrier * tried.log().sum(dim=1)).argmin(keepdim=True)
            step = limit * halves[best]
            w, s = w + step * dw, s + step * ds
        return w / w.sum()


class MinLogit(KDCL):
    """The least logit of any network, once the true class's is 0 for each."""

    def teacher(self, z: Tensor, y: Tensor) -> Tensor:
        """See `KDCL`. Where y is a distribution, the true class is its most probable."""
        labels = y if y.dim() == 1 else y.argmax(dim=1)
        true = z.gather(2, labels[None, :, None].expand(len(z), -1, 1))  # [M, B, 1]
        return (z - true).amin(dim=0)


class General(KDCL):
    """The combination of logits with the least error on images that nobody trains on.

    The error of a weighted mean of predictions is w^T C w, where C_ij is the mean over held-out
    samples of (p_i - y) . (p_j - y); its least is at w = C^-1 1 / (1^T C^-1 1). Weights are taken
    before each epoch, and are equal until then.
    """

    def __init__(self, held_out: int = 512) -> None:
        if type(held_out) is not int or held_out < 2:
            raise ValueError(f"held_out must be a whole number, 2 or more images, got {held_out}")
        self.held_out = held_out
        self.weights: Tensor | None = None

    def observe(self, logits: Mapping[str, Tensor], y: Tensor) -> None:
        """Weigh the networks by their errors on the images held out."""
        import torch

        z = torch.stack(list(logits.values())).double()
        errors = z.softmax(dim=2) - _as_distribution(y, z.shape[2])
        covariance = torch.einsum("ibc,jbc->ij", errors, errors) / z.shape[1]
        # Networks that err alike would make it singular.
        covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(len(z), device=z.device)
        solved = torch.linalg.solve(covariance, covariance.new_ones(len(z)))
        self.weights = solved / solved.sum()

    def teacher(self, z: Tensor, y: Tensor) -> Tensor:
        """See `KDCL`."""
        import torch

        weights = z.new_full((len(z),), 1 / len(z), dtype=torch.float64)
        if self.weights is not None:
            weights = self.weights.to(z.device)
        return torch.einsum("m,mbc->bc", weights, z.double()).to(z.dtype)


def _as_distribution(y: Tensor, classes: int) -> Tensor:
    """Targets `[B, C]` in float64."""
    if y.dim() == 2:
        return y.double()
    import torch

    zeros = y.new_zeros(len(y), classes, dtype=torch.float64)
    return zeros.scatter_(1, y[:, None], 1.0)  # one_hot would look at the labels first


def _losses(z: Tensor, y: Tensor) -> Tensor:
    """Each network's cross-entropy on each sample, `[M, B]`."""
    return -(z.double().log_softmax(dim=2) * _as_distribution(y, z.shape[2])).sum(dim=2)
