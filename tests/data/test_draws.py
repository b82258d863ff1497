"""Random numbers of networks in training, such as dropout masks, do not depend on the placement.

Not covered: a network on several ranks, where every rank draws for its part of the batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from switokd.config.run_file import load
from switokd.runtime.environment import Environment
from switokd.runtime.process_group import World
from switokd.training.build import make_learner
from switokd.training.schedules import AccumulationWindow
from tests.preloaded import train
from tests.support import lines


def test_draws_depend_on_seed_network_step_and_position_in_the_batch() -> None:
    dropout = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5))
    world = World(Environment(), torch.device("cpu"))
    x = torch.ones(4, 1, 8, 8)

    def drawn(name: str = "student", seed: int = 0, step: int = 1, begin: int = 0) -> Tensor:
        config = load("digits-1t1s", [f"seed={seed}"])
        torch.rand(1)  # other draws before must not matter
        made = make_learner(config, name, dropout, world, None, AccumulationWindow())
        return made.forward(x, step, begin) == 0

    assert torch.equal(drawn(), drawn())
    for other in ({"name": "teacher"}, {"seed": 1}, {"step": 2}, {"begin": 32}):
        assert not torch.equal(drawn(), drawn(**other))


DROPOUT = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.ReLU(),
        nn.Dropout(0.3), nn.Linear(32, 10))
"""


def test_dropout_does_not_depend_on_the_placement(tmp_path: Path) -> None:
    settings = ["digits-2t1s", "schedule.max_steps=30", "distillation.temperature=0.5"]
    settings += [f"networks.{n}.model=mynets:net" for n in ("teacher1", "teacher2", "student")]
    one_process = ["placement=replicated", "coordinator=off"]
    table = "placement={teacher1: [1], teacher2: [0], student: [0]}"
    folders = []
    for name, processes, more in (
        ("alone", 1, one_process),
        ("apart", 3, []),
        ("mixed", 2, [table]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mynets.py").write_text(DROPOUT)
        folders.append(train(tmp_path / name, processes, *settings, *more))
    first, *others = folders
    decision_log = lines(first / "decisions.jsonl")
    assert {d["mode"] for d in decision_log} == {"learning", "expert"}
    for other in others:
        assert lines(other / "decisions.jsonl") == decision_log
        for name in ("teacher1", "teacher2", "student"):
            expected, state = (torch.load(f / "weights" / f"{name}.pt") for f in (first, other))
            assert all(torch.equal(expected[key], state[key]) for key in expected)
