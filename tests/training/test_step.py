"""A training step reads from the device once; nothing else waits for a GPU.

The tests need no GPU: they count all calls that would wait for one, in the step and in the
measurements after it.

Not covered: the results of a step (`test_oracle.py`); waits within a GPU's kernels.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.in_process import ONE_PROCESS, InProcess
from switokd.config.config import Config
from switokd.training import meters, nonfinite, optimizer
from switokd.training.meters import EpochLog
from tests.preloaded import call, run_script
from tests.support import lines

STEPS = 6
NETWORKS = {
    "t1": {"role": "teacher", "model": "wrn-10-1"},
    "t2": {"role": "teacher", "model": "wrn-10-1"},
    "s": {"role": "student", "model": "wrn-10-1"},
}

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
"""Operators that copy values to the host; `Tensor.item` and `if tensor` call the first one."""


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that wait, including those that PyTorch itself calls."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        if name in WAITING or (name.startswith("index") and _has_mask(args)):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def reading() -> Iterator[Counter[str]]:
    """Count all reads from the device inside."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch, Waits(counts):
        # On a CPU these calls are not operators. A tensor made of numbers must be copied to a GPU.
        calls = [(Tensor, name) for name in ("tolist", "numpy", "cpu", "new_tensor")]
        for owner, name in [*calls, (torch, "tensor"), (torch, "as_tensor")]:
            original = getattr(owner, name)

            def call(*args: Any, name: str = name, original: Any = original, **more: Any) -> object:
                counts[name] += 1
                return original(*args, **more)

            patch.setattr(owner, name, call)
        yield counts


def _has_mask(args: Any) -> bool:
    return any(i is not None and i.dtype is torch.bool for i in args[1])


def configured(strategy: str, **sections: Any) -> Config:
    raw = {
        **ONE_PROCESS,
        "name": "step",
        "device": "cpu",
        "data": {"dataset": "digits", "batch_size": 16, **sections.pop("data", {})},
        "networks": {n: {**network, **sections.pop(n, {})} for n, network in NETWORKS.items()},
        "distillation": {"strategy": strategy},
        "schedule": {"epochs": 1, "max_steps": STEPS, **sections.pop("schedule", {})},
        "compute": sections.pop("compute", {}),
    }
    assert not sections
    return Config.model_validate(raw)


def reads_of(config: Config, patch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Train, and return the reads of each step and of the measurements after it."""
    ours = InProcess(config)
    log = EpochLog(ours.learners, ours.placement, ours.decider, ours.device)
    counts = []
    patch.setattr(meters, "SEND_SECONDS", math.inf)  # sending live metrics reads from the device
    for x, y in ours.batches(STEPS):
        with reading() as reads:
            log.add(ours.step(x, y), len(y))
        counts.append(reads)
    assert len(counts) == STEPS
    assert all(math.isfinite(sum_) for sums in log.sums().values() for sum_ in sums)
    return counts


@pytest.mark.parametrize(
    ("strategy", "sections"),
    [
        ("switokd", {}),
        ("switokd", {"compute": {"precision": "bf16"}}),
        ("switokd", {"compute": {"precision": "fp16"}}),
        ("switokd", {"schedule": {"accumulate": 2}}),
        ("switokd", {"schedule": {"ema_decay": 0.9}}),
        ("switokd", {"t1": {"clip_norm": 1.0}}),
        ("switokd", {"data": {"mixup": 0.4}}),
        ("dml", {}),
        ("kdcl-naive", {}),
        ("kdcl-linear", {}),
        ("kdcl-minlogit", {}),
        ("kdcl-general", {}),
    ],
    ids=str,
)
def test_a_step_reads_from_the_device_once(
    strategy: str, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "check_gradients", lambda *found: None)  # as on a GPU
    monkeypatch.setattr(nonfinite, "are_finite", lambda *found: True)
    first, *later = reads_of(configured(strategy, **sections), monkeypatch)
    assert first == {"tolist": 1, "tensor": 1}  # the header, copied from pinned memory
    assert later == [{"tolist": 1}] * (STEPS - 1)


# Counts each step's reads in a training with two ranks.
COUNTING = """
import json
import os
import sys
from switokd import worker
from switokd.training import nonfinite, optimizer, trainer
from switokd.runtime.environment import environment
from switokd.config.run_file import load
from tests.training.test_step import reading

train_step, counts = trainer.train_step, []
optimizer.check_gradients = lambda *found: None  # as on a GPU
nonfinite.are_finite = lambda *found: True

def counted(*arguments):
    with reading() as reads:
        result = train_step(*arguments)
    counts.append(reads)
    return result

trainer.train_step = counted
helpers = worker.Helpers(draw=lambda folder: folder)
worker.train(load("digits-2t1s", sys.argv[1:]), environment(os.environ), helpers)
with open(f"rank{os.environ['RANK']}.json", "w") as file:
    json.dump(counts, file)
"""


def test_a_rank_with_shared_networks_reads_once_per_step(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(COUNTING)
    settings = ["placement=replicated", "data.batch_size=16"]
    settings += [f"networks.{name}.model=wrn-10-1" for name in ("teacher1", "teacher2", "student")]
    settings += ["distillation.temperature=0.25", f"schedule.max_steps={STEPS}", "run_dir=out"]
    code, _, err = call(tmp_path, run_script, 2, "script.py", tuple(settings))
    assert code == 0, err
    decisions = lines(tmp_path / "out" / "decisions.jsonl")
    assert {d["teacher"] for d in decisions if d["mode"] == "learning"} == {"teacher1", "teacher2"}
    for rank in (0, 1):
        counts = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert counts == [{"tolist": 1, "tensor": 1}, *[{"tolist": 1}] * (STEPS - 1)]


def test_reads_are_counted_everywhere() -> None:
    x = torch.arange(4.0, requires_grad=True)
    inside: list[float] = []
    with reading() as counts:
        y = (x * x).sum()
        y.register_hook(lambda gradient: inside.append(gradient.item()))  # type: ignore[no-untyped-call]
        y.backward()  # type: ignore[no-untyped-call]
        if x[x > 1].sum() > 0:
            x.detach().cpu().tolist()
    assert inside == [1.0]
    assert counts == {"_local_scalar_dense": 2, "index": 1, "cpu": 1, "tolist": 1}
