"""Runs with networks of the user's own: outputs that are no tensor, and networks that fail.

Not covered: the forms of outputs (`tests/models/test_outputs.py`); the kinds of errors
(`tests/test_own_code.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import switokd
from switokd.cli.worker import worker_main
from switokd.errors import OwnCodeError, UsageError
from switokd.export.artefact import load_artefact
from tests.preloaded import call

NETS = '''\
import sys
from types import SimpleNamespace
import torch
from torch import nn

class Net(nn.Module):
    """Fails in one way, or returns its logits in one form."""

    def __init__(self, form="plain"):
        super().__init__()
        self.form, self.head, self.calls = form, nn.Linear(64, 10), 0
        if form == "constructor":
            raise OSError("no such file: pretrained.pt")

    def forward(self, x):
        z = self.head(x.flatten(1))
        self.calls += self.training
        return getattr(self, self.form)(x, z)

    def plain(self, x, z):
        return z

    def object(self, x, z):
        return SimpleNamespace(logits=z, hidden=x)

    def pair(self, x, z):
        return (z + 1, z)

    def train_only(self, x, z):
        return {"logits": z, "aux": z + 1} if self.training else z

    def step_3(self, x, z):
        if self.calls == 3:
            raise ZeroDivisionError("the third")
        return z

    def evaluation(self, x, z):
        if not self.training and len(x) > 2:
            raise KeyError("scale")
        return z

    def backward(self, x, z):
        if z.requires_grad:
            z.register_hook(self.hook)
        return z

    def hook(self, gradient):
        raise ValueError("in the hook")

    def in_place(self, x, z):
        h = z.exp()
        y = h * 1
        h.add_(1)
        return y

    def leaves(self, x, z):
        return sys.exit(0) if self.training else z

    def no_gradient(self, x, z):
        return z.detach()

    def integers(self, x, z):
        return z.long() if self.training else z

    def fewer(self, x, z):
        return z[1:] if self.training else z

    def fewer_in_evaluation(self, x, z):
        return z[1:] if len(x) > 2 and not self.training else z

    def grown(self, x, z):
        """Keeps a tensor that grows with the batch, as layers of attention keep positions."""
        if self.calls == 0 or len(x) > len(self.positions):
            self.positions = torch.linspace(0, 1, 10).expand(len(x), 10).clone()
        return z + self.positions[: len(x)] * self.head.bias


class Counts(Net):
    """Counts its training batches, and keeps the number in its state dict."""

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]
'''
RUN_FILE = """\
name: own
data: {dataset: digits, batch_size: 16, train_samples: 64}
networks:
  t: {role: teacher, model: "own_nets:Net", optimizer: {name: sgd, lr: 0.05}}
  s: {role: student, model: "own_nets:Net", optimizer: {name: sgd, lr: 0.05}}
schedule: {epochs: 1, milestones: []}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "own.yaml").write_text(RUN_FILE)
    return tmp_path


def train(form: str, folder: str = "out", **settings: Any) -> switokd.Run:
    of_student = {f"networks.s.{key}": value for key, value in settings.items()}
    kwargs = {"networks.s.model_kwargs": {"form": form}, "run_dir": folder}
    return switokd.train("own.yaml", kwargs | of_student)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("constructor", "{'form': 'constructor'}): OSError: no such file"),
        ("step_3", "own_nets.py:34 in step_3 (network s): ZeroDivisionError: the third"),
        ("evaluation", "own_nets.py:39 in evaluation (network s): KeyError: 'scale'"),
        ("backward", "own_nets.py:48 in hook (network s): ValueError: in the hook"),
        ("in_place", "network s: RuntimeError: one of the variables needed for gradient computa"),
        ("leaves", "own_nets.py:57 in leaves (network s): SystemExit: it ends the process, with 0"),
    ],
)
def test_an_error_of_the_users_network_is_one_line(form: str, words: str, own: Path) -> None:
    with pytest.raises(OwnCodeError) as found:
        train(form)
    assert words in str(found.value)
    assert "\n" not in str(found.value)
    assert type(found.value.__cause__).__name__ in words


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("no_gradient", "networks.s: its logits depend on no parameter to train"),
        (
            "integers",
            "own_nets:Net must turn 16 images into logits of shape (16, 10) in training, g",
        ),
        ("fewer", "network s: in training the model must turn 16 images into logits of shape (16,"),
        ("fewer_in_evaluation", "network s: in evaluation the model must return logits of all "),
        ("pair", "own_nets:Net returns a tuple (0: [2, 10], 1: [2, 10]) in evaluation; it must re"),
    ],
)
def test_wrong_logits_are_one_line(form: str, words: str, own: Path) -> None:
    with pytest.raises(UsageError) as found:
        train(form)
    assert words in str(found.value)


@pytest.mark.parametrize(
    ("form", "settings"),
    [("object", {}), ("train_only", {}), ("pair", {"output": 1}), ("pair", {"output": -1})],
)
def test_logits_in_an_output_train_as_plain_logits(
    form: str, settings: dict[str, Any], own: Path
) -> None:
    found, expected = train(form, **settings), train("plain", "plain")
    for name in ("s", "t"):
        weights = [torch.load(run.path / f"weights/{name}.pt") for run in (found, expected)]
        assert list(weights[0]) == ["head.weight", "head.bias"]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert found.metrics[0]["test_top1"] == expected.metrics[0]["test_top1"]


def test_an_exported_network_gives_plain_logits(own: Path) -> None:
    run = train("pair", output=1)
    folder = run.export("s", formats=["state-dict", "torch-export"])
    images = torch.rand(3, 1, 8, 8).numpy()
    answers = [
        load_artefact(folder, kind).logits(images) for kind in ("state-dict", "torch-export")
    ]
    assert [answer.shape for answer in answers] == [(3, 10), (3, 10)]
    assert abs(answers[0] - answers[1]).max() < 1e-5


def test_a_network_may_keep_tensors_from_an_evaluation_for_training(own: Path) -> None:
    settings = {"networks.s.model_kwargs": {"form": "grown"}, "schedule.epochs": 2}
    assert len(switokd.train("own.yaml", settings).metrics) == 4  # two networks


def test_an_extra_state_is_saved_and_restored(own: Path) -> None:
    settings = {"networks.s.model": "own_nets:Counts", "schedule.ema_decay": 0.9, "run_dir": "a"}
    run = switokd.train("own.yaml", settings)
    assert run.network("s").calls == 4  # 64 images in batches of 16
    files = ("s.pt", "s.ema.pt", "best/s.pt")
    saved = [torch.load(run.path / "weights" / file)["_extra_state"] for file in files]
    assert saved == 3 * [{"calls": 4}]
    given = {**settings, "networks.s.weights": "a/weights/s.pt", "run_dir": "b"}
    assert switokd.train("own.yaml", given).network("s").calls == 8
    more = {**settings, "schedule.epochs": 2, "resume": "auto"}
    assert switokd.train("own.yaml", more).network("s").calls == 8
    assert run.export("s", formats=["state-dict"]).is_dir()


def start(*arguments: str) -> None:
    """Run the command of one rank, `python -m switokd.train`."""
    sys.argv = ["switokd.train", "own.yaml", "placement=replicated", "coordinator=off", *arguments]
    worker_main()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("verbose", [False, True])
def test_the_command_ends_with_one_line_and_verbose_adds_the_frames(
    verbose: bool, own: Path
) -> None:
    options = ["--verbose"] if verbose else []
    settings = "networks.s.model_kwargs={form: step_3}"
    code, _, err = call(own, start, *options, settings, seconds=50)
    assert code == 2, err
    text = '`raise ZeroDivisionError("the third")`'
    line = f"own_nets.py:34 in step_3 (network s): ZeroDivisionError: the third ({text})"
    last = err.splitlines()[-1]
    assert last.startswith("switokd: ")
    assert last.endswith(line if verbose else f"{line}; --verbose shows the frames")
    assert ("Traceback" in err) is verbose
    assert ("in step_3\n" in err) is verbose
