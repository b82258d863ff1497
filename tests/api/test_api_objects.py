"""Objects of the program as frozen teachers, and as networks to be exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import switokd
from switokd.config.run_file import load
from switokd.data.signature import InputSignature
from switokd.errors import UsageError
from switokd.export.artefact import load_artefact
from switokd.export.manifest import Manifest
from switokd.runs.run import Run
from tests.support import run

IMAGES = torch.rand(48, 3, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(48) % 3)


def flat(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, num_classes))


def distil(folder: Path, teacher: Any, **settings: Any) -> Run:
    few = {"data.batch_size": 12, "run_dir": str(folder), **settings}
    return switokd.distil(
        teachers={"large": teacher},
        students={"small": flat},
        train=DATA,
        test=DATA,
        epochs=1,
        settings=few,
    )


def test_a_module_given_is_a_trained_teacher(tmp_path: Path) -> None:
    module = flat(3)
    made = distil(tmp_path / "out", module, **{"distillation.strategy": "kd"})
    kept = made.network("large").state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in module.state_dict().items())
    assert made.config.import_from == ()  # objects are not imported
    assert switokd.load_run(made.path).summary["strategy"] == "kd"


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (flat, "does not train its teachers, and 'large' is a callable; give a trained torch"),
        ("wrn-10-1", r"networks\.large\.weights: strategy kd does not train its teachers"),
    ],
)
def test_a_teacher_that_nobody_trained_is_refused(teacher: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as found:
        distil(tmp_path / "out", teacher, **{"distillation.strategy": "kd"})
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of objects, with all the weights that there may be."""
    kept = {"save_initial_weights": True, "schedule.ema_decay": 0.9}
    return distil(tmp_path_factory.mktemp("made") / "out", flat(3), **kept)


def test_objects_are_exported_where_they_are_at_hand(made: Run, tmp_path: Path) -> None:
    before = list(sys.path)
    folder = made.export(
        formats=["state-dict", "torch-export"], out=tmp_path / "small", scaling=((0.0,), (1.0,))
    )
    assert sys.path == before
    artefact = load_artefact(folder)  # a program, which needs no object
    assert (artefact.format, artefact.manifest.network) == ("torch-export", "small")
    assert artefact.manifest.checked_on == "48 of 48 images of the test set"
    with torch.no_grad():
        live = made.network("small")(IMAGES)
    assert torch.allclose(torch.from_numpy(artefact.logits(IMAGES.numpy())), live, atol=1e-5)
    picture = Image.new("RGB", (30, 20), "red")
    assert len(artefact.predict([picture, IMAGES[0].numpy()], top=2)) == 2

    there = switokd.load_run(made.path)
    with pytest.raises(UsageError, match=r"<object small: flat> is an object .* pass it to"):
        there.export(out=tmp_path / "other")
    again = switokd.load_run(made.path, networks={"small": flat})
    folder = again.export("small", formats=["state-dict"], weights="ema", out=tmp_path / "other")
    manifest = Manifest.load(folder)
    assert manifest.weights == "ema"
    assert manifest.checked_on.startswith("64 random images")
    with pytest.raises(UsageError, match="<object small: flat> is an object"):
        load_artefact(folder)


def test_weights_mean_the_same_to_a_run_and_to_its_export(made: Run) -> None:
    places = {"last": "small", "best": "best/small", "ema": "small.ema", "initial": "initial/small"}
    found = {}
    for weights, place in places.items():
        state = torch.load(made.path / "weights" / f"{place}.pt", weights_only=True)
        found[weights] = made.network("small", weights).state_dict()  # type: ignore[arg-type]
        assert all(torch.equal(state[key], value) for key, value in found[weights].items())
    assert not torch.equal(found["initial"]["1.weight"], found["last"]["1.weight"])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("best", r"has no weights/best/student\.pt: no epoch has been tested"),
        ("ema", r"has no weights/student\.ema\.pt: the run had no moving average"),
        ("initial", r"has no weights/initial/student\.pt: the run did not save them"),
    ],
)
def test_weights_that_are_not_there_are_refused_alike(
    weights: Any, words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(load("digits-1t1s").dump())
    run = switokd.load_run(tmp_path)
    for call in (lambda: run.network("student", weights), lambda: run.export(weights=weights)):
        with pytest.raises(UsageError, match=words) as found:
            call()
        assert "\n" not in str(found.value)


def test_pictures_are_prepared_without_the_data(tmp_path: Path) -> None:
    moved = ["data.dataset=image-folder", "data.root=nowhere"]
    (tmp_path / "config.yaml").write_text(load("digits-1t1s", moved).dump())
    signature = InputSignature(
        channels=1,
        height=8,
        width=8,
        values="bytes",
        mean=(0.5,),
        std=(0.25,),
        resize=(8, 8),
        labels=("no", "yes"),
    )
    signature.save(tmp_path / "signature.json")
    run = switokd.load_run(tmp_path)
    assert run.classes == ["no", "yes"]
    assert torch.equal(
        run.prepare(Image.new("RGB", (30, 20), "white")), torch.full((1, 1, 8, 8), 2.0)
    )
    with pytest.raises(UsageError, match="nowhere"):
        _ = run.images


MULTIPROCESSING = """
import runpy
# The child of multiprocessing runs the main module under this name.
assert "worker_main" not in runpy.run_module("switokd.train", run_name="__mp_main__")
"""
IMPORTED = """
import importlib.util
import switokd.train
import switokd.train as alias
from switokd import train

assert switokd.train is train is alias is importlib.import_module("switokd.train")
assert train.__module__ == "switokd.api"
assert importlib.util.find_spec("switokd.train").name == "switokd.train"
"""


@pytest.mark.parametrize("program", [IMPORTED, MULTIPROCESSING])
def test_importing_the_module_switokd_train_gives_the_function(
    program: str, tmp_path: Path
) -> None:
    code, _, err = run([sys.executable, "-c", program], tmp_path)
    assert code == 0, err
