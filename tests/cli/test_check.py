"""`switokd check`: every recipe makes a step with images of full shape; mistakes are reported.

Not covered: GPUs; that a whole batch fits into memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from switokd.cli.check import check
from switokd.cli.main import app
from switokd.config.data_section import Data
from switokd.config.recipes import recipes
from switokd.config.run_file import load
from switokd.data.catalog import KNOWN, known
from switokd.data.images import open_images
from switokd.data.named import BY_NAME
from switokd.data.synthetic import Noise, images_for
from switokd.distillation.decision import Mode
from switokd.models import registry
from switokd.planning.dry_run import dry_run
from switokd.training.build import make_model
from tests.support import run

MODULE = """
import torch
from torch import nn

def wide(in_channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes + 1))

class two_faced(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        return super().forward(x.flatten(1))[:, : 5 if self.training else 10]

class moody(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        if self.training:
            raise RuntimeError("not today")
        return super().forward(x.flatten(1))

class boundless(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        return super().forward(x.flatten(1)) / 0

class deaf(nn.Linear):
    "Logits without gradients."

    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        return super().forward(x.flatten(1)).detach()

class steep(nn.Linear):
    "All logits are 0, where the square root has an infinite derivative."

    def __init__(self):
        super().__init__(64, 10)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return super().forward(x.flatten(1)).abs().sqrt()

class loud(nn.Linear):
    "Gradients that fit into float16, but not after multiplication by the first loss scale."

    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        return super().forward(16 * x.flatten(1))

class Tall:
    "Images of 3 x 20 x 12 in four classes."

    def __init__(self, train, wrong=False):
        self.classes, self.wrong = ["a", "b", "c", "d"], wrong

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((3, 20, 12), float(index)), 9 if self.wrong else index % 4

def strip(features, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(features, num_classes))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a module of the user."""
    (tmp_path / "own_check.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_check", raising=False)
    return tmp_path


def invoke(*arguments: str) -> tuple[int, str, list[str]]:
    """Run the command in this process; return exit code, output, and the error lines in it."""
    result = CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "160"})
    lines = [line for line in result.output.splitlines() if line.startswith("switokd: ")]
    return result.exit_code, result.output, lines


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_makes_a_step_with_images_of_full_shape(recipe: str, own: Path) -> None:
    config = load(recipe)
    data = known(config.data)
    assert data is not None, "the data of a recipe are in the catalog"
    found = dry_run(config, batch=2)
    assert found.problems == ()
    assert found.images is not None
    assert found.images.shape == data.image
    assert found.images.samples == data.samples
    assert [row.name for row in found.networks] == list(config.topology)
    for row in found.networks:
        assert row.output == (2, data.classes)
        assert 0 < row.loss < 50
        model = registry.build(row.model, data.image[0], data.classes)
        assert row.parameters == registry.parameter_count(model)
        assert row.memory_bytes > 4 * 3 * row.parameters  # weights, gradients, momentum
    assert found.decision is not None
    assert [p.pair for p in found.decision.pairs] == list(config.topology.pairs)
    assert list(own.iterdir()) == [own / "own_check.py"]  # nothing is written


def test_output_describes_networks_and_needs(own: Path) -> None:
    settings = ["data.root=elsewhere", "data.batch_size=100", "networks.teacher1.model=wrn-10-1"]
    code, out, complaints = invoke("cifar100-2t1s", *settings, "--batch", "3")
    assert (code, complaints) == (0, [])
    for words in (
        "cifar100-2t1s: 2T1S, switokd",
        "wrn-16-2",
        "703,284",
        "3 x 100",
        "3 random images, 3 x 32 x 32, 100 classes, on cpu",
        "for batches of 100",
        "not present: elsewhere/cifar-100-python; data.download=true downloads it",
        "3: teacher1: rank 0, teacher2: rank 1, student: rank 2",
        "epochs of 500",
    ):
        assert words in out
    (own / "elsewhere" / "cifar-100-python").mkdir(parents=True)
    small = [f"networks.{name}.model=wrn-10-1" for name in ("teacher1", "teacher2", "student")]
    assert "cifar100, present in elsewhere" in invoke("cifar100-2t1s", *settings, *small)[1]


def test_losses_are_those_of_the_first_training_step(own: Path) -> None:
    """Compared with networks that have the initial weights of the run, on the same images."""
    config = load("digits-1t1s", ["data.batch_size=6"])
    images = images_for(config)
    x, y = next(images.stream(1))
    z = {name: make_model(config, name, images).train()(x) for name in config.topology}
    found = dry_run(config, batch=6)
    assert found.decision is not None
    assert found.decision.paused == ()
    for row, other in zip(found.networks, reversed(found.networks), strict=True):
        log_q, log_p = (z[name].log_softmax(dim=1) for name in (row.name, other.name))
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
        expected = F.cross_entropy(z[row.name], y) + kl
        assert row.loss == pytest.approx(expected.item(), rel=1e-4)


def test_one_bad_run_file_of_several_fails_the_command(own: Path) -> None:
    code, out, complaints = invoke("digits-1t1s", "digits-9t9s", "digits-1t2s")
    assert code == 2
    assert "2 of 3 run files pass" in out
    (line,) = complaints
    assert "digits-9t9s: no such run file" in line
    code, out, complaints = invoke("digits-1t1s", "digits-1t2s")
    assert (code, complaints) == (0, [])
    assert "all 2 run files pass" in out


TEACHER, STUDENT = "networks.teacher.model=own_check:", "networks.student.model=own_check:"
MISTAKES = {
    "unknown model": (
        ["networks.student.model_kwargs={nope: 1}"],
        "digits-1t1s: networks.student: model wrn-10-1 cannot be made with",
    ),
    "class mismatch": (
        ["networks.student.model_kwargs={num_classes: 7}"],
        "networks.student: model wrn-10-1 must turn 2 images into logits of shape (2, 10), got",
    ),
    "wrong output": ([f"{STUDENT}wide"], "into logits of shape (2, 10), got (2, 11)"),
    "wrong in training": (
        [f"{TEACHER}two_faced"],
        "networks.teacher: model own_check:two_faced must turn 4 images into logits of shape "
        "(4, 10) in training, got (4",
    ),
    "fails in training": (
        [f"{TEACHER}moody"],
        "networks.teacher: its forward pass fails in training on images of shape [4, 1, 8, 8]",
    ),
    "not finite": ([f"{STUDENT}boundless"], "networks.student: its logits are not finite"),
    "no gradient": (
        [f"{STUDENT}deaf"],
        "networks.student: its logits depend on no parameter to train",
    ),
    "endless gradient": ([f"{TEACHER}steep"], "networks.teacher: its gradients are not finite"),
    "endless weights": (
        ["networks.teacher.optimizer={lr: 1e30, weight_decay: 1e30}"],
        "networks.teacher: its weights are not finite after the first step; the usual remedy is",
    ),
    "shards": (
        ["networks.teacher.ranks=3", "data.batch_size=4"],
        "data.batch_size: 4 images leave a rank of teacher (ranks 0-2) fewer than 2",
    ),
    "shards of all there is": (
        ["networks.teacher.ranks=5", "data.train_samples=7", "data.drop_last=false"],
        "data.batch_size: 7 images, all that there are, leave a rank of teacher (ranks 0-4) fewer",
    ),
    "batch": (["data.batch_size=5000"], "data.batch_size: 5000 is more than the 1437 training"),
    "fewer": (["data.train_samples=1438"], "data.train_samples: 1438 is more than the 1437 train"),
    "held out": (
        ["distillation={strategy: kdcl-general, strategy_kwargs: {held_out: 1436}}"],
        "distillation.strategy: it holds out 1436 of the 1437 training images, and at least 2 must",
    ),
    "setting": (["schedule.epochs=0"], "schedule.epochs: found 0"),
    "weights": (["networks.teacher.weights=no.pt"], "networks.teacher.weights: no.pt cannot be re"),
    "no profile for auto": (
        ["placement=auto", "auto.profiles=[no.json]"],
        "no.json: cannot be read as a profile: No such file",
    ),
    "no run for auto": (
        ["placement=auto", "auto.run=nowhere"],
        "nowhere/decisions.jsonl cannot be read: No such file",
    ),
    "no data": (["data.dataset=image-folder"], "must hold train/CLASS/... and val/CLASS/..."),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(case: str, own: Path) -> None:
    settings, words = MISTAKES[case]
    code, out, complaints = invoke("digits-1t1s", *settings)
    assert code == 2, out
    (line,) = complaints
    assert line.startswith(("switokd: digits-1t1s", "switokd: command line"))
    assert words in line
    assert "Traceback" not in out


def test_gradients_that_overflow_only_by_the_loss_scale_are_no_mistake(own: Path) -> None:
    """Training then skips the update and lowers the scale."""
    loud, words = f"{TEACHER}loud", "networks.teacher: its gradients are not finite"
    assert invoke("digits-1t1s", loud)[0] == 0
    code, out, complaints = invoke("digits-1t1s", loud, "compute.precision=fp16")
    assert (code, complaints) == (0, []), out
    for precision in ("fp16", "bf16"):
        code, _, complaints = invoke(
            "digits-1t1s", f"{TEACHER}steep", f"compute.precision={precision}"
        )
        assert code == 2
        assert any(words in line for line in complaints)


def test_number_of_steps_follows_from_the_training_images(own: Path) -> None:
    fewer = ["data.train_samples=1000", "schedule.epochs=3"]
    held_out = "distillation={strategy: kdcl-general, strategy_kwargs: {held_out: 200}}"
    epochs = 3
    for settings, steps in ((fewer, 45), ([*fewer, held_out], 36)):
        code, out, complaints = invoke("digits-1t1s", *settings)
        assert (code, complaints) == (0, [])
        assert f"steps     {steps}: {epochs} epochs of {steps // epochs}" in out
        config = load("digits-1t1s", settings)
        real = open_images(config.data, config.seed, config.method.strategy.held_out)
        assert real.steps_per_epoch * epochs == steps


def test_each_bad_network_gives_a_line(own: Path) -> None:
    code, _, complaints = invoke(
        "digits-1t1s", f"{TEACHER}wide", "networks.student.model_kwargs={nope: 1}"
    )
    assert code == 2
    assert ["networks.teacher: " in line for line in complaints] == [True, False]
    assert "networks.student: model wrn-10-1 cannot be made" in complaints[1]


def test_nothing_to_check_is_a_mistake() -> None:
    code, _, complaints = invoke("data.batch_size=4")
    assert code == 2
    assert "name a recipe" in complaints[0]


def test_data_set_of_the_user_is_opened(own: Path) -> None:
    (own / "mine.yaml").write_text(
        "name: mine\n"
        "data: {dataset: 'own_check:Tall', batch_size: 6}\n"
        "networks:\n"
        "  t: {role: teacher, model: 'own_check:strip', model_kwargs: {features: 720}}\n"
        "  s: {role: student, model: 'own_check:strip', model_kwargs: {features: 720}}\n"
    )
    code, out, complaints = invoke("mine.yaml")
    assert (code, complaints) == (0, [])
    assert "4 images of the data set, 3 x 20 x 12, 4 classes" in out
    assert "2,884" in out  # 720 x 4 + 4
    code, out, complaints = invoke("mine.yaml", "data.kwargs={wrong: true}")
    assert code == 2, out
    assert "label 9 is outside the 4 classes" in complaints[0]


def test_paused_teacher_is_trained_as_well(own: Path) -> None:
    """With a threshold of 0 the better teacher is paused; the dry run still trains it."""
    found = []
    for seed in range(6):
        settings = ["distillation={strategy: threshold, strategy_kwargs: {delta: 0}}"]
        run_file = load("digits-1t1s", [*settings, f"seed={seed}"])
        result = dry_run(run_file)
        assert result.problems == ()
        assert all(row.loss > 0 and row.seconds > 0 for row in result.networks)
        assert result.decision is not None
        found.append(result.decision.pairs[0].mode)
        steep = load("digits-1t1s", [*settings, f"seed={seed}", f"{TEACHER}steep"])
        assert "networks.teacher: its gradients are not finite" in dry_run(steep).problems[0]
    assert Mode.EXPERT in found


def test_a_frozen_teacher_needs_no_gradient(own: Path) -> None:
    torch.save(registry.build("wrn-16-2", 1, 10).state_dict(), own / "t.pt")
    settings = ["distillation.strategy=kd", "networks.teacher.weights=t.pt"]
    code, out, complaints = invoke("digits-1t1s", *settings)
    assert (code, complaints) == (0, [])
    assert "frozen" in out


def test_catalog_agrees_with_the_data_sets() -> None:
    images = open_images(Data(dataset="digits"), seed=0)
    opened = {"imagenet", "image-folder", "huggingface", "webdataset"}
    assert set(KNOWN) | opened == set(BY_NAME)
    data = KNOWN["digits"]
    assert (images.shape, images.classes, images.samples) == (data.image, data.classes, 1437)
    noise = images_for(load("digits-1t1s", ["data.batch_size=20"]))
    x, y = next(noise.stream(1))
    assert x.shape == (20, 1, 8, 8)
    assert -1 <= x.min() < -0.9 < 0.9 < x.max() <= 1
    assert 1 < len(set(y.tolist())) <= 10
    assert isinstance(noise.sources.train, Noise)


def test_reading_a_bad_run_file_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from switokd.cli.main import app; "
        "rc = app(['check', 'digits-1t1s', 'schedule.epochs=0'], standalone_mode=False); "
        "print(rc, 'torch' in sys.modules)"
    )
    _, out, err = run([sys.executable, "-c", program], tmp_path)
    assert out.splitlines()[-1] == "2 False", err
    assert check.__doc__ is not None
