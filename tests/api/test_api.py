"""The Python API: the same as the command line, and nothing of the caller's changed.

Not covered: the tutorial (`test_tutorial.py`).
"""

from __future__ import annotations

import copy
import logging
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import FakeData

import switokd
from switokd.config.run_file import load
from switokd.errors import NonFiniteError, SwitokdError, UsageError
from switokd.runs.run import Run
from tests.preloaded import forked
from tests.support import REPOSITORY, run, wait_until

FEW = {"schedule.max_steps": 3}
ONE = "digits-1t1s"
OFF = ["placement=replicated", "coordinator=off"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("trained") / "out"
    settings = {"schedule.epochs": 2, "run_dir": folder, "save_initial_weights": True}
    return switokd.train("digits-1t1s", {**settings, "networks.teacher.model": "wrn-10-1"})


class Squares(Dataset[tuple[Tensor, int]]):
    """Bright in one of three places; notes who handles SIGTERM while it is read."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.handlers: set[Any] = set()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.n:
            raise IndexError
        self.handlers.add(signal.getsignal(signal.SIGTERM))
        image = torch.zeros(1, 6, 6)
        image[0, 2 * (index % 3)] = 1
        return image, index % 3


def net(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def large() -> nn.Module:
    return net(16)


def wrong() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(99, 3))


def flat(in_channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36 * in_channels, num_classes))


def small(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, num_classes))


def distil(folder: Path, **more: Any) -> Run:
    given: dict[str, Any] = {
        "teachers": {"large": large},
        "students": {"small": small},
        "train": Squares(60),
        "test": Squares(30),
        "epochs": 2,
        **more,
    }
    given["settings"] = {"data.batch_size": 10, "run_dir": folder, **more.get("settings", {})}
    return switokd.distil(**given)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def around() -> dict[str, Any]:
    """What belongs to the program that calls us."""
    return {
        "handlers": [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)],
        "path": list(sys.path),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "torch's generator": torch.random.get_rng_state().tolist(),
        "numpy's generator": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "python's generator": random.getstate(),
        "logging": (logging.root.level, logging.root.manager.disable, list(logging.root.handlers)),
        "pictures": matplotlib.get_backend(auto_select=False),
        "environment": dict(os.environ),
        "gradients": torch.is_grad_enabled(),
    }


def test_importing_switokd_is_quick_and_the_api_comes_when_asked_for() -> None:
    program = (
        "import sys, switokd; early = 'torch' in sys.modules; "
        "from switokd import train, distil, load_run, Run; "
        "print(early, callable(train), 'torch' in sys.modules, 'load_run' in dir(switokd))"
    )
    code, out, err = run([sys.executable, "-c", program], REPOSITORY)
    assert (code, out.strip()) == (0, "False True True True"), err
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = switokd.trian


def test_a_run_is_plain_data(trained: Run) -> None:
    assert repr(trained) == f"Run({str(trained.path)!r})"
    assert trained.summary["networks"]["student"]["steps"] == 44
    assert [(m["epoch"], m["network"]) for m in trained.metrics] == [
        (epoch, name) for epoch in (1, 2) for name in ("teacher", "student")
    ]
    assert [d["step"] for d in trained.decisions] == list(range(1, 45))
    assert trained.config.placement == "replicated"
    assert trained.classes == [str(digit) for digit in range(10)]
    picture = trained.curves()
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    assert trained.curves().stat().st_size > 10_000


def test_a_network_comes_with_its_weights_and_scores_what_the_summary_says(trained: Run) -> None:
    student = switokd.load_run(trained.path).network("student")
    assert not student.training
    correct = samples = 0
    with torch.no_grad():
        for x, y in trained.images.test():
            correct += int((student(x).argmax(dim=1) == y).sum())
            samples += len(y)
    found = 100 * correct / samples
    assert found == pytest.approx(trained.summary["networks"]["student"]["top1_last"], abs=0.5)
    first = trained.network("student", "initial")
    assert not equal(first.state_dict(), student.state_dict())


def test_prepare_makes_of_an_image_what_the_networks_are_evaluated_on(trained: Run) -> None:
    source = trained.images.sources.test
    raw = source.fetch([5], np.zeros(1, np.uint64))[0]
    expected = next(iter(trained.images.test(batch_size=6)))[0][5:]
    picture = Image.fromarray(raw[0, 0].numpy())
    assert torch.equal(trained.prepare(picture), expected)
    assert torch.equal(trained.prepare(picture.convert("RGB")), expected)
    assert trained.prepare(picture.resize((90, 120))).shape == (1, 1, 8, 8)


def test_training_here_is_the_command_lines_and_leaves_the_program_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.rand(3)
    before = around()
    mine = switokd.train("digits-1t1s", {**FEW, "compute.precision": "tf32"})
    assert around() == before
    assert mine.path == Path("runs/digits-1t1s-001")
    arguments = ["digits-1t1s", "schedule.max_steps=3", "compute.precision=tf32", *OFF]
    command = [sys.executable, "-m", "switokd.train", *arguments]
    code, _, err = run(command, tmp_path, OMP_NUM_THREADS=str(torch.get_num_threads()))
    assert code == 0, err
    theirs = switokd.load_run("runs/digits-1t1s-002")
    assert theirs.config == mine.config
    assert theirs.decisions == mine.decisions
    for name in ("teacher", "student"):
        assert equal(theirs.network(name).state_dict(), mine.network(name).state_dict())


@pytest.mark.parametrize(
    "placed", [{"networks.teacher1.ranks": 2}, {"placement": "auto", "auto.paused": 0.5}]
)
def test_any_placement_trains_in_one_process(placed: dict[str, Any], tmp_path: Path) -> None:
    made = switokd.train(load("digits-2t1s"), {**FEW, "run_dir": tmp_path, **placed})
    assert made.summary["world_size"] == 1
    assert len(made.decisions) == 6


def test_training_works_beside_the_main_thread(tmp_path: Path) -> None:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(switokd.train("digits-1t1s", {**FEW, "run_dir": tmp_path}).summary)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert isinstance(found[0], dict), found


def test_processes_are_started_as_the_command_line_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets").mkdir()
    module = "from torch import nn\ndef flat():\n    return nn.Sequential(nn.Flatten(), "
    (tmp_path / "nets" / "ownnets.py").write_text(module + "nn.Linear(64, 10))\n")
    file = tmp_path / "nets" / "mine.yaml"
    file.write_text(load("digits-1t1s").dump())
    before = around()
    settings = {**FEW, "networks.student.model": "ownnets:flat"}
    made = switokd.train(file, settings, processes="auto")
    assert around() == before
    assert made.path == Path("runs/digits-1t1s-001")
    assert made.summary["world_size"] == 2
    assert "2 processes on cpu" in capsys.readouterr().out
    assert made.network("student")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert "nets" not in "".join(sys.path)


def test_an_interrupt_of_this_process_alone_ends_those_that_it_started(tmp_path: Path) -> None:
    """What a notebook's stop button does."""
    program = "import switokd; switokd.train('digits-1t1s', {'run_dir': 'out'}, processes='auto')"
    (tmp_path / "program.py").write_text(program)
    log = tmp_path / "log"
    with forked(runpy.run_path, "program.py", cwd=tmp_path, out=log) as child:
        record = tmp_path / "out" / "decisions.jsonl"
        wait_until(lambda: record.exists() and record.stat().st_size > 999, 80, "some steps")
        family = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) != 0
        gone, alive = psutil.wait_procs(family, timeout=10)
        assert len(gone) >= 3  # the launcher and two ranks
        assert not alive
    assert "KeyboardInterrupt" in log.read_text()


def test_objects_are_trained_and_stay_as_they_were(tmp_path: Path) -> None:
    module, data, mine = net(16), Squares(60), signal.getsignal(signal.SIGTERM)
    first = copy.deepcopy(module.state_dict())
    before = around()
    made = distil(tmp_path / "out", teachers={"large": module}, train=data)
    assert around() == before
    assert data.handlers == {mine}  # while it trained, too
    assert equal(module.state_dict(), first)
    assert not equal(made.network("large").state_dict(), first)
    assert made.config.networks["large"].model == "<object large: Sequential>"
    assert made.config.networks["small"].model == "<object small: small>"
    assert made.config.data.dataset == "<object data: Squares>"
    assert made.images.classes == 3
    assert [m["epoch"] for m in made.metrics] == [1, 1, 2, 2]

    there = switokd.load_run(made.path)
    with pytest.raises(UsageError, match=r"<object small: small> is an object .* pass it to"):
        there.network("small")
    again = switokd.load_run(
        made.path, networks={"small": small}, train=Squares(60), test=Squares(30)
    )
    assert equal(again.network("small").state_dict(), made.network("small").state_dict())
    with pytest.raises(UsageError, match="<object large: Sequential> is an object"):
        again.network("large")


def test_float_images_of_an_own_data_set_cannot_be_prepared_by_guess(tmp_path: Path) -> None:
    made = distil(tmp_path, settings=FEW)
    with pytest.raises(UsageError, match=r"torch\.uint8, .* images of torch\.float32"):
        made.prepare(Image.new("L", (6, 6)))


def test_torchvisions_data_sets_go_as_objects(tmp_path: Path) -> None:
    data = FakeData(size=24, image_size=(3, 6, 6), num_classes=3)  # gives PIL images
    made = distil(
        tmp_path,
        teachers={"large": flat},
        students={"small": flat},
        train=data,
        test=data,
        classes=3,
        settings={**FEW, "data.batch_size": 8},
    )
    assert made.classes == ["0", "1", "2"]
    x, _ = next(iter(made.images.test(batch_size=4)))
    assert torch.equal(made.prepare(data[3][0]), x[3:])
    assert -1 <= x.min() < -0.5
    assert 0.5 < x.max() <= 1
    assert equal(
        made.network("small").state_dict(),
        torch.load(tmp_path / "weights" / "small.pt", weights_only=True),
    )


def test_names_and_tensors_go_as_objects(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(40, 3, 8, 8), torch.arange(40) % 4)
    made = distil(
        tmp_path,
        teachers={"a": "wrn-10-1", "b": nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))},
        students={"c": "mobilenet-0.25"},
        train=data,
        test=data,
        classes=5,
        settings={**FEW, "networks.c.optimizer": {"name": "adam", "lr": np.float64(1e-3)}},
    )
    assert made.network("c")(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert made.config.networks["c"].optimizer.name == "adam"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: switokd.train("digits-9t9s"), "no recipe of that name"),
        (lambda: switokd.train(ONE, {"schedule.epohs": 3}), "did you mean schedule.epochs?"),
        (
            lambda: switokd.train({"name": "x", "networks": {}}),
            "the configuration: a run needs at least one teacher",
        ),
        (
            lambda: switokd.train(ONE, {"coordinator.address": "127.0.0.1:1"}),
            "give processes=1",
        ),
        (lambda: switokd.train(ONE, processes=3), "needs 2 processes, found 3"),
        (lambda: switokd.train(ONE, processes=0), "processes: found 0; allowed: None, 'a"),
        (lambda: switokd.train(ONE, processes=True), "processes: found True; allowed"),
        (
            lambda: switokd.train(ONE, processes="all"),  # type: ignore[arg-type]
            "processes: found 'all'; allowed: None, 'auto', 1 or more",
        ),
        (lambda: switokd.load_run("nowhere"), "nowhere: there is no such folder"),
        (lambda: distil(Path("out"), teachers={}), "there is no teacher"),
        (lambda: distil(Path("out"), teachers={"small": small}), "name them apart"),
        (lambda: distil(Path("out"), teachers={"large": 7}), "teacher 'large' is a int; allowed"),
        (
            lambda: distil(Path("out"), teachers={"large": wrong}),
            "model <object large: wrong> does not take images of 1 x 6 x 6",
        ),
        (lambda: distil(Path("out"), train=[]), "without samples"),
        (lambda: distil(Path("out"), train=iter([])), "can only be iterated"),
        (lambda: distil(Path("out"), classes=2), "label 2 is outside the 2 classes"),
        (
            lambda: distil(Path("out"), settings={"networks.small.optimizer": {"lr": 1e9}}),
            "not finite|NaN|infinite",
        ),
    ],
)
def test_mistakes_are_raised_and_not_exits(
    call: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = around()
    with pytest.raises(SwitokdError, match=words) as found:
        call()
    assert around() == before
    assert "\n" not in str(found.value)
    assert isinstance(found.value, NonFiniteError if "finite" in words else UsageError)


def test_unfinished_and_unknown_things_of_a_run(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no network 'studnet'; did you mean 'student'"):
        trained.network("studnet")
    assert not trained.network("student", "best").training
    with pytest.raises(UsageError, match="found 'finest'; allowed: last, best, ema, initial"):
        trained.network("student", "finest")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has no network 'other'"):
        switokd.load_run(trained.path, networks={"other": small})
    (tmp_path / "config.yaml").write_text(load("digits-1t1s").dump())
    begun = switokd.load_run(tmp_path)
    assert (begun.metrics, begun.decisions) == ([], [])
    with pytest.raises(UsageError, match="the run has not finished or has failed"):
        _ = begun.summary
    with pytest.raises(UsageError, match="no decisions yet"):
        begun.curves()


def test_one_of_torchruns_processes_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        monkeypatch.setenv(key, value)
    with pytest.raises(UsageError, match=r"in a process of torchrun; .* start -m switokd\.train"):
        switokd.train("digits-1t1s", FEW)
