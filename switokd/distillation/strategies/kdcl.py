"""KDCL: all networks learn from one teacher that is combined from their logits.

    L_i = CE(z_i, y) + weight * tau^2 * KL(p_combined || p_i)

Source: Guo et al., "Online Knowledge Distillation via Collaborative Learning", CVPR 2020, with its
four ways to combine logits. No teacher pauses.

Not covered: the paper's separate augmentation per network; here all networks get the same pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from switokd.distillation.couplings import Couplings, Term
from switokd.distillation.decision import Decision
from switokd.distillation.strategies.base import Strategy

if TYPE_CHECKING:
    from torch import Tensor

COMBINED = "(combined)"
"""Name of the combined teacher among the peers."""


class KDCL(Strategy, ABC):
    """Base class of the four variants: `teacher` combines the logits."""

    def terms(self, network: str, couplings: Couplings, decision: Decision | None) -> list[Term]:
        """One KL term: the combined teacher."""
        return couplings.terms(network, [COMBINED])

    def combine(self, logits: Mapping[str, Tensor], y: Tensor) -> Mapping[str, Tensor]:
        """Logits `[B, C]` of the combined teacher."""
        import torch

        return {COMBINED: self.teacher(torch.stack(list(logits.values())), y)}

    @abstractmethod
    def teacher(self, z: Tensor, y: Tensor) -> Tensor:
        """Combine the logits of all networks to logits `[B, C]`.

        z: logits of the M networks, `[M, B, C]`. y: labels `[B]` or target distributions `[B, C]`.
        """


class Naive(KDCL):
    """Per sample, the logits of the network with the lowest cross-entropy."""

    def teacher(self, z: Tensor, y: Tensor) -> Tensor:
        """See `KDCL`."""
        import torch

        best = _losses(z, y).argmin(dim=0)  # [B]
        return z[best, torch.arange(len(best), device=z.device)]


class Linear(KDCL):
    """The convex combination of the networks' logits with the lowest cross-entropy.

    One weight per network for the whole batch. The problem is convex; a primal-dual
    interior-point method solves it in a fixed number of Newton steps in float64, so that every
    rank gets the same weights.
    """

    STEPS = 20
    """Number of Newton steps."""
    BARRIER = 1e-12
    """Lowest strength of the barrier that keeps weights above 0, in cross-entropy per network."""

    def teacher(self, z: Tensor, y: Tensor) -> Tensor:
        """See `KDCL`."""
        import torch

        weights = self.weights(z.double(), y)
        return torch.einsum("m,mbc->bc", weights, z.double()).to(z.dtype)

    def weights(self, z: Tensor, y: Tensor) -> Tensor:
        """Weights w `[M]` with w >= 0 and sum(w) = 1.

        z: logits `[M, B, C]` in float64. y: labels `[B]` or target distributions `[B, C]`. The
        Newton steps solve gradient(CE) + v = s, sum(w) = 1 and w_i s_i = barrier for every i.
        s >= 0 are the multipliers of w >= 0, and v is the multiplier of the sum.
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
            right_side = torch.cat([barrier / w - gradient, (1 - w.sum())[None]])
            # solve_ex, unlike solve, does not wait for the GPU to check the result.
            dw = torch.linalg.solve_ex(system, right_side)[0][:-1]
            ds = barrier / w - s - s / w * dw
            # Longest step that keeps w and s positive, at most 1. The line search tries this step
            # and seven halvings of it.
            limit = 0.99 / torch.cat([-dw / w, -ds / s]).amax().clamp(min=0.99)
            candidates = w + limit * halves[:, None] * dw  # [K, M]
            log_p = torch.einsum("km,mbc->kbc", candidates, z).log_softmax(dim=2)
            error = -torch.einsum("kbc,bc->k", log_p, target) / batch
            best = (error - barrier * candidates.log().sum(dim=1)).argmin(keepdim=True)
            step = limit * halves[best]
            w, s = w + step * dw, s + step * ds
        return w / w.sum()


class MinLogit(KDCL):
    """Per class, the lowest logit of all networks, after shifting the true class's logit to 0."""

    def teacher(self, z: Tensor, y: Tensor) -> Tensor:
        """See `KDCL`. For a target distribution, the true class is the most probable one."""
        labels = y if y.dim() == 1 else y.argmax(dim=1)
        true = z.gather(2, labels[None, :, None].expand(len(z), -1, 1))  # [M, B, 1]
        return (z - true).amin(dim=0)


class General(KDCL):
    """The combination of logits with the lowest error on held-out images.

    The error of a weighted mean of predictions is w^T C w, where C_ij is the mean over held-out
    samples of (p_i - y) . (p_j - y). Its minimum is at w = C^-1 1 / (1^T C^-1 1). Weights are
    computed before each epoch; all weights are equal before the first one.

    held_out: number of training images to hold out, at least 2. ValueError for other values.
    """

    def __init__(self, held_out: int = 512) -> None:
        if type(held_out) is not int or held_out < 2:
            raise ValueError(f"held_out must be an integer, 2 images or more, got {held_out}")
        self.held_out = held_out
        self.weights: Tensor | None = None

    def observe(self, logits: Mapping[str, Tensor], y: Tensor) -> None:
        """Compute the weights from the networks' errors on the held-out images."""
        import torch

        z = torch.stack(list(logits.values())).double()
        errors = z.softmax(dim=2) - _as_distribution(y, z.shape[2])
        covariance = torch.einsum("ibc,jbc->ij", errors, errors) / z.shape[1]
        # Without this term, networks with equal errors would make the matrix singular.
        covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(len(z), device=z.device)
        solution = torch.linalg.solve(covariance, covariance.new_ones(len(z)))
        self.weights = solution / solution.sum()

    def state_dict(self) -> dict[str, Any]:
        """The weights of this epoch; they are computed before its first step only."""
        return {} if self.weights is None else {"weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the weights."""
        self.weights = state.get("weights")

    def teacher(self, z: Tensor, y: Tensor) -> Tensor:
        """See `KDCL`."""
        import torch

        weights = z.new_full((len(z),), 1 / len(z), dtype=torch.float64)
        if self.weights is not None:
            weights = self.weights.to(z.device)
        return torch.einsum("m,mbc->bc", weights, z.double()).to(z.dtype)


def _as_distribution(y: Tensor, classes: int) -> Tensor:
    """Convert labels `[B]` or targets `[B, C]` to targets `[B, C]` in float64."""
    if y.dim() == 2:
        return y.double()
    import torch

    zeros = y.new_zeros(len(y), classes, dtype=torch.float64)
    # F.one_hot reads the labels on the host, which would wait for the GPU.
    return zeros.scatter_(1, y[:, None], 1.0)


def _losses(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy `[M, B]` of every network on every sample."""
    return -(z.double().log_softmax(dim=2) * _as_distribution(y, z.shape[2])).sum(dim=2)
