"""Losses: cross-entropy plus the KL terms.

    L_i = CE(z_i, y) + sum over peers j of w_ij tau_ij^2 KL(p_j || p_i)

Source: Qian et al., ECCV 2022, arXiv:2209.04996, the losses of teacher and student. The strategy
chooses the peers; their weights w and temperatures tau are the run's couplings. Peer logits are
detached, so no gradient crosses networks.

Not covered: which terms a loss has (`strategies/`), when a teacher skips its loss (`decision.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor

from switokd.distillation.couplings import Term
from switokd.distillation.distances import soften


def kl(z_peer: Tensor, z_self: Tensor, tau: float) -> Tensor:
    """KL(p_peer || p_self), summed over classes and averaged over the batch; a scalar.

    z_peer, z_self: logits `[B, C]`; no gradient flows to z_peer. tau: temperature.
    """
    log_p_self = F.log_softmax(soften(z_self, tau), dim=1)
    p_peer = F.softmax(soften(z_peer.detach(), tau), dim=1)
    return F.kl_div(log_p_self, p_peer, reduction="batchmean")


def objective(
    z_self: Tensor, y: Tensor, logits: Mapping[str, Tensor], terms: Iterable[Term]
) -> Tensor:
    """Loss of one network: a scalar, averaged over the batch; the sum of `loss_terms`.

    z_self: the network's logits `[B, C]`, with gradient. y: labels `[B]` or target distributions
    `[B, C]`. logits: detached logits `[B, C]` of the peers, by name. terms: the KL terms.
    """
    values = loss_terms(z_self, y, logits, terms)
    loss = next(values)
    for value in values:
        loss = loss + value
    return loss


def loss_terms(
    z_self: Tensor, y: Tensor, logits: Mapping[str, Tensor], terms: Iterable[Term]
) -> Iterator[Tensor]:
    """Yield the summands of `objective`: the cross-entropy, then each KL term with its weight."""
    yield F.cross_entropy(z_self, y)
    for term in terms:
        divergence, weight = kl(logits[term.peer], z_self, term.tau), term.weight * term.tau**2
        yield divergence if weight == 1 else weight * divergence
