"""Random numbers, and what networks do in place, do not depend on the placement.

Not covered: a network on several ranks, where every rank draws for its part of the batch.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from switokd.config.data_section import Data
from switokd.config.run_file import load
from switokd.data.images import open_images
from switokd.runtime.environment import Environment
from switokd.runtime.process_group import World
from switokd.training.build import make_learner
from switokd.training.schedules import AccumulationWindow
from tests.preloaded import train
from tests.support import lines


class Drops(nn.Module):
    """Drops logits with masks from one generator, and draws another mask in backward."""

    def __init__(self, generator: str) -> None:
        super().__init__()
        self.generator, self.linear = generator, nn.Linear(64, 10)
        self.in_backward = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.linear(x.flatten(1))
        if z.requires_grad:
            z.register_hook(self.draw)  # type: ignore[no-untyped-call]
        return z * self.mask(z)

    def draw(self, dz: Tensor) -> None:
        self.in_backward = self.mask(dz)

    def mask(self, z: Tensor) -> Tensor:
        if self.generator == "numpy":
            return torch.from_numpy(np.random.random_sample(z.shape) > 0.5).float()
        if self.generator == "random":
            return torch.tensor([[random.random() > 0.5 for _ in row] for row in z]).float()
        return (torch.rand(z.shape) > 0.5).float()


def others_draw() -> None:
    """Draw as other networks in this process would."""
    torch.rand(1)
    np.random.random_sample()
    random.random()


@pytest.mark.parametrize("generator", ["torch", "numpy", "random"])
def test_draws_depend_on_seed_network_step_and_position_in_the_batch(generator: str) -> None:
    dropout = Drops(generator)
    world = World(Environment(), torch.device("cpu"))
    x = torch.ones(4, 1, 8, 8)

    def drawn(name: str = "student", seed: int = 0, step: int = 1, begin: int = 0) -> list[Tensor]:
        """The masks of forward, backward and evaluation."""
        config = load("digits-1t1s", [f"seed={seed}"])
        made = make_learner(config, name, dropout, world, None, AccumulationWindow())
        others_draw()
        z = made.forward(x, step, begin)
        others_draw()
        made.backward_parts([z.sum()], step, [begin])
        others_draw()
        return [z != 0, dropout.in_backward != 0, made.predict(x, number=begin) != 0]

    def same(one: list[Tensor], other: list[Tensor]) -> list[bool]:
        return [torch.equal(*pair) for pair in zip(one, other, strict=True)]

    first = drawn()
    assert same(first, drawn()) == [True, True, True]
    assert same(first, first[1:] + first[:1]) == [False, False, False]
    for other in ({"name": "teacher"}, {"seed": 1}, {"begin": 32}):
        assert same(first, drawn(**other)) == [False, False, False], other
    assert same(first, drawn(step=2)) == [False, False, True]


NOISY = """
import random
import numpy as np
import torch
from torch import nn
from switokd.distillation.strategies.switching import SwitOKD

class Noisy(nn.Module):
    # Draws from all generators, in training, backward and evaluation, and changes its input.
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.ReLU(),
            nn.Dropout(0.3), nn.Linear(32, 10))

    def forward(self, x):
        x.mul_(1 + 0.1 * random.random())
        x.add_(torch.from_numpy(0.3 * np.random.rand(*x.shape)))
        z = self.layers(x) + 0.1 * torch.rand(len(x), 10)
        if z.requires_grad:
            z.register_hook(self.noise)
        return z

    def noise(self, gradient):
        factor = 1 + 0.1 * random.random() + 0.1 * np.random.rand()
        return gradient * factor * (1 + 0.1 * torch.rand_like(gradient))

class Drawing(SwitOKD):
    # Draws, and changes its arguments and its results.
    def combine(self, logits, y):
        logits[random.choice(list(logits))].zero_()
        self.mean = torch.stack(list(logits.values())).mean(dim=0)
        self.mean.mul_(np.random.rand()).add_(torch.rand_like(self.mean))
        y.zero_()
        return {"mean": self.mean}

    def terms(self, network, couplings, decision):
        self.mean.mul_(2)
        terms = super().terms(network, couplings, decision)
        terms += couplings.terms(network, ["mean"])
        return [type(t)(t.peer, t.weight * np.random.rand(), t.tau) for t in terms]
"""


def test_draws_and_changes_in_place_do_not_depend_on_the_placement(tmp_path: Path) -> None:
    settings = ["digits-2t1s", "schedule.max_steps=30", "distillation.temperature=0.5"]
    settings += [f"networks.{n}.model=mynets:Noisy" for n in ("teacher1", "teacher2", "student")]
    settings += ["distillation.strategy=mynets:Drawing"]
    one_process = ["placement=replicated", "coordinator=off"]
    table = "placement={teacher1: [1], teacher2: [0], student: [0]}"
    folders = []

    def top1(folder: Path) -> dict[str, float]:
        return {row["network"]: row["test_top1"] for row in lines(folder / "metrics.jsonl")}

    for name, processes, more in (
        ("alone", 1, one_process),
        ("apart", 3, []),
        ("mixed", 2, [table]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mynets.py").write_text(NOISY)
        folders.append(train(tmp_path / name, processes, *settings, *more))
    first, *others = folders
    decision_log = lines(first / "decisions.jsonl")
    assert {d["mode"] for d in decision_log} == {"learning", "expert"}
    tested = top1(first)
    assert len(set(tested.values())) == 3
    for other in others:
        assert lines(other / "decisions.jsonl") == decision_log
        assert top1(other) == tested
        for name in ("teacher1", "teacher2", "student"):
            expected, state = (torch.load(f / "weights" / f"{name}.pt") for f in (first, other))
            assert all(torch.equal(expected[key], state[key]) for key in expected)


class Drawn:
    """A data set that draws its images when it is made."""

    classes = ("even", "odd")

    def __init__(self, train: bool) -> None:
        self.images = torch.rand(8, 1, 4, 4) + np.random.rand() + random.random()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % 2


def test_what_a_data_set_draws_when_it_is_made_is_the_runs() -> None:
    def images() -> tuple[Tensor, Tensor]:
        others_draw()
        data = Data(dataset="tests.data.test_draws:Drawn", batch_size=8)
        opened = open_images(data, 0)
        return next(opened.stream(1))[0], next(iter(opened.test()))[0]

    (x, x_test), again = images(), images()
    assert torch.equal(x, again[0])
    assert torch.equal(x_test, again[1])
    assert not torch.equal(x.sort(dim=0).values, x_test.sort(dim=0).values)
