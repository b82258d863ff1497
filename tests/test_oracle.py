"""Real processes against the oracle: same decisions, and the same weights bit for bit.

Both sides compute in float32 with the same PyTorch operators on one thread of this machine, so
the weights must be equal bitwise after all steps; the distances, which the oracle takes in
float64 and the workers in float32, agree to 1e-5.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from switokd import models
from switokd.config import Adam, Config
from switokd.data import Batch, Images, open_images
from switokd.runfile import load
from tests import reference
from tests.support import lines, train

STEPS = 60
SHARED = [f"schedule.max_steps={STEPS}", "schedule.milestones=[2]", "save_initial_weights=true"]
# Powers of two, so that the order of multiplications rounds nothing differently.
WEIGHTS = ["distillation.temperature=0.5", "distillation.alpha=0.5", "distillation.beta=0.25"]
CASES = {
    "1T1S": ["digits-1t1s"],
    "2T1S": ["digits-2t1s"],
    "1T2S": ["digits-1t2s", "distillation.temperature=0.5", "distillation.beta=0.25"],
    "2T1S-weights": ["digits-2t1s", *WEIGHTS],
    "2T1S-dml": ["digits-2t1s", "distillation.strategy=dml"],
}


@pytest.mark.parametrize("case", CASES)
def test_same_decisions_and_weights_as_the_oracle(case: str, tmp_path: Path) -> None:
    recipe, *settings = [*CASES[case], *SHARED]
    config = load(recipe, settings)
    folder = train(tmp_path, len(config.networks), recipe, *settings)

    networks, records = _train_reference(config, folder)

    decisions = lines(folder / "decisions.jsonl")
    assert len(decisions) == STEPS * len(config.topology.pairs)
    for ours, oracles in zip(decisions, records, strict=True):
        numbers = {k: oracles[k] for k in ("gap", "e_s", "e_t", "epsilon", "delta")}
        assert {k: ours[k] for k in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-6)
        exact = ("step", "teacher", "student", "mode", "n")
        assert {k: ours[k] for k in exact} == {k: oracles[k] for k in exact}
    _check_switching(config, [d["mode"] for d in decisions])
    summary = json.loads((folder / "summary.json").read_text())
    for teacher in config.topology.teachers:
        modes = [d["mode"] for d in decisions if d["teacher"] == teacher]
        students = len(config.topology.students)
        paused = sum(
            set(modes[i : i + students]) == {"expert"} for i in range(0, len(modes), students)
        )
        assert summary["networks"][teacher]["steps_paused"] == paused
        assert (paused > 0) == (config.distillation.strategy == "switokd")
    for name, network in networks.items():
        saved = torch.load(folder / "weights" / f"{name}.pt", weights_only=True)
        initial = torch.load(folder / "weights" / "initial" / f"{name}.pt", weights_only=True)
        differing = [k for k, v in network.state_dict().items() if not torch.equal(v, saved[k])]
        assert not differing, f"{name}: {differing}"
        assert any(not torch.equal(initial[k], saved[k]) for k in saved)


def _check_switching(config: Config, modes: list[str]) -> None:
    """The run must have switched in both directions, or the comparison says little."""
    if config.distillation.strategy == "dml":
        assert set(modes) == {"learning"}
        return
    pairs = len(config.topology.pairs)
    changes = {change for pair in range(pairs) for change in pairwise(modes[pair::pairs])}
    assert {("learning", "expert"), ("expert", "learning")} <= changes


def _train_reference(
    config: Config, folder: Path
) -> tuple[dict[str, torch.nn.Module], list[dict[str, Any]]]:
    """Train the oracle from the run's initial weights on the run's batches."""
    images = open_images(config.data, config.seed)
    networks: dict[str, torch.nn.Module] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, settings in config.networks.items():
        model = models.build(settings.model, images.shape[0], images.classes)
        path = folder / "weights" / "initial" / f"{name}.pt"
        model.load_state_dict(torch.load(path, weights_only=True))
        networks[name] = model
        o = settings.optimizer
        optimizers[name] = (
            torch.optim.Adam(model.parameters(), lr=o.lr, weight_decay=o.weight_decay)
            if isinstance(o, Adam)
            else torch.optim.SGD(model.parameters(), o.lr, o.momentum, 0, o.weight_decay)
        )
    d = config.distillation
    roles = {name: network.role for name, network in config.networks.items()}
    setup = reference.Setup(dict(roles), d.strategy, d.temperature, d.alpha, d.beta)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batches = _batches(config, images, optimizers)
        return networks, reference.train(setup, networks, optimizers, batches)
    finally:
        torch.set_num_threads(threads)


def _batches(
    config: Config, images: Images, optimizers: dict[str, torch.optim.Optimizer]
) -> Iterator[Batch]:
    """The run's batches; at the milestone, between two epochs, the learning rates drop."""
    (milestone,) = config.schedule.milestones
    for step, batch in enumerate(images.stream(STEPS)):
        if step == milestone * images.steps_per_epoch:
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * config.schedule.gamma
        yield batch
