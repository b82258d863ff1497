"""data.train_samples draws the same images every time, in memory or read item by item."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from switokd.config.data_section import Data
from switokd.data.images import Images, open_images
from switokd.errors import UsageError


def pixels(images: Images, epoch: int = 0) -> set[bytes]:
    """Return the images of one epoch, without augmentation."""
    first, steps = epoch * images.steps_per_epoch, (epoch + 1) * images.steps_per_epoch
    batches = list(images.stream(steps, first))
    return {x.numpy().tobytes() for x in chain.from_iterable(batch[0] for batch in batches)}


def digits(seed: int = 0, **settings: object) -> Images:
    values = {"batch_size": 50, "crop_padding": 0, "drop_last": False, **settings}
    return open_images(Data.model_validate(values), seed)


def test_every_epoch_and_seed_has_the_same_images() -> None:
    images = digits(train_samples=200)
    assert (images.samples, images.steps_per_epoch) == (200, 4)
    part = pixels(images)
    assert 190 <= len(part) <= 200  # hardly any two digits are equal
    assert part == pixels(images, epoch=1) == pixels(digits(seed=7, train_samples=200))
    assert part < pixels(digits())
    labels = torch.cat([y for _, y in islice(images.stream(4), 4)])
    assert set(labels.tolist()) == set(range(10))  # a random choice


def test_all_images_leave_the_data_set_unchanged() -> None:
    assert digits(train_samples=1437).sources.train is not None
    assert pixels(digits(train_samples=1437)) == pixels(digits())


def test_message_for_more_images_than_the_data_set_has() -> None:
    with pytest.raises(UsageError, match=r"train_samples: 1438 is more than the 1437 training"):
        digits(train_samples=1438)


def test_data_set_read_item_by_item(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(8):
                grey = 16 * i + (label == "b")
                Image.new("RGB", (16, 16), (grey, grey, grey)).save(
                    tmp_path / part / label / f"{i}.png"
                )
    data = Data(
        dataset="image-folder", root=str(tmp_path), image_size=16, batch_size=4, train_samples=8
    )
    images = open_images(data, 0)
    assert images.samples == 8
    greys = {float(x) for batch, _ in images.stream(2) for x in batch[:, 0, 0, 0]}
    assert len(greys) == 8
