"""Values that are not finite reach no weight: the run stops, or all ranks skip the step.

Not covered: GPUs.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from switokd.config.run_file import load_importable
from switokd.errors import NonFiniteError
from switokd.runs.checkpoints import stored
from switokd.runtime.environment import Environment
from switokd.training.optimizer import check_gradients
from switokd.worker import train
from tests import preloaded
from tests.support import lines

OWN = """
import torch
from torch import nn
from torch.utils.data import Dataset

class Steep(nn.Module):
    '''Its gradient is not finite in the fourth step; its logits are.'''

    steps = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        z = self.layer(x.flatten(1))
        if self.training and z.requires_grad:
            self.steps += 1
            if self.steps == 4:
                z = z + (z - z.detach()).abs().sqrt() * 1e-3
        return z

class Bad(nn.Module):
    '''Something of it is not finite in the given training steps; `kind` says what.'''

    steps = 0

    def __init__(self, kind, at):
        super().__init__()
        self.kind, self.at = kind, at
        self.norm = nn.BatchNorm1d(64)
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        z = self.layer(self.norm(x.flatten(1)))
        if not (self.training and z.requires_grad):
            return z
        self.steps += 1
        if self.steps in self.at:
            if self.kind == "logits":
                z = z * float("nan")
            elif self.kind == "loss":
                z = z * 0 + torch.tensor([3e38] + 9 * [-3e38])
            elif self.kind == "gradient":
                z = z + (z - z.detach()).abs().sqrt() * 1e-3
            else:
                self.norm.running_var.data[3] = float("inf")
        return z

class Images(Dataset):
    def __init__(self, bad=()):
        self.bad = set(bad)

    def __len__(self):
        return 60

    def __getitem__(self, i):
        x = torch.full((1, 8, 8), float(i % 10))
        if i in self.bad:
            x[0, 2, 2] = float("nan")
        return x, i % 10

def data(train):
    return Images([17, 41] if train else [])
"""


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


USUAL = ["placement=replicated", "coordinator=off", "run_dir=out", "schedule.max_steps=9"]
KINDS = {
    "logits": "logits that are not finite at step 4",
    "loss": "a loss that is not finite at step 4",
    "gradient": "a gradient that is not finite at step 4",
    "buffer": "a buffer that is not finite at step 4",
}
SAVING = ["checkpoint.every_steps=1", "checkpoint.keep=100"]


def bad(kind: str, at: str = "[4]") -> list[str]:
    """Settings of two linear networks, of which the student has something that is not finite."""
    student = f"networks.student.model_kwargs={{kind: {kind}, at: {at}}}"
    return [
        *(f"networks.{name}.model=own:Bad" for name in ("teacher", "student")),
        *("networks.teacher.model_kwargs={kind: none, at: []}", student),
    ]


def trained(*settings: str) -> dict[str, Any]:
    """Train in this process; return the summary."""
    folder = train(load_importable("digits-1t1s", [*USUAL, *settings]), Environment())
    assert folder is not None
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def state(step: int, folder: str = "out") -> list[dict[str, Any]]:
    """Weights, optimizers and buffers after a step, by rank."""
    (checkpoint,) = (c for c in stored(Path(folder)) if c.step == step)
    return [{k: r[k] for k in ("shared", "own")} for r in checkpoint.read()[0]["ranks"]]


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of a state, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for item in items for t in tensors(item)] if isinstance(value, dict | list) else []


def assert_nothing_changed(before: Any, after: Any) -> None:
    pairs = list(zip(tensors(before), tensors(after), strict=True))
    assert len(pairs) >= 8
    assert all(torch.equal(one, other) and one.isfinite().all() for one, other in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_leaves_no_trace(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    summary = trained(*bad(kind), *SAVING, "schedule.on_nonfinite=skip")
    ((step, reason),) = ((s["step"], s["reason"]) for s in summary["skipped_steps"])
    assert step == 4
    assert f"network student (rank 0) has {KINDS[kind]}" in reason
    assert_nothing_changed(state(3), state(4))
    with pytest.raises(AssertionError):
        assert_nothing_changed(state(4), state(5))
    assert [line["step"] for line in lines(Path("out/decisions.jsonl"))] == list(range(1, 10))
    shown = capsys.readouterr().out
    assert shown.count("step 4 is skipped: network student") == 1
    assert "1 step skipped, for values that were not finite" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_stops_before_the_step_is_applied(kind: str) -> None:
    assert KINDS[kind] in failure(*bad(kind), *SAVING)
    assert max(checkpoint.step for checkpoint in stored(Path("out"))) == 3
    assert all(tensor.isfinite().all() for tensor in tensors(state(3)))


def test_too_many_skipped_steps_in_a_row_stop_the_run() -> None:
    skipping = ["schedule.on_nonfinite=skip", "schedule.max_skipped=2"]
    message = failure(*bad("gradient", "[2, 3, 5, 6, 7]"), *SAVING, *skipping)
    assert "a gradient that is not finite at step 7" in message
    assert "The 2 steps before it were skipped already (schedule.max_skipped)" in message
    assert_nothing_changed(state(4), state(6))


@pytest.mark.parametrize("kind", ["logits", "gradient"])
@pytest.mark.parametrize("placement", ["dedicated", "replicated"])
def test_all_ranks_skip_the_step_of_another_rank(placement: str, kind: str, tmp_path: Path) -> None:
    settings = [*bad(kind), *SAVING, "schedule.on_nonfinite=skip", "schedule.max_steps=9"]
    preloaded.train(tmp_path, 2, "digits-1t1s", *settings, f"placement={placement}")
    summary = json.loads(Path("out/summary.json").read_text())
    assert [line["step"] for line in summary["skipped_steps"]] == [4]
    assert_nothing_changed(state(3), state(4))
    if placement == "dedicated":
        assert "network student (rank 1) has" in summary["skipped_steps"][0]["reason"]


def test_accumulated_gradients_of_the_window_are_dropped_too() -> None:
    more = ["schedule.on_nonfinite=skip", "schedule.accumulate=3"]
    summary = trained(*bad("gradient", "[5]"), *SAVING, *more)
    assert [line["step"] for line in summary["skipped_steps"]] == [5]
    before, after, end = (state(step)[0] for step in (4, 5, 6))
    for name in ("teacher", "student"):
        assert [g for g in before["own"][name]["pending"] if g is not None]
        assert after["own"][name]["pending"] is None
        weights = [s["shared"][name]["model"]["layer.weight"] for s in (before, after, end)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2]), "step 6 ends the window"
        assert weights[2].isfinite().all()


def test_a_run_that_skips_images_continues_to_the_same_bits() -> None:
    flat = [f"networks.{name}.model=tests.sleepers:Flat" for name in ("teacher", "student")]
    settings = [*flat, *SAVING, "data.dataset=own:data", "data.batch_size=6"]
    settings += ["schedule.on_nonfinite=skip", "schedule.max_steps=14", "resume=auto"]
    whole = trained(*settings)
    first = whole["skipped_steps"][0]
    assert re.search(
        r"training images? [\d, ]+ ha(s|ve) values that are not finite", first["reason"]
    )
    end = state(14)
    for checkpoint in stored(Path("out")):
        if checkpoint.step > first["step"]:
            shutil.rmtree(checkpoint.path)
    again = trained(*settings)
    assert again["skipped_steps"] == whole["skipped_steps"]
    assert_nothing_changed(end, state(14))


def failure(*settings: str) -> str:
    """Train in this process; return the message of the NonFiniteError."""
    config = load_importable("digits-1t1s", [*USUAL, *settings])
    with pytest.raises(NonFiniteError) as caught:
        train(config, Environment())
    return str(caught.value)


def test_a_gradient_that_is_not_finite_is_not_applied() -> None:
    models = [f"networks.{name}.model=own:Steep" for name in ("teacher", "student")]
    message = failure(*models, "checkpoint.every_steps=1", "distillation.strategy=vanilla")
    assert "network student has a gradient that is not finite at step 4" in message
    checkpoint = stored(Path("out"))[0]
    assert checkpoint.step == 3
    state, _ = checkpoint.read()
    for part in state["ranks"][0]["shared"].values():
        assert all(value.isfinite().all() for value in part["model"].values())


def test_images_that_are_not_finite_are_named_instead_of_the_learning_rate() -> None:
    models = [f"networks.{name}.model=tests.sleepers:Flat" for name in ("teacher", "student")]
    message = failure(*models, "data.dataset=own:data", "data.batch_size=60")
    assert "have values that are not finite (used at step 1, which was not applied)" in message
    assert "training images 17, 41 " in message or "training images 41, 17 " in message
    assert "optimizer.lr" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_among_many_is_found(value: float) -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 1000)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3e38)
    check_gradients(parameters, "s", 7)  # the sum overflows, and no gradient does
    assert parameters[1].grad is not None
    parameters[1].grad[-1] = value
    with pytest.raises(NonFiniteError, match=r"network s has a gradient .* at step 7; it was not"):
        check_gradients(parameters, "s", 7)
