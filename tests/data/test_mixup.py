"""Soft targets follow the papers' formulas, with the same numbers on every rank.

Not covered: training with soft targets (`tests/training`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from switokd.config.data_section import Data
from switokd.data.augment import mix
from switokd.data.images import Images, TrainingPositions, open_images
from switokd.data.loader import Batch, in_blocks
from switokd.data.mixup import SoftTargets, beta_draws
from switokd.runtime.placement import Placement

# The DataLoader warns on machines with fewer processors than loader processes.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SETTINGS: dict[str, dict[str, float]] = {
    "smoothing": {"label_smoothing": 0.1},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "all": {"label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0},
}


def digits(**settings: Any) -> Images:
    return open_images(Data(**{"batch_size": 100, "flip": True, **settings}), 5)


def pairs(n: int = 200) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    """Return distinct images and random labels of n samples and their partners, and keys."""
    x = torch.arange(2.0 * n * 2 * 6 * 9).view(2, n, 2, 6, 9)
    g = torch.Generator().manual_seed(0)
    return list(x), list(torch.randint(4, (2, n), generator=g)), mix(3, np.arange(n))


def test_targets_are_labels_by_default() -> None:
    _, y = next(digits().stream(1))
    assert (y.dtype, y.shape) == (torch.int64, (100,))
    assert SoftTargets.of(Data(), 10) is None


@pytest.mark.parametrize("s", [0.1, 0.5])
def test_label_smoothing_is_pytorchs(s: float) -> None:
    z, labels = torch.randn(50, 7), torch.arange(50) % 7
    y = SoftTargets(7, label_smoothing=s).targets(labels)
    assert y.dtype is torch.float32
    expected = F.cross_entropy(z, labels, label_smoothing=s)
    assert F.cross_entropy(z, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_smoothing_changes_neither_pixels_nor_order() -> None:
    for (x, labels), (x_soft, y) in zip(
        digits().stream(3), digits(label_smoothing=0.3).stream(3), strict=True
    ):
        assert torch.equal(x, x_soft)
        assert torch.equal(y.argmax(dim=1), labels)
        assert y.amax(dim=1).tolist() == pytest.approx([0.73] * 100)


def test_mixup_blends_image_and_target_by_the_same_share() -> None:
    x, labels, keys = pairs()
    mixed, y = SoftTargets(4, mixup=0.4).mixed(x, labels, keys)
    share = torch.from_numpy(beta_draws(keys, np.full(200, 0.4))).float()
    weight = share[:, None, None, None]
    assert torch.allclose(mixed, weight * x[0] + (1 - weight) * x[1], rtol=1e-5)
    one_hot, one_hot_partner = (F.one_hot(part, 4) for part in labels)
    expected = share[:, None] * one_hot + (1 - share[:, None]) * one_hot_partner
    assert torch.allclose(y, expected, atol=1e-6)


def test_cutmix_pastes_one_box_and_weights_targets_by_its_area() -> None:
    x, labels, keys = pairs()
    mixed, y = SoftTargets(4, cutmix=1.0).mixed(x, labels, keys)
    sizes = set()
    for i in range(200):
        pasted = mixed[i] != x[0][i]  # [C, H, W]
        assert torch.equal(mixed[i][pasted], x[1][i][pasted])
        assert torch.equal(pasted[0], pasted[1])
        rows, columns = pasted[0].any(dim=1), pasted[0].any(dim=0)
        assert torch.equal(pasted[0], rows[:, None] & columns[None, :])
        assert len(torch.unique_consecutive(rows)) <= 3  # in one piece
        assert len(torch.unique_consecutive(columns)) <= 3
        own = 1 - int(rows.sum() * columns.sum()) / 54
        expected = own * F.one_hot(labels[0][i], 4) + (1 - own) * F.one_hot(labels[1][i], 4)
        assert y[i].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        sizes.add(int(rows.sum() * columns.sum()))
    assert len(sizes) > 10
    assert max(sizes) > 27


def test_with_mixup_and_cutmix_half_of_the_samples_get_either() -> None:
    x, labels, keys = pairs(1000)
    settings = {"mixup": 1.0, "cutmix": 1.0}
    both, _ = SoftTargets(4, **settings).mixed(x, labels, keys)
    blended, _ = SoftTargets(4, mixup=1.0).mixed(x, labels, keys)
    pasted, _ = SoftTargets(4, cutmix=1.0).mixed(x, labels, keys)
    is_blended, is_pasted = ((both == one).flatten(1).all(dim=1) for one in (blended, pasted))
    assert bool((is_blended ^ is_pasted).all())
    assert 400 < int(is_blended.sum()) < 600


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_beta_and_depend_on_the_key_alone(alpha: float) -> None:
    keys = mix(1, np.arange(4000))
    draws = beta_draws(keys, np.full(4000, alpha))
    assert draws.mean() == pytest.approx(0.5, abs=0.03)
    assert draws.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    assert len(set(draws.tolist())) > 3900
    backwards = beta_draws(keys[::-1], np.full(4000, alpha))
    assert np.array_equal(backwards[::-1], draws)


@pytest.mark.parametrize("case", SETTINGS)
def test_parts_of_a_batch_equal_the_whole_batch_bit_for_bit(case: str) -> None:
    images = digits(**SETTINGS[case], drop_last=False)
    whole = list(images.stream(16))
    assert len(whole[14][0]) == 37
    placement = Placement.of({"t": {0: 5, 1: 1, 2: 3}})
    parts = [images.stream(16, part=lambda n, r=rank: placement.part(r, n)) for rank in range(3)]  # type: ignore[misc]
    for step, (x, y) in enumerate(whole):
        assert (x.dtype, y.dtype, y.shape) == (torch.float32, torch.float32, (len(x), 10))
        assert torch.allclose(y.sum(dim=1), torch.ones(len(y)))
        for got, expected in zip(zip(*(next(p) for p in parts), strict=True), (x, y), strict=True):
            assert torch.equal(torch.cat(got), expected), step
    differing = zip(whole[:14], list(images.stream(30))[15:29], strict=True)
    assert all(not torch.equal(one[0], other[0]) for one, other in differing)


@pytest.mark.parametrize("case", SETTINGS)
def test_batches_made_in_blocks_equal_single_batches(case: str) -> None:
    """Images in GPU memory are augmented in blocks, which may span two epochs."""
    images = digits(**SETTINGS[case], drop_last=False, batch_size=200)
    assert images.steps_per_epoch == 8
    calls = []

    def load(positions: Sequence[tuple[int, ...]]) -> Batch:
        calls.append(len(positions))
        return images.view(train=True).batch(positions)

    positions = TrainingPositions(images, 2, 17, lambda n: slice(0, n))
    blocks = in_blocks(load, positions, 4)
    for one, other in zip(blocks, images.stream(17, first=2), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert calls == [800, 637, 800, 437]


def test_batches_do_not_depend_on_loader_processes_or_first_step() -> None:
    alone, helped = (digits(**SETTINGS["all"], workers=workers) for workers in (0, 2))
    batches = list(alone.stream(17, first=12))
    for one, other in zip(batches, helped.stream(17, first=12), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert torch.equal(batches[-1][0], list(alone.stream(17))[-1][0])


def test_the_partner_is_the_augmented_next_sample_of_the_batch() -> None:
    plain, mixed = (next(digits(mixup=alpha).stream(1)) for alpha in (0.0, 1.0))
    x, labels = plain
    partner = x.roll(-1, 0)
    differs = (x != partner).flatten(1)
    for i in range(100):
        at = differs[i]
        share = ((mixed[0][i] - partner[i]).flatten() / (x[i] - partner[i]).flatten())[at]
        assert share.std() < 1e-3
        assert mixed[1][i, labels[i]] >= share.mean() - 1e-3


def test_test_images_are_not_mixed() -> None:
    for plain, soft in zip(digits().test(), digits(**SETTINGS["all"]).test(), strict=True):
        assert torch.equal(plain[0], soft[0])
        assert torch.equal(plain[1], soft[1])
