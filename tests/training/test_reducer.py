"""Gradient sums over several ranks, in real processes.

Not covered: sums in training, uneven shards (`test_oracle.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from switokd.training.reducer import BUCKET_BYTES, Bucket, buckets
from tests.preloaded import call, run_script

# In the first step rank 1 has no sample. The loss depends on `second` on both ranks in the second
# step, on rank 1 in the third, on no rank in the fourth. It never depends on `unused`.
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


def test_a_parameter_has_a_gradient_if_the_loss_of_any_rank_depends_on_it(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    code, out, err = call(tmp_path, run_script, 2, "script.py", ())
    assert code == 0, err
    ranks: list[dict[str, Any]] = [
        json.loads(line) for line in out.splitlines() if line.startswith("{")
    ]
    steps = [
        [[1.0, 1.0], None, None],
        [[3.0, 3.0], [2.0, 2.0], None],
        [[3.0, 3.0], [1.0, 1.0], None],
        [[3.0, 3.0], None, None],  # as in one process: no momentum and no weight decay
    ]
    assert [r["steps"] for r in sorted(ranks, key=lambda r: r["rank"])] == [steps, steps]


def test_gradients_are_sent_in_memory_order_and_return_as_views_of_the_sum() -> None:
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    strided = nn.Parameter(torch.zeros(6, 2)[::2])  # its memory has gaps
    weight = nn.Parameter(convolution.weight.detach())
    parameters = [weight, nn.Parameter(torch.zeros(5)), strided]
    values = [torch.randn(p.shape) for p in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value.clone()  # contiguous, unlike the weights
    bucket = Bucket(parameters)
    flat = bucket.pack()
    assert flat.tolist()[-3:] == [1, 1, 1]
    assert all(
        parameter.grad is None for parameter in parameters
    )  # the bucket's copy is the only one
    bucket.unpack(2 * flat)
    for parameter, value in zip(parameters, values, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 2 * value)
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride() != values[0].stride()
    bases = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
    assert len(bases) == 1


def test_a_bucket_has_one_dtype_and_limited_size() -> None:
    big = BUCKET_BYTES // 4
    sizes = [(big, torch.float32), (8, torch.float32), (8, torch.float32), (8, torch.bfloat16)]
    parameters = [nn.Parameter(torch.empty(n, dtype=kind)) for n, kind in sizes]
    groups = [bucket.parameters for bucket in buckets(parameters)]
    assert [len(group) for group in groups] == [1, 2, 1]
    assert [p for group in groups for p in group] == parameters
