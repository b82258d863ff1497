"""The paper's recipes have the networks, roles and hyperparameters of its tables and scripts.

Not covered: training (`tests/cli/test_check.py` makes one step); the accuracies.
"""

from __future__ import annotations

import pytest

from switokd.config.optimizers import SGD, Adam
from switokd.config.recipes import recipes
from switokd.config.run_file import load
from switokd.data.catalog import known
from switokd.models.paper import PAPER_NETWORKS

PUBLISHED = {
    "cifar10-1t1s": (128, 299, (100, 150, 200), (0.1, 0.1), 5e-4),
    "cifar100-1t1s": (128, 299, (140, 200, 250), (0.1, 0.01), 5e-4),
    "cifar100-1t2s": (128, 269, (140, 200, 250), (0.1, 0.1, 0.01), 5e-4),
    "cifar100-2t1s": (128, 269, (140, 200, 250), (0.1, 0.1, 0.01), 5e-4),
    "tiny-imagenet-resnet34-1t1s": (128, 199, (100, 140, 180), (0.01, 0.01), 5e-4),
    "tiny-imagenet-wrn-1t1s": (128, 199, (100, 140, 180), (0.01, 0.01), 5e-4),
    "imagenet-1t1s": (512, 120, (31, 61, 91), (0.1, 0.1), 1e-4),
}
"""Batch size, epochs, epochs (from 1) at whose beginning the learning rate falls, learning rates in
the run file's order, weight decay."""
TABLE_4 = {
    ("mobilenetv2-1.4", "resnet-34"),
    ("resnet-20", "wrn-16-2"),
    ("wrn-16-1", "wrn-16-8"),
    ("mobilenetv2-0.5", "wrn-16-2"),
}
"""Student and teacher by row."""


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_hyperparameters_are_the_published_ones(recipe: str) -> None:
    batch, epochs, falling_epochs, rates, weight_decay = PUBLISHED[recipe]
    config = load(recipe)
    assert (config.data.batch_size, config.schedule.epochs) == (batch, epochs)
    assert config.data.drop_last is False
    assert config.schedule.milestones == tuple(epoch - 1 for epoch in falling_epochs)
    assert config.schedule.gamma == 0.1
    assert tuple(n.optimizer.lr for n in config.networks.values()) == rates
    for network in config.networks.values():
        optimizer = network.optimizer
        is_of_table_7 = len(config.networks) == 3
        assert isinstance(optimizer, Adam) is (is_of_table_7 and network.model == "mobilenet")
        if isinstance(optimizer, Adam):
            assert optimizer.weight_decay == 1e-4
        else:
            assert isinstance(optimizer, SGD)
            assert (optimizer.momentum, optimizer.nesterov) == (0.9, False)
            assert optimizer.weight_decay == weight_decay
    distillation = config.distillation
    assert (distillation.alpha, distillation.beta, distillation.temperature) == (1, 1, 1)


def test_every_row_of_the_tables_has_a_recipe() -> None:
    used: set[tuple[str, int, int, str]] = set()
    pairs = set()
    for recipe in PUBLISHED:
        config = load(recipe)
        data = known(config.data)
        assert data is not None
        table = {"1T1S": "4"}.get(config.topology.name, "7")
        table = "" if recipe == "imagenet-1t1s" else table
        for n in config.networks.values():
            used.add((n.model, data.image[1], data.classes, table + n.role[0].upper()))
        if table == "4":
            pairs.add(tuple(n.model for n in reversed(config.networks.values())))
    tables = {(n.network, n.size, n.classes, use) for n in PAPER_NETWORKS for use in n.uses.split()}
    assert used == tables
    assert pairs == TABLE_4
    assert set(PUBLISHED) <= set(recipes())
