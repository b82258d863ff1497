"""Gradients over several ranks, by real processes: what one rank's loss reaches, all update.

Not covered: sums in training, uneven shards (`test_oracle.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from switokd.training.reducer import BUCKET_BYTES, Bucket, buckets
from tests.support import TORCHRUN, run

# Rank 1 has no sample in the first step; the second parameter is reached by both in the second, by
# rank 1 in the third and by nobody in the fourth; nobody's loss ever reaches the last.
SCRIPT = """
import json, os, torch, torch.distributed as dist
from torch import nn
from switokd.training.reducer import GradientReducer

dist.init_process_group("gloo")
rank = dist.get_rank()
first, second, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
reducer = GradientReducer("net", [first, second, unused], dist.group.WORLD)
steps = []
for has_samples, both in [(rank == 0, False), (True, True), (True, rank == 1), (True, False)]:
    reducer.start()
    if has_samples:
        loss = (rank + 1) * first.sum()
        (loss + second.sum() if both else loss).backward()
    reducer.complete()
    reducer.finish()
    steps.append([None if p.grad is None else p.grad.tolist() for p in (first, second, unused)])
os.write(1, (json.dumps({"rank": rank, "steps": steps}) + "\\n").encode())
dist.destroy_process_group()
"""


def test_every_rank_updates_what_any_ranks_loss_has_reached_in_this_step(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [TORCHRUN, "--standalone", "--nproc-per-node=2", "script.py"]
    code, out, err = run(command, tmp_path)
    assert code == 0, err
    found: list[dict[str, Any]] = [
        json.loads(line) for line in out.splitlines() if line.startswith("{")
    ]
    steps = [
        [[1.0, 1.0], None, None],
        [[3.0, 3.0], [2.0, 2.0], None],
        [[3.0, 3.0], [1.0, 1.0], None],
        [[3.0, 3.0], None, None],  # as in one process: neither momentum nor weight decay goes on
    ]
    assert [each["steps"] for each in sorted(found, key=lambda e: e["rank"])] == [steps, steps]


def test_gradients_travel_in_their_own_memory_order_and_come_back_as_parts_of_the_sum() -> None:
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    strided = nn.Parameter(torch.zeros(6, 2)[::2])  # with gaps in its memory
    weight = nn.Parameter(convolution.weight.detach())
    parameters = [weight, nn.Parameter(torch.zeros(5)), strided]
    values = [torch.randn(p.shape) for p in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value.clone()  # contiguous, which the convolution's weights are not
    bucket = Bucket(parameters)
    flat = bucket.pack()
    assert flat.tolist()[-3:] == [1, 1, 1]
    assert all(parameter.grad is None for parameter in parameters)  # not held twice
    bucket.unpack(2 * flat)
    for parameter, value in zip(parameters, values, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 2 * value)
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride() != values[0].stride()
    bases = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
    assert len(bases) == 1


def test_a_bucket_holds_one_type_and_about_its_size() -> None:
    big = BUCKET_BYTES // 4
    sizes = [(big, torch.float32), (8, torch.float32), (8, torch.float32), (8, torch.bfloat16)]
    parameters = [nn.Parameter(torch.empty(n, dtype=kind)) for n, kind in sizes]
    found = [bucket.parameters for bucket in buckets(parameters)]
    assert [len(each) for each in found] == [1, 2, 1]
    assert [p for each in found for p in each] == parameters
