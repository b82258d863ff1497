"""Exporting: every format against the trained network, errors, and the manifest.

Not covered: predicting pictures (`test_predict.py`).
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from sklearn.datasets import load_digits
from torch import Tensor, nn
from typer.testing import CliRunner

from switokd.cli.main import app
from switokd.errors import SwitokdError, UsageError
from switokd.export import formats
from switokd.export.artefact import load_artefact
from switokd.export.exporter import export, make_reference, write_checked
from switokd.export.manifest import Manifest, sha256
from switokd.export.trained import load_trained
from switokd.models import registry
from tests.preloaded import train
from tests.support import run, unshare

ALONE = ["placement=replicated", "coordinator=off", "schedule.max_steps=5"]
DIGITS = torch.from_numpy(load_digits().images)[1500:1571, None].float() / 16  # [71, 1, 8, 8]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    cwd = tmp_path_factory.mktemp("run")
    return train(cwd, 1, "digits-1t1s", *ALONE)


@pytest.fixture(scope="module")
def artefact(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student in every format."""
    return export(finished, out=tmp_path_factory.mktemp("exported") / "student")


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run folder that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "mine"))


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, output and standard error of the command in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def live_logits(run: Path, weights: str = "weights/student.pt") -> Tensor:
    """Return the trained student's logits for DIGITS, computed without the exporter."""
    network = registry.build("wrn-10-1", in_channels=1, num_classes=10)
    network.load_state_dict(torch.load(run / weights, weights_only=True))
    with torch.no_grad():
        return network.eval()((DIGITS - 0.306) / 0.377)  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 7, 71])
def test_programs_take_images_from_0_to_1_in_any_batch_size(
    batch: int, artefact: Path, finished: Path
) -> None:
    live = live_logits(finished).numpy()[:batch]
    session = onnxruntime.InferenceSession(str(artefact / "model.onnx"))
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape) == ("images", ["batch", 1, 8, 8])
    assert (logits.name, logits.shape) == ("logits", ["batch", 10])
    (exported,) = session.run(None, {"images": DIGITS[:batch].numpy()})
    np.testing.assert_allclose(exported, live, atol=1e-5)
    program = torch.export.load(artefact / "model.pt2").module()
    np.testing.assert_allclose(program(DIGITS[:batch]).detach(), live, atol=1e-5)


def test_state_dict_is_that_of_the_trained_network(artefact: Path, finished: Path) -> None:
    exported = torch.load(artefact / "weights.pt", weights_only=True)
    trained = torch.load(finished / "weights" / "student.pt", weights_only=True)
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[key], trained[key]) for key in trained)


def test_onnx_of_older_pytorch_is_the_same_program(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "FIRST_WITH_ONNX_FROM_TRACE", "99")
    folder = export(finished, wanted=["onnx"], out=tmp_path / "older")
    assert Manifest.load(folder).checked_on == "180 of 360 images of the test set"
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape) == ("images", ["batch", 1, 8, 8])
    assert (logits.name, logits.shape) == ("logits", ["batch", 10])


def test_manifest_describes_network_input_and_files(artefact: Path, finished: Path) -> None:
    raw = json.loads((artefact / "artefact.json").read_text())
    manifest = Manifest.load(artefact)
    summary = json.loads((finished / "summary.json").read_text())
    assert (manifest.network, manifest.role, manifest.model) == ("student", "student", "wrn-10-1")
    assert (manifest.run, manifest.strategy) == ("digits-1t1s", "switokd")
    assert manifest.top1 == summary["networks"]["student"]["top1_last"]
    assert manifest.parameters == summary["networks"]["student"]["parameters"]
    assert raw["signature"]["labels"] == list("0123456789")
    assert (raw["signature"]["mean"], raw["signature"]["std"]) == ([0.306], [0.377])
    assert manifest.signature.shape == (1, 8, 8)
    assert manifest.checked_on == "180 of 360 images of the test set"
    assert {"torch", "onnx", "onnxruntime", "switokd"} <= set(manifest.versions)
    assert set(manifest.files) == {"onnx", "torch-export", "state-dict"}
    assert {f.file for f in manifest.files.values()} | {"artefact.json"} == {
        p.name for p in artefact.iterdir()
    }
    for file in manifest.files.values():
        assert 0 <= file.max_difference <= file.tolerance
        assert file.same_class == 1
        assert file.sha256 == sha256(artefact / file.file)
    assert "values 0 to 1 (bytes / 255); it normalises" in manifest.files["onnx"].takes


def test_command_prints_the_comparison(mine: Path) -> None:
    code, out, err = invoke("export", mine, "--network", "teacher", "--formats", "state-dict")
    assert (code, err) == (0, "")
    for words in (
        "teacher of digits-1t1s (wrn-16-2, last weights)",
        "100.0%",
        "180 of 360 images of the test set",
    ):
        assert words in out
    folder = mine / "export" / "teacher"
    assert str(folder) in out
    assert {p.name for p in folder.iterdir()} == {"artefact.json", "weights.pt"}


@pytest.mark.parametrize("shift", [0.01, float("nan")])
def test_a_difference_is_an_error_and_leaves_nothing(
    shift: float, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = formats.trace

    def of_another_network(network: Any, signature: Any) -> Any:
        network = copy.deepcopy(network)
        network.head.bias.data += shift
        return trace(network, signature)

    monkeypatch.setattr(formats, "trace", of_another_network)
    before = sorted(mine.iterdir())
    with pytest.raises(SwitokdError, match=r"as torch-export differs .* nothing was exported"):
        export(mine, wanted=["state-dict", "torch-export"], out=mine / "made")
    assert sorted(mine.iterdir()) == before


def test_network_that_cannot_be_traced_is_named(finished: Path, tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10] * (2 if x.sum() > 0 else 1)

    trained = replace(load_trained(finished), network=Branching())
    reference = make_reference(trained)
    with pytest.raises(UsageError, match=r"student \(wrn-10-1\) cannot be written as onnx: "):
        write_checked(tmp_path, trained, reference, ["onnx"])
    assert not (tmp_path / "artefact.json").exists()


def test_best_weights_if_the_run_saved_them(mine: Path) -> None:
    best = mine / "weights" / "best"
    shutil.rmtree(best)
    code, _, err = invoke("export", mine, "--weights=best", "--formats=state-dict")
    assert (code, err.count("\n")) == (2, 1)
    assert "has no weights/best/student.pt: no epoch has been tested" in err

    best.mkdir()
    network = registry.build("wrn-10-1", in_channels=1, num_classes=10)
    torch.save(network.state_dict(), mine / "weights" / "best" / "student.pt")
    summary = json.loads((mine / "summary.json").read_text())
    summary["networks"]["student"]["top1_best"] = 77.0
    (mine / "summary.json").write_text(json.dumps(summary))
    export(mine, wanted=["state-dict"], weights="best", out=mine / "b")
    assert (Manifest.load(mine / "b").weights, Manifest.load(mine / "b").top1) == ("best", 77.0)
    logits = load_artefact(mine / "b").logits(DIGITS.numpy())
    np.testing.assert_allclose(logits, live_logits(mine, "weights/best/student.pt"), atol=1e-5)


def test_without_the_data_set_random_images_are_compared(mine: Path) -> None:
    moved = ["data.dataset=image-folder", "data.root=nowhere"]
    folder = export(mine, wanted=["state-dict"], settings=moved)
    manifest = Manifest.load(folder)
    assert manifest.checked_on.startswith("64 random images, as the data set could not be opened")
    assert "nowhere must hold train/CLASS" in manifest.checked_on
    assert manifest.signature.labels == tuple("0123456789")


def test_run_of_the_first_version_is_described_by_its_data_set(mine: Path) -> None:
    wanted = (mine / "signature.json").read_text()
    (mine / "signature.json").unlink()
    load_trained(mine).signature.save(mine / "signature.json")
    assert (mine / "signature.json").read_text() == wanted


def change_height(run: Path) -> None:
    signature = json.loads((run / "signature.json").read_text())
    (run / "signature.json").write_text(json.dumps({**signature, "height": 9}))


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        (None, ["--formats=onx"], "--formats: found 'onx'; did you mean 'onnx'?; allowed: onnx, "),
        (None, ["--network=studnt"], "has no network 'studnt'; did you mean 'student'? (networks:"),
        (None, ["--weights=first"], "weights: found 'first'; allowed: last, best, ema, initial"),
        (None, ["--weights=ema"], "has no weights/student.ema.pt: the run had no moving average"),
        (None, ["--mean=0.5"], "--mean and --std are only used together"),
        (None, ["--mean=0", "--std=1"], "this run's normalisation is known (mean [0.306]"),
        (None, ["--mean=a", "--std=1"], "got 'a'; allowed: one number, or one per channel"),
        (None, ["data.rot=x"], "did you mean data.root?"),
        (None, ["--out", "."], "exists and is never overwritten"),
        (lambda r: (r / "config.yaml").unlink(), [], "is no run folder: there is no config.yaml"),
        (lambda r: shutil.rmtree(r / "weights"), [], "has no weights/student.pt: the run has not"),
        (lambda r: (r / "signature.json").write_text("{"), [], "signature.json cannot be read"),
        (change_height, [], "has changed since the run: images of shape (1, 8, 8) in 10 classes"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    spoil: Any, arguments: list[str], words: str, mine: Path
) -> None:
    if spoil:
        spoil(mine)
    code, out, err = invoke("export", mine, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("switokd: ")
    assert err.count("\n") == 1
    assert not (mine / "export").exists()


def test_a_full_disk_is_named_and_leaves_nothing(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    export = [sys.executable, "-m", "switokd", "export", str(finished), "--network=teacher"]
    export += ["--formats=state-dict", "--out=full/it"]
    mount = 'mount -t tmpfs -o size=40k none full && "$@"; code=$?; ls -A full; exit $code'
    code, out, err = run([*unshare("-rm"), "sh", "-c", mount, "sh", *export], tmp_path)
    assert (code, out) == (2, "")
    assert err.endswith(
        "full/it cannot be written: No space left on device; name another folder with --out\n"
    )


def test_missing_onnx_gives_the_command_to_install_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=r"onnx needs the package onnx: pip install 'switokd\[ex"):
        export(finished)


def test_run_with_several_students_needs_a_name(mine: Path) -> None:
    config = yaml.safe_load((mine / "config.yaml").read_text())
    config["networks"]["other"] = config["networks"]["student"]
    (mine / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(UsageError, match=r"has 2 students; choose .* \(teacher, student, other\)"):
        export(mine)


OWN = """
import torch
from sklearn.datasets import load_digits

class Net(torch.nn.Module):
    def __init__(self, hidden, num_classes):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, hidden), torch.nn.Dropout(0.5),
            torch.nn.ReLU(), torch.nn.Linear(hidden, num_classes))

    def forward(self, x):
        return self.layers(x)

class Digits:
    classes = ["nought", *"123456789"]

    def __init__(self, train):
        self.digits, self.offset = load_digits(), 0 if train else 1600

    def __len__(self):
        return 128

    def __getitem__(self, i):
        image = torch.from_numpy(self.digits.images[self.offset + i]).float()[None] / 16
        return (image - 0.25) / 0.5, int(self.digits.target[self.offset + i])
"""


def test_own_network_and_data_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "outside_nets.py").write_text(OWN)
    model = {"model": "outside_nets:Net", "model_kwargs": {"hidden": 16}}
    mine = {
        "name": "mine",
        "data": {"dataset": "outside_nets:Digits", "batch_size": 32},
        "networks": {"big": {"role": "teacher", **model}, "small": {"role": "student", **model}},
    }
    (project / "mine.yaml").write_text(yaml.safe_dump(mine))
    train(tmp_path, 1, str(project / "mine.yaml"), *ALONE)

    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert "outside_nets" not in sys.modules
    command, wanted = ("export", tmp_path / "out"), "--formats=state-dict,torch-export"
    code, _, err = invoke(*command, "--mean=0.25", "--std=0.5", wanted)
    monkeypatch.delitem(sys.modules, "outside_nets")
    assert (code, err) == (0, "")
    manifest = Manifest.load(tmp_path / "out" / "export" / "small")
    assert manifest.signature.labels[:2] == ("nought", "1")
    assert manifest.import_from[0] == str(project)
    assert manifest.checked_on == "128 of 128 images of the test set"

    code, _, err = invoke(*command, "--mean=0.9", "--std=0.5", "--out=x")
    assert code == 2
    assert "had values from 0.65 to 1.65 before normalisation, and not from 0 to 1" in err

    code, _, err = invoke(*command, "--formats=torch-export", "--out=y")
    assert (code, err) == (0, "")
    assert "as the run's data set gives them" in Manifest.load(elsewhere / "y").signature.takes
    with pytest.raises(UsageError, match="its normalisation is unknown; export again"):
        load_artefact("y").predict(["any.png"])
