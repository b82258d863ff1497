"""Gradients over several ranks, by real processes: what one rank's loss reaches, all update.

Not covered: sums in training, uneven shards (`test_oracle.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support import TORCHRUN, run

# Rank 1 has no sample in the first step; nobody's loss ever reaches the last parameter.
SCRIPT = """
import json, os, torch, torch.distributed as dist
from torch import nn
from switokd.gradients import Gradients

dist.init_process_group("gloo")
rank = dist.get_rank()
first, second, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
gradients = Gradients("net", [first, second, unused], dist.group.WORLD)
steps = []
for step, has_samples in enumerate((rank == 0, True)):
    gradients.start()
    if has_samples:
        loss = (rank + 1) * first.sum()
        (loss + second.sum() if step else loss).backward()
    gradients.complete()
    gradients.finish()
    steps.append([None if p.grad is None else p.grad.tolist() for p in (first, second, unused)])
os.write(1, (json.dumps({"rank": rank, "steps": steps}) + "\\n").encode())
dist.destroy_process_group()
"""


def test_every_rank_updates_what_any_ranks_loss_reached(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [TORCHRUN, "--standalone", "--nproc-per-node=2", "script.py"]
    code, out, err = run(command, tmp_path)
    assert code == 0, err
    found: list[dict[str, Any]] = [
        json.loads(line) for line in out.splitlines() if line.startswith("{")
    ]
    steps = [[[1.0, 1.0], None, None], [[3.0, 3.0], [2.0, 2.0], None]]
    assert [each["steps"] for each in sorted(found, key=lambda e: e["rank"])] == [steps, steps]
