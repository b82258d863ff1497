"""Weights as others save them: what is loaded, what is said of it, and what is refused.

Not covered: the checksums of this package's own files (`tests/runtime/test_durable.py`).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vision_transformer import MLPBlock

from switokd.errors import UsageError
from switokd.models.given_weights import load_weights

State = dict[str, Any]
SETTING = "networks.s.weights"


def network(classes: int = 3, hidden: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, classes)
    ).eval()


def state(classes: int = 3, hidden: int = 4, seed: int = 1) -> State:
    torch.manual_seed(seed)
    return dict(network(classes, hidden).state_dict())


class Wrapped(nn.Module):
    """A user's network around another one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.DataParallel(network())


def prefixed(prefix: str, of: State) -> State:
    return {prefix + key: value for key, value in of.items()}


def saved(content: Any, path: Path, **how: Any) -> Path:
    with warnings.catch_warnings():  # PyTorch warns of its own formats
        warnings.simplefilter("ignore")
        torch.save(content, path, **how)
    return path


def refusal(path: Path, into: nn.Module | None = None, **settings: Any) -> str:
    """The message, which is one line, of a file that is refused."""
    with pytest.raises(UsageError) as caught:
        load_weights(into or network(), path, SETTING, classes=3, **settings)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 700
    return message


FORMS: dict[str, tuple[Callable[[State], Any], str]] = {
    "plain": (lambda w: w, "9 of 9 entries from"),
    "DataParallel": (lambda w: prefixed("module.", w), "prefix module. removed"),
    "torch.compile": (lambda w: prefixed("_orig_mod.", w), "prefix _orig_mod. removed"),
    "both": (lambda w: prefixed("module._orig_mod.", w), "prefix module._orig_mod. removed"),
    "compiled in a wrapper": (lambda w: prefixed("model._orig_mod.", w), "model._orig_mod. rem"),
    "one part only": (
        lambda w: {k.replace("1.", "1.module.", 1) if k[0] == "1" else k: w[k] for k in w},
        "prefix module. removed",
    ),
    "own prefix": (lambda w: prefixed("my_net.backbone.", w), "prefix my_net.backbone. removed"),
    "state_dict": (lambda w: {"state_dict": w, "epoch": 3, "loss": torch.ones(())}, "in state_di"),
    "model": (lambda w: {"model": prefixed("module.", w), "optimizer": {}}, "found in model"),
    "model_state_dict": (lambda w: {"model_state_dict": w}, "found in model_state_dict"),
    "net": (lambda w: {"acc": 3.0, "net": prefixed("module.", w)}, "found in net;"),
    "params": (lambda w: {"params": w}, "found in params"),
    "unknown": (lambda w: {"my_best": {"inner": w}}, "found in my_best.inner"),
    "optimizer beside": (
        lambda w: {"w": w, "optimizer": {"state": {0: {"exp_avg": w["0.weight"]}}, "x": w}},
        "found in w",
    ),
    "average beside": (
        lambda w: {"state_dict_ema": state(seed=2), "state_dict": w},
        "found in state_dict",
    ),
    "average alone": (
        lambda w: {"model": state(9, 9), "model_ema": {**prefixed("module.", w), "n_averaged": 3}},
        "found in model_ema",
    ),
    "the same twice": (
        lambda w: {"model": w, "state_dict": {k: v.clone() for k, v in w.items()}},
        "found in model",
    ),
    "Lightning": (
        lambda w: {
            "epoch": 1,
            "pytorch-lightning_version": "2.5",
            "state_dict": {**prefixed("model.", w), "loss.weight": torch.ones(3)},
            "callbacks": {"x": {"best": torch.ones(())}},
            "hyper_parameters": argparse.Namespace(lr=0.1, at=pathlib.Path("x")),
            "best": np.float64(3.5),
        },
        "not used: loss.weight",
    ),
    "thop": (
        lambda w: {**w, "total_ops": torch.ones(1), "0.total_params": torch.ones(1)},
        "9 of 9",
    ),
    "old BatchNorm": (
        lambda w: {k: v for k, v in w.items() if "num" not in k},
        "8 of 9 entries",
    ),
    "half": (
        lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()},
        "converted from float16",
    ),
    "averaged counter": (
        lambda w: {**w, "1.num_batches_tracked": torch.tensor([7.0])},
        "9 of 9 entries",
    ),
    "sparse": (lambda w: {**w, "2.weight": w["2.weight"].to_sparse()}, "9 of 9 entries"),
    "float64": (lambda w: {**w, "0.weight": w["0.weight"].double()}, "converted from float64"),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_as_others_save_them(form: str, tmp_path: Path) -> None:
    wrap, words = FORMS[form]
    w = {k: v.half().to(v.dtype) for k, v in state().items()}  # exact in half precision
    path = saved(wrap(w), tmp_path / "w.pt")
    for into, own in ((network(), ""), (Wrapped(), "net.module.")):
        line = load_weights(into, path, SETTING)
        assert "\n" not in line
        if not own:
            assert words in line
        for key, value in into.state_dict().items():
            if "num_batches" not in key:
                assert torch.equal(value, w[key.removeprefix(own)]), key


def test_a_files_own_prefix_may_be_the_networks(tmp_path: Path) -> None:
    path = saved(Wrapped().state_dict(), tmp_path / "w.pt")
    assert load_weights(Wrapped(), path, SETTING) == f"9 of 9 entries from {path}"


def test_the_formats_of_files(tmp_path: Path) -> None:
    w = state()
    old = saved(w, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    halves = {k: v.bfloat16() if v.is_floating_point() else v for k, v in w.items()}
    save_file(prefixed("module.", halves), tmp_path / "w.safetensors")
    os.link(tmp_path / "w.safetensors", tmp_path / "w.bin")
    into = network()
    load_weights(into, old, SETTING)
    assert torch.equal(into.state_dict()["0.weight"], w["0.weight"])
    for name in ("w.safetensors", "w.bin"):
        line = load_weights(network(), tmp_path / name, SETTING)
        assert "prefix module. removed; converted from bfloat16" in line


def test_tied_weights_may_be_there_once(tmp_path: Path) -> None:
    into = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    into[1].weight = into[0].weight
    w = {k: torch.rand_like(v) for k, v in into.state_dict().items() if k != "1.weight"}
    assert "not in the file: 1.weight" in load_weights(into, saved(w, tmp_path / "w"), SETTING)
    assert torch.equal(into.state_dict()["1.weight"], w["0.weight"])


def test_a_module_may_rename_the_entries_of_its_older_releases(tmp_path: Path) -> None:
    """Files of torchvision's vision transformers have such names."""
    into = MLPBlock(3, 5, 0.0)
    w = {key: torch.rand_like(value) for key, value in into.state_dict().items()}
    older = {k.replace("0.", "linear_1.").replace("3.", "linear_2."): v for k, v in w.items()}
    path = saved({"model": prefixed("module.", older)}, tmp_path / "w.pt")
    assert load_weights(into, path, SETTING) == f"4 of 4 entries from {path}; found in model"
    assert all(torch.equal(value, w[key]) for key, value in into.state_dict().items())


@pytest.mark.parametrize("key", ["b", "b.student", "ema"])
def test_several_that_fit_need_a_name(key: str, tmp_path: Path) -> None:
    a, b, c = (state(seed=i) for i in range(3))
    both = {**prefixed("student.", b), **prefixed("other.", c)}
    path = saved({"a": a, "b": both, "ema": c}, tmp_path / "w.pt")
    assert (
        refusal(path) == f"networks.s.weights_key: {path} holds several state dicts that fit, with "
        "different values: a, b.student; name one"
    )
    into = network()
    load_weights(into, path, SETTING, key=key)
    expected = c if key == "ema" else b
    assert torch.equal(into.state_dict()["0.weight"], expected["0.weight"])
    load_weights(into, path, SETTING, key="b.other")  # a prefix of no known name
    assert torch.equal(into.state_dict()["0.weight"], c["0.weight"])
    assert (
        refusal(path, key="emma") == f"networks.s.weights_key: {path} has no state dict 'emma'; "
        "did you mean 'ema'? (state dicts: a, b, ema)"
    )


def test_another_number_of_classes_needs_the_setting(tmp_path: Path) -> None:
    w = state(classes=1000)
    path = saved({"model": prefixed("module.", w)}, tmp_path / "w.pt")
    assert (
        refusal(path) == f"networks.s.fresh_classifier: false, but {path} is for 1000 classes and "
        "the data has 3 (entries 2.weight, 2.bias); with true these entries keep their initial "
        "values, and the other 7 are loaded"
    )
    into, before = network(), state(seed=5)
    into.load_state_dict(before)
    line = load_weights(into, path, SETTING, classes=3, fresh_classifier=True)
    assert "7 of 9 entries" in line
    assert line.endswith("fresh: 2.weight, 2.bias")
    for key, value in into.state_dict().items():
        assert torch.equal(value, (before if key.startswith("2.") else w)[key]), key
    fitting = saved(state(), tmp_path / "same.pt")
    assert load_weights(into, fitting, SETTING, classes=3, fresh_classifier=True).endswith(
        "fresh: none, because the classifier fits"
    )


@pytest.mark.parametrize(
    "w",
    [
        state(classes=1000, hidden=5),  # another hidden layer as well
        state(hidden=5),  # only a hidden layer
        {**state(classes=1000), "0.weight": torch.ones(1000, 6)},
        {**state(), "2.weight": torch.ones(7, 4), "2.bias": torch.ones(8)},
        {**state(), "2.weight": torch.ones(7, 5)},
        {k: v for k, v in state(classes=7).items() if k != "2.bias"},
    ],
)
def test_only_a_classifier_stays_fresh(w: State, tmp_path: Path) -> None:
    path = saved(w, tmp_path / "w.pt")
    assert "is of another network: " in refusal(path, fresh_classifier=True)


def test_a_hidden_layer_as_wide_as_there_are_classes_is_no_classifier(tmp_path: Path) -> None:
    path = saved(state(hidden=16), tmp_path / "w.pt")
    assert "is of another network: " in refusal(path, network(hidden=3), fresh_classifier=True)


class Columns(nn.Module):
    """A classifier with its classes in columns."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body, self.rows = nn.Linear(3, 3), nn.Parameter(torch.rand(3, classes))


def test_classes_may_be_in_columns(tmp_path: Path) -> None:
    path = saved(Columns(9).state_dict(), tmp_path / "w.pt")
    line = load_weights(Columns(4), path, SETTING, classes=4, fresh_classifier=True)
    assert line.endswith("fresh: rows")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
@pytest.mark.parametrize("entry", ["0.weight", "1.running_mean"])
def test_values_that_are_not_finite_are_refused(value: float, entry: str, tmp_path: Path) -> None:
    """1e300 is finite in the file, but not in the network's precision."""
    w = state()
    w[entry] = w[entry].double()
    w[entry].view(-1)[0] = value
    path = saved(prefixed("module.", w), tmp_path / "w.pt")
    assert (
        f"{SETTING}: {path} has values that are not finite (NaN or infinity) in 1 of 9 entries: "
        f"module.{entry}; "
    ) in refusal(path)


def test_masks_may_be_infinite(tmp_path: Path) -> None:
    into = network()
    into.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    load_weights(into, saved(into.state_dict(), tmp_path / "w.pt"), SETTING)


def entry(value: Any) -> Callable[[State], Any]:
    return lambda w: {**w, "0.bias": value}


MISFITS: dict[str, tuple[Callable[[State], Any], str]] = {
    "complex": (entry(torch.ones(4, dtype=torch.complex64)), "(4,) complex64 in the file and (4,)"),
    "quantized by hand": (entry(torch.ones(4, dtype=torch.int8)), "(4,) int8 in the file"),
    "no values": (entry(torch.ones(4, device="meta")), "a tensor without values in the file"),
    "a list": (entry([1.0]), "is a list in the file and (4,) float32 in the network"),
    "half a counter": (lambda w: {**w, "1.num_batches_tracked": torch.tensor(0.5)}, "1 of another"),
    "missing": (
        lambda w: {k: v for k, v in w.items() if k[0] != "1"},
        "another network: 4 missing in the file (1.weight, 1.bias, 1.running_mean and 1 more); 4 o",
    ),
    "more": (
        lambda w: prefixed("module.", {**w, "aux.0": w["0.bias"], "aux.1": w["0.bias"]}),
        "another network: 2 not in the network (module.aux.0, module.aux.1); 9 of 9 entries fit",
    ),
    "another": (
        lambda w: {"x": {f"layer{i}.weight": torch.ones(1) for i in range(500)}},
        "8 missing in the file (0.weight, 0.bias, 1.weight and 5 more), 500 not in the network",
    ),
    "beside a prefix of no known name": (
        lambda w: {**prefixed("mine.", w), "loss.w": torch.ones(1)},
        "8 missing in the file",
    ),
    "nothing": (lambda w: {}, "holds no state dict, but a dict with nothing"),
    "numbers": (lambda w: {"epoch": 3}, "holds no state dict, but a dict with epoch"),
    "list": (lambda w: [w], "holds no state dict, but a list"),
    "tensor": (lambda w: w["0.bias"], "holds no state dict, but a Tensor"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_counted_and_a_few_names_are_shown(case: str, tmp_path: Path) -> None:
    wrap, words = MISFITS[case]
    assert words in refusal(saved(wrap(state()), tmp_path / "w.pt"))
