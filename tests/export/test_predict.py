"""Predicting with an artefact, from Python and with `switokd predict`, without the run folder.

Not covered: making artefacts (`test_exporter.py`); reading pictures (`test_pictures.py`).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from switokd.cli.main import app
from switokd.errors import UsageError
from switokd.export import formats
from switokd.export.artefact import load_artefact
from switokd.export.exporter import export
from switokd.export.manifest import Format, Manifest
from switokd.models import registry
from tests.preloaded import train
from tests.support import REPOSITORY, run

DIGITS = (load_digits().images[1700:1704] * 255 / 16).round().astype(np.uint8)  # [4, 8, 8]
FORMATS: tuple[Format, ...] = ("onnx", "torch-export", "state-dict")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported student of a real run, moved to another folder; the run is deleted."""
    cwd = tmp_path_factory.mktemp("predict")
    settings = ["placement=replicated", "coordinator=off", "schedule.max_steps=5"]
    moved = export(train(cwd, 1, "digits-1t1s", *settings)).rename(cwd / "moved")
    shutil.rmtree(cwd / "out")
    return moved


@pytest.fixture(scope="module")
def probabilities(artefact: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Probabilities `[4, 10]` for DIGITS, computed with PyTorch alone."""
    network = registry.build("wrn-10-1", in_channels=1, num_classes=10)
    network.load_state_dict(torch.load(artefact / "weights.pt", weights_only=True))
    x = torch.from_numpy(DIGITS)[:, None].float() / 255
    with torch.no_grad():
        z = network.eval()((x - 0.306) / 0.377)
    return z.double().softmax(dim=1).numpy()  # type: ignore[no-any-return]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """DIGITS as picture files: some in a subfolder, in colour or with a palette, one broken."""
    (tmp_path / "pictures" / "below").mkdir(parents=True)
    for i, (name, mode) in enumerate(
        [("a.png", "L"), ("b.png", "RGB"), ("below/c.png", "P"), ("below/d.bmp", "RGB")]
    ):
        Image.fromarray(DIGITS[i]).convert(mode).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "broken.jpg").write_text("no picture")
    return tmp_path / "pictures"


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, output and standard error of `switokd predict` in this process."""
    command = ["predict", *(str(a) for a in arguments)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_predicts_as_the_network(
    format: Format, artefact: Path, folder: Path, probabilities: np.ndarray
) -> None:
    code, out, err = invoke(artefact, folder, "--format", format, "--json", "--top=10")
    assert code == 2  # one picture is broken
    assert err.startswith(f"switokd: {folder / 'broken.jpg'}: cannot be read as a picture")
    assert err.count("\n") == 1
    lines = [json.loads(line) for line in out.splitlines()]
    names = ("a.png", "b.png", "below/c.png", "below/d.bmp")
    assert [line["image"] for line in lines] == [str(folder / name) for name in names]
    for line, p in zip(lines, probabilities, strict=True):
        assert [guess["index"] for guess in line["top"]] == np.argsort(-p).tolist()
        assert [guess["probability"] for guess in line["top"]] == pytest.approx(np.sort(p)[::-1])
        assert all(guess["label"] == str(guess["index"]) for guess in line["top"])


def test_table_shows_the_most_likely_class_first(
    artefact: Path, folder: Path, probabilities: np.ndarray
) -> None:
    code, out, err = invoke(artefact, folder / "a.png", "--top", "2")
    assert (code, err) == (0, "")
    assert "student of digits-1t1s, onnx" in out
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    best = np.argsort(-probabilities[0])[:2]
    assert [row[1].strip() for row in rows] == [str(label) for label in best]
    assert [row[2].strip() for row in rows] == [f"{probabilities[0][i]:.1%}" for i in best]
    assert [row[0].strip() for row in rows] == [str(folder / "a.png"), ""]


def test_onnx_needs_no_torch(artefact: Path, folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from switokd.cli.main import app; "
        f"app(['predict', {str(artefact)!r}, 'pictures/a.png', '--json'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    code, out, err = run([sys.executable, "-c", program], tmp_path)
    assert (code, err) == (0, "")
    line, has_torch = out.splitlines()
    assert json.loads(line)["image"] == "pictures/a.png"
    assert has_torch == "False"


def test_python_takes_files_pictures_and_arrays(
    artefact: Path, folder: Path, probabilities: np.ndarray
) -> None:
    network = load_artefact(artefact)
    picture = Image.fromarray(DIGITS[0])
    array = DIGITS[0][None].astype(np.float64) / 255
    same = [folder / "a.png", str(folder / "a.png"), picture, array]
    guesses = network.predict(same, top=1)
    for (guess,) in guesses:
        assert guess.index == probabilities[0].argmax()
        assert guess.probability == pytest.approx(probabilities[0].max())
    assert network.predict([]) == []
    many = np.repeat(array[None], 130, axis=0)  # more than a batch
    logits = network.logits(many.astype(np.float32))
    assert logits.shape == (130, 10)
    np.testing.assert_allclose(logits, np.broadcast_to(logits[0], logits.shape), atol=1e-5)
    assert [len(guesses) for guesses in network.predict(list(many), top=3)] == [3] * 130
    with pytest.raises(UsageError, match=r"got uint8 of shape \[1, 8, 8\]; divide bytes by 255"):
        network.predict([DIGITS[0][None]])
    with pytest.raises(UsageError, match=r"shape \[2, 8, 8\]: this network takes .* 1 x 8 x 8"):
        network.logits(np.zeros((2, 8, 8), dtype=np.float32))


def test_first_available_format_is_chosen(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_artefact(artefact).format == "onnx"
    monkeypatch.setattr(formats, "find_spec", lambda package: None)
    assert load_artefact(artefact).format == "torch-export"
    with pytest.raises(UsageError, match=r"onnx needs the package onnxruntime: pip install 'swi"):
        load_artefact(artefact, "onnx")


def test_network_with_four_channels_takes_only_arrays(artefact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    manifest = Manifest.load(copy)
    four = {"channels": 4, "mean": (0.5,) * 4, "std": (0.5,) * 4}
    signature = manifest.signature.model_copy(update=four)
    manifest.model_copy(update={"signature": signature}).save(copy)
    code, out, err = invoke(copy, "any.png", "other.png")
    assert (code, out) == (2, "")
    assert "this network takes 4 channels, and a picture has 1 or 3" in err
    assert err.count("\n") == 1


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_mistakes_are_one_line_and_exit_code_2(artefact: Path, tmp_path: Path) -> None:
    changed, broken, partial = (
        Path(shutil.copytree(artefact, tmp_path / name))
        for name in ("changed", "broken", "partial")
    )
    (changed / "model.onnx").write_bytes((changed / "model.onnx").read_bytes() + b"\n")
    replace_text(broken / "artefact.json", '"version": 1', '"version": 2')
    (partial / "model.onnx").unlink()
    x = "x.png"
    for arguments, words in (
        ([tmp_path, x], "no artefact: artefact.json cannot be read (No such file or directory)"),
        ([artefact, x, "--format=onx"], "has no onx; did you mean 'onnx'?; it has onnx, torch-ex"),
        ([changed, x], "model.onnx has changed since the export: its SHA-256 differs"),
        ([broken, x], "artefact.json is damaged: version: Input should be 1; export"),
        ([partial, x], "model.onnx is missing; copy the whole folder, or export again"),
        ([artefact, x], "switokd: x.png: no such file or folder"),
        ([artefact, partial], "no picture in this folder"),
    ):
        code, out, err = invoke(*arguments)
        assert (code, out) == (2, ""), arguments
        assert words in err
        assert err.count("\n") == 1


def test_only_the_state_dict_needs_the_users_module(artefact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    replace_text(copy / "artefact.json", '"wrn-10-1"', '"not_there_nets:build"')
    assert load_artefact(copy, "torch-export").format == "torch-export"
    with pytest.raises(UsageError, match="model not_there_nets:build: there is no module"):
        load_artefact(copy, "state-dict")


@pytest.mark.parametrize("module", ["manifest", "artefact", "predict", "formats"])
def test_modules_for_using_an_artefact_do_not_import_torch(module: str) -> None:
    program = f"import sys, switokd.export.{module}; print('torch' in sys.modules)"
    code, out, err = run([sys.executable, "-c", program], REPOSITORY)
    assert (code, out.strip()) == (0, "False"), err
