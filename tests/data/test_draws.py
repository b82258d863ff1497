"""What networks draw in training, such as dropout's masks: the same wherever they are.

Not covered: networks on several ranks, which draw for each part of a batch by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from switokd.config.run_file import load
from switokd.runtime.environment import Environment
from switokd.runtime.process_group import World
from switokd.training.build import make_learner
from switokd.training.schedules import AccumulationWindow
from tests.support import lines, run, torchrun


def test_what_a_network_draws_is_given_by_seed_name_step_and_place_in_the_batch() -> None:
    dropout = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5))
    world = World(Environment(), torch.device("cpu"))
    x = torch.ones(4, 1, 8, 8)

    def drawn(name: str = "student", seed: int = 0, step: int = 1, begin: int = 0) -> Tensor:
        config = load("digits-1t1s", [f"seed={seed}"])
        torch.rand(1)  # whatever else was drawn
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


def test_dropout_is_the_same_wherever_a_network_is(tmp_path: Path) -> None:
    (tmp_path / "mynets.py").write_text(DROPOUT)
    settings = ["digits-2t1s", "schedule.max_steps=30", "distillation.temperature=0.5"]
    settings += [f"networks.{n}.model=mynets:net" for n in ("teacher1", "teacher2", "student")]
    alone = [sys.executable, "-m", "switokd.train", *settings, "placement=replicated"]
    table = "placement={teacher1: [1], teacher2: [0], student: [0]}"
    for name, command in (
        ("alone", [*alone, "coordinator=off"]),
        ("apart", torchrun(3, *settings)),
        ("mixed", torchrun(2, *settings, table)),
    ):
        code, out, err = run([*command, f"run_dir={name}"], tmp_path)
        assert code == 0, f"{out}\n{err}"
    first, *others = (tmp_path / name for name in ("alone", "apart", "mixed"))
    record = lines(first / "decisions.jsonl")
    assert {d["mode"] for d in record} == {"learning", "expert"}
    for other in others:
        assert lines(other / "decisions.jsonl") == record
        for name in ("teacher1", "teacher2", "student"):
            mine, theirs = (torch.load(f / "weights" / f"{name}.pt") for f in (first, other))
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
