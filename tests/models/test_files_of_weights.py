"""Files that hold no weights, or not as expected: one line says what the file is.

Not covered: entries that do not fit a network (`test_given_weights.py`).
"""

from __future__ import annotations

import gzip
import io
import json
import pathlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.models.test_given_weights import SETTING, network, prefixed, refusal, saved, state
from tests.preloaded import call, train_ranks
from tests.sleepers import Flat


class Runs:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (pathlib.Path("executed"),)


def written(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
        "git lfs pull",
    ),
    "web page": (lambda: b"\n<!DOCTYPE html><html></html>", "it is a web page"),
    "gzip": (lambda: gzip.compress(written(state())), "unpack it with gunzip"),
    "npz": (npz, "it holds NumPy arrays (.npz)"),
    "text": (lambda: b"hello, world", "it is no state dict saved by torch.save"),
    "torn": (lambda: written(state())[:-300], "it is damaged, or not complete"),
    "index": (
        lambda: json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin"}}).encode(),
        "it is the index of a state dict in 2 files",
    ),
    "whole network": (lambda: written(network()), "torch.nn.modules.container.Sequential"),
    "code": (lambda: written({"w": state(), "x": Runs()}), "it holds more than tensors"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_holds_no_weights_says_what_it_is(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, words = FILES[kind]
    path = tmp_path / "w.pt"
    path.write_bytes(content())
    message = refusal(path)
    assert message.startswith(f"{SETTING}: {path} cannot be read: it ")
    assert words in message
    assert not (tmp_path / "executed").exists()


def test_folders_and_torn_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    assert "it is a folder; name a file of weights; there is none in it" in refusal(tmp_path)
    save_file(state(), path)
    assert "name a file of weights in it, such as w.safetensors" in refusal(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    assert "it is no complete safetensors file (" in refusal(path)
    assert "cannot be read: No such file or directory" in refusal(tmp_path / "none.pt")


def test_a_scripted_network_says_how_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))  # type: ignore[no-untyped-call]
        torch.jit.save(scripted, path)
    assert "torch.save(torch.jit.load(FILE).state_dict(), NEW)" in refusal(path)


def test_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bias: Tensor = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    path = saved({**state(), "0.bias": bias}, tmp_path / "w.pt")
    assert "0.bias is a quantized tensor in the file" in refusal(path)


@pytest.mark.timeout(120)
def test_a_run_says_once_what_it_loaded(tmp_path: Path) -> None:
    """A run that continues starts from its checkpoint."""
    torch.manual_seed(1)
    given = Flat().state_dict()
    saved({"model": prefixed("module.", dict(given))}, tmp_path / "w.pt")
    model = "tests.sleepers:Flat"
    words = ["digits-1t1s", f"networks.student.model={model}", f"networks.teacher.model={model}"]
    words += ["networks.student.weights=w.pt", "save_initial_weights=true", "run_dir=out"]
    words += ["data.train_samples=128", "placement=replicated", "coordinator=off"]
    words += ["schedule.milestones=[]"]
    expected = (
        "weights of student: 2 of 2 entries from w.pt; found in model; prefix module. removed"
    )
    for epochs, count in ((1, 1), (2, 0)):
        arguments = (*words, f"schedule.epochs={epochs}", "resume=auto")
        code, out, err = call(tmp_path, train_ranks, 1, arguments)
        assert code == 0, err
        assert out.splitlines().count(expected) == out.count("weights of") == count
    initial = torch.load(tmp_path / "out" / "weights" / "initial" / "student.pt")
    assert all(torch.equal(value, given[key]) for key, value in initial.items())
