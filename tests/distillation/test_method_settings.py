"""Settings of the method: topologies by name, pairs, strategies, and errors for wrong settings.

A mistake in the run file is an error before any rank starts. A wrong weights file is an error
before the first step.

Not covered: the effect of the settings (`test_couplings`, `test_strategies`, `test_semantics`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from switokd.cli.main import app
from switokd.config.config import Config
from switokd.config.optimizers import SGD, Adam
from switokd.config.run_file import load
from switokd.distillation.topology import Pair
from switokd.errors import UsageError
from switokd.models import registry
from switokd.models.given_weights import load_weights
from tests.preloaded import call, train_ranks

TEMPLATES = """
name: many
teacher: {model: wrn-16-1, optimizer: {lr: 0.2, momentum: 0.5}}
student: {model: wrn-10-1, optimizer: {name: adam, lr: 3e-3}}
"""
FIVE = ["teacher1", "teacher2", "teacher3", "student1", "student2"]


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "many.yaml"
    path.write_text(TEMPLATES)
    return str(path)


def test_a_topology_by_name_has_the_templates_networks(run_file: str) -> None:
    config = load(run_file, ["topology=3T2S", "networks.teacher3.model=mobilenet-0.25"])
    assert list(config.networks) == FIVE
    assert config.topology.name == "3T2S"
    assert config.world_size == 5
    assert [n.model for n in config.networks.values()] == [
        *("wrn-16-1", "wrn-16-1", "mobilenet-0.25", "wrn-10-1", "wrn-10-1")
    ]
    assert {n.optimizer for n in config.networks.values()} == {
        SGD(lr=0.2, momentum=0.5),
        Adam(name="adam", lr=3e-3),
    }
    assert len(config.topology.pairs) == 6


@pytest.mark.parametrize(
    ("topology", "names"),
    [
        ("1T1S", ["teacher", "student"]),
        ("1T2S", ["teacher", "student1", "student2"]),
        ("2T1S", ["teacher1", "teacher2", "student"]),
    ],
)
def test_a_single_teacher_or_student_has_no_number(
    topology: str, names: list[str], run_file: str
) -> None:
    assert list(load(run_file, [f"topology={topology}"]).networks) == names


def test_settings_of_a_network_override_its_template(run_file: str) -> None:
    settings = ["networks.student2.optimizer.lr=1e-4", "networks.teacher1.optimizer.name=adam"]
    config = load(run_file, ["topology=3T2S", *settings])
    assert config.networks["student2"].optimizer == Adam(name="adam", lr=1e-4)
    assert config.networks["student1"].optimizer == Adam(name="adam", lr=3e-3)
    # An optimizer of another kind takes no settings from the template.
    assert config.networks["teacher1"].optimizer == Adam(name="adam", lr=1e-3)


def test_the_dump_lists_every_network(run_file: str, tmp_path: Path) -> None:
    off = "pairs.teacher2.student1={enabled: false, temperature: 2.0}"
    config = load(run_file, ["topology=3T2S", off])
    dumped = config.dump()
    assert list(yaml.safe_load(dumped)["networks"]) == FIVE
    assert "topology" not in yaml.safe_load(dumped)
    (tmp_path / "again.yaml").write_text(dumped)
    again = load(str(tmp_path / "again.yaml"))
    assert (again, again.digest) == (config, config.digest)
    assert again.topology.off == {Pair("teacher2", "student1")}
    assert len(again.topology.pairs) == 5


@pytest.mark.parametrize(
    "setting",
    [
        "pairs.teacher2.student1={enabled: false}",
        "pairs.teacher2.student1={temperature: 2.0}",
        "networks.student1.alpha=0.5",
        "networks.teacher1.beta=0.5",
        "distillation.semantics=published",
        "distillation={strategy: threshold, strategy_kwargs: {delta: 0.5}}",
    ],
)
def test_ranks_must_agree_on_the_method(setting: str, run_file: str) -> None:
    topology = "topology=2T1S" if "semantics" in setting else "topology=2T2S"
    assert load(run_file, [topology]).digest != load(run_file, [topology, setting]).digest


REFUSED = {
    "topology": (["topology=3T"], "topology: found '3T'; allowed: such as 2T1S (two teachers, one"),
    "no teacher": (
        ["topology=0T2S"],
        "topology: found '0T2S'; allowed: such as 2T1S (two teachers",
    ),
    "templates alone": ([], "student); teacher and student are the templates of its networks"),
    "template": (["topology=2T2S", "teacher=wrn-10-1"], "teacher: a network's settings, such as"),
    "template's key": (
        ["topology=1T1S", "student.modell=x"],
        "unknown key networks.student.modell; did you mean networks.student.model?",
    ),
    "extra network": (
        ["topology=2T1S", "networks.teacher3.model=x"],
        "networks.teacher3: topology 2T1S has the networks teacher1, teacher2, student",
    ),
    "pair's teacher": (
        ["topology=2T2S", "pairs.teacher3.student1.alpha=2.0"],
        "pairs.teacher3.student1: no teacher 'teacher3'; did you mean",
    ),
    "pair's student": (
        ["topology=2T2S", "pairs.teacher1.pupil.alpha=2.0"],
        "no student 'pupil' (students: student1, student2); a pair is {TEACHER: {STUDENT: ...}}",
    ),
    "pair the wrong way": (
        ["topology=2T2S", "pairs.student1.teacher1.alpha=2.0"],
        "pairs.student1.teacher1: no teacher 'student1'",
    ),
    "pair's key": (
        ["topology=1T1S", "pairs.teacher.student.tau=2.0"],
        "unknown key pairs.teacher.student.tau; known keys here: enabled, temperature",
    ),
    "pair's value": (
        ["topology=1T1S", "pairs.teacher.student.temperature=0"],
        "pairs.teacher.student.temperature: found 0; allowed: greater than or equal to 0.001",
    ),
    "student without a teacher": (
        ["topology=2T2S", *(f"pairs.teacher{i}.student2.enabled=false" for i in (1, 2))],
        "student student2 has no teacher: all its pairs are switched off",
    ),
    "teacher without a student": (
        ["topology=2T1S", "pairs.teacher2.student.enabled=false"],
        "teacher teacher2 has no student: all its pairs are switched off",
    ),
    "no student": (
        ["topology=1T1S", "networks.student.role=teacher"],
        "needs at least one teacher and one student (there is no student)",
    ),
    "alpha of a teacher": (
        ["topology=2T1S", "networks.teacher1.alpha=0.5"],
        "alpha is not a setting of a teacher; use beta",
    ),
    "beta of a student": (
        ["topology=2T1S", "student.beta=0.5"],
        "beta is not a setting of a student; use alpha",
    ),
    "strategy": (
        ["topology=1T1S", "distillation.strategy=kdcl"],
        "strategy 'kdcl' is not one of switokd, vanilla, dml, kd, threshold, kdcl-naive",
    ),
    "threshold without delta": (
        ["topology=1T1S", "distillation.strategy=threshold"],
        "strategy threshold cannot be created with strategy_kwargs {}",
    ),
    "delta out of range": (
        ["topology=1T1S", "distillation={strategy: threshold, strategy_kwargs: {delta: 2.5}}"],
        "delta is an L1 distance, from 0 to 2, got 2.5",
    ),
    "delta that is no number": (
        ["topology=1T1S", "distillation={strategy: threshold, strategy_kwargs: {delta: high}}"],
        "strategy threshold cannot be created with strategy_kwargs {'delta': 'high'}",
    ),
    "kwargs of another strategy": (
        ["topology=1T1S", "distillation.strategy_kwargs={delta: 0.5}"],
        "strategy switokd cannot be created with strategy_kwargs {'delta': 0.5}",
    ),
    "kd without weights": (
        ["topology=2T1S", "distillation.strategy=kd", "networks.teacher1.weights=t.pt"],
        "networks.teacher2.weights: strategy kd does not train its teachers; name the weights",
    ),
    "semantics": (["topology=1T1S", "distillation.semantics=papers"], "one of paper, published"),
    "pairs of kdcl": (
        ["topology=2T1S", "distillation.strategy=kdcl-naive", "pairs.teacher1.student.alpha=2.0"],
        "pairs: strategy kdcl-naive combines the logits of all networks into one teacher, so that",
    ),
    "images held out": (
        [
            "topology=1T1S",
            "distillation={strategy: kdcl-general, strategy_kwargs: {held_out: 9.5}}",
        ],
        "held_out must be an integer, 2 images or more, got 9.5",
    ),
    "images held out without end": (
        [
            "topology=1T1S",
            "distillation.strategy=kdcl-general",
            "distillation.strategy_kwargs={held_out: .inf}",
        ],
        "held_out must be an integer, 2 images or more, got inf",
    ),
    "networks in a list": (
        ["topology=1T1S", "networks=[1]"],
        "allowed: differences from the templates by network, such as {teacher: {model: wrn-16-2}}",
    ),
    "networks as text": (["topology=1T1S", "networks=wrn"], "found 'wrn'"),
    "off in several processes": (
        ["topology=2T1S", "coordinator=off"],
        "coordinator: off is for a run of one process, and placement dedicated needs 3; leave it",
    ),
    "off in a table": (
        ["topology=1T1S", "coordinator=off", "placement={teacher: [0], student: [1]}"],
        "needs 2; leave it on auto, or set placement=replicated",
    ),
    "statistics on CPUs": (
        ["topology=1T1S", "device=cpu", "compute.batch_norm=sync"],
        "compute.batch_norm: sync is for GPUs, and device is cpu; use batch_norm=rank",
    ),
    "compiled statistics": (
        ["topology=1T1S", "compute.compile=true", "compute.batch_norm=sync"],
        "compute.batch_norm: sync cannot be compiled; use batch_norm=rank or compile=false",
    ),
    "recorded statistics over ranks": (
        ["topology=1T1S", "compute.cuda_graphs=true", "compute.batch_norm=sync"],
        "compute.batch_norm: sync cannot be captured; use batch_norm=rank or compute.cuda_graphs=f",
    ),
    "recorded gradients that are kept": (
        ["topology=1T1S", "compute.cuda_graphs=true", "schedule.accumulate=2"],
        "use schedule.accumulate=1 or compute.cuda_graphs=false",
    ),
    "a fresh classifier without weights": (
        ["topology=1T1S", "networks.student.fresh_classifier=true"],
        "fresh_classifier is for weights from a file; set weights, or leave it out",
    ),
    "a state dict without a file": (
        ["topology=1T1S", "networks.student.weights_key=ema"],
        "weights_key is for weights from a file; set weights, or leave it out",
    ),
    "a classifier that stays untrained": (
        [
            *("topology=1T1S", "distillation.strategy=kd"),
            "networks.teacher.weights=w.pt",
            "networks.teacher.fresh_classifier=true",
        ],
        "networks.teacher.fresh_classifier: strategy kd does not train its teachers, so that a f",
    ),
    "semantics of dml": (
        ["topology=2T1S", "distillation={strategy: dml, semantics: published}"],
        "semantics published exists only for the strategies switokd and threshold",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_before_any_process_starts(
    case: str, run_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, sentence = REFUSED[case]
    monkeypatch.setattr(
        "switokd.runtime.launcher.launch", lambda *_: pytest.fail("ranks were started")
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = CliRunner().invoke(app, ["train", run_file, *settings])
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert line.startswith((f"switokd: {run_file}", "switokd: command line"))
    assert sentence in line


def weights_file(path: Path, model: str) -> str:
    torch.save(registry.build(model, 1, 10).state_dict(), path)
    return str(path)


def test_weights_of_another_network_are_one_line_before_the_first_step(
    run_file: str, tmp_path: Path
) -> None:
    wrong = weights_file(tmp_path / "t.pt", "wrn-10-1")
    settings = ["topology=1T1S", "distillation.strategy=kd", f"networks.teacher.weights={wrong}"]
    alone = ["placement=replicated", "coordinator=off", "run_dir=out"]
    code, _, err = call(tmp_path, train_ranks, 1, (run_file, *settings, *alone))
    assert code == 2, err
    (line,) = err.splitlines()
    assert line.startswith("switokd: ")
    assert f"networks.teacher.weights: {wrong} is of another network: " in line
    assert "entries fit" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "setting", ["placement=replicated", "placement=auto", "placement={teacher: [0], student: [0]}"]
)
def test_one_process_needs_no_coordinator(setting: str, run_file: str) -> None:
    config = load(run_file, ["topology=1T1S", "coordinator=off", setting])
    assert config.coordinator.address == "off"


def test_weights_with_another_type_under_a_key(tmp_path: Path) -> None:
    network, path = registry.build("wrn-10-1", 1, 10), tmp_path / "t.pt"
    key = next(iter(network.state_dict()))
    torch.save({**network.state_dict(), key: [1.0]}, path)
    with pytest.raises(UsageError) as caught:
        load_weights(network, path, "networks.s.weights")
    assert f"is of another network: 1 of another shape or type ({key} is a list" in str(
        caught.value
    )


def test_weights_that_fit_are_loaded(tmp_path: Path) -> None:
    path = Path(weights_file(tmp_path / "t.pt", "wrn-10-1"))
    network = registry.build("wrn-10-1", 1, 10)
    load_weights(network, path, "networks.teacher.weights")
    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(value, saved[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "cannot be read: it is empty"),
        (b"not a state dict", "cannot be read: it is no state dict saved by torch.save"),
        ([1, 2], "holds no state dict, but a list"),
        ({"conv1.weight": torch.zeros(1)}, "is of another network"),
    ],
)
def test_a_file_without_weights_is_a_usage_error(
    content: object, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UsageError) as caught:
        load_weights(registry.build("wrn-10-1", 1, 10), path, "networks.s.weights")
    assert str(caught.value).startswith("networks.s.weights: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defaults_come_from_the_run(run_file: str) -> None:
    config: Config = load(run_file, ["topology=1T1S", "distillation.temperature=3.0"])
    assert config.pairs == {}
    assert config.method.taus == {Pair("teacher", "student"): 3.0}
