"""A network that gives the same logits for every image is named after the epoch.

Not covered: why it does.
"""

from __future__ import annotations

from pathlib import Path

from tests.preloaded import call, train_ranks

DEAD = """
import torch
from torch import nn

class Dead(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.arange(10.0))
        mask = torch.full((4, 4), float("-inf")).triu(1)
        self.register_buffer("mask", mask)  # of attention: infinity is meant

    def forward(self, x):
        return self.logits.expand(len(x), -1)
"""


def test_a_network_with_constant_logits_is_named_each_epoch(tmp_path: Path) -> None:
    (tmp_path / "dead.py").write_text(DEAD)
    words = ["digits-1t1s", "networks.teacher.model=dead:Dead", "schedule.epochs=2"]
    words += ["data.train_samples=128", "placement=replicated", "coordinator=off", "run_dir=out"]
    words += ["networks.student.model=tests.sleepers:Flat", "schedule.milestones=[1]"]
    code, _, err = call(tmp_path, train_ranks, 1, tuple(words))
    assert code == 0, err
    assert [line.partition(": it")[0] for line in err.splitlines()] == [
        "switokd: network teacher has had the same logits for every image of a batch in all of "
        f"epoch {epoch}"
        for epoch in (1, 2)
    ]
