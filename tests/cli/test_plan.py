"""`switokd plan`, in a process of its own, and the settings that it recommends.

Not covered: the predictions themselves (`tests/planning/test_cost_model.py`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from switokd.cli.main import app
from switokd.cli.plan_inputs import data_facts, make_profile
from switokd.config.run_file import load
from switokd.planning.cost_model import predict
from switokd.planning.pauses import Pauses
from switokd.planning.placement_settings import placement_settings, train_arguments
from switokd.planning.profile import Communication, NetworkTimes, Profile
from switokd.runtime.environment import cores
from switokd.runtime.placement import Placement, dedicated, replicated
from tests.preloaded import call, switokd_command
from tests.support import run

CONFIG = load("digits-2t1s")


def saved_profile(folder: Path) -> str:
    """Save a profile of digits-2t1s: costs 10 : 1 : 1, no costs of communication."""

    def network(name: str, whole: float) -> NetworkTimes:
        return NetworkTimes(
            role=CONFIG.networks[name].role,
            model=CONFIG.networks[name].model,
            samples=(64,),
            forward_seconds=(whole / 3,),
            backward_seconds=(whole * 2 / 3,),
            update_seconds=0,
            parameter_bytes=1000,
            gradient_bytes=1000,
            optimizer_bytes=1000,
            activation_bytes_per_sample=1,
        )

    Profile(
        device="cpu",
        threads=1,
        torch="2",
        image=(1, 8, 8),
        classes=10,
        networks={
            "teacher1": network("teacher1", 0.1),
            "teacher2": network("teacher2", 0.01),
            "student": network("student", 0.01),
        },
        communication=Communication(
            description="a link",
            latency_seconds=0,
            bandwidth_bytes_per_second=1e15,
            decision_seconds=0,
        ),
    ).save(folder / "p.json")
    return "p.json"


def plan(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run `switokd plan digits-2t1s`: exit code, standard output, standard error."""
    words = ("plan", "digits-2t1s", *arguments)
    return call(folder, switokd_command, *words, COLUMNS="160", CUDA_VISIBLE_DEVICES="")


def planned(folder: Path, *arguments: str) -> Any:
    code, out, err = plan(folder, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == 0
    for word in ("--devices", "--save-profile", "--paused", "--run", "--json", "cifar100-2t1s"):
        assert word in result.output


def test_planning_from_a_profile_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from switokd.cli.main import app; "
        f"app(['plan', 'digits-2t1s', '--devices=2', '--profile={saved_profile(tmp_path)}'], "
        "standalone_mode=False); print('torch' in sys.modules)"
    )
    rc, out, err = run([sys.executable, "-c", code], tmp_path)
    assert (rc, err) == (0, "")
    assert out.splitlines()[-1] == "False"


def test_saved_profile_gives_the_same_plan_again(tmp_path: Path) -> None:
    told = ["data.batch_size=16", "--devices", "2"]
    code, out, err = plan(tmp_path, *told, "--save-profile", "p.json")
    assert (code, err.strip()) == (0, "")
    for words in ("profiled on  cpu, 1 thread", "shards of 8, 16", "assumed", "teacher1 30%"):
        assert words in out
    assert "digits-2t1s: 2T1S on 2 devices" in out
    assert "to use it  switokd train digits-2t1s data.batch_size=16 " in out
    profile = Profile.load(tmp_path / "p.json")
    assert list(profile.networks) == list(CONFIG.topology)
    assert profile.sizes == (8, 16)
    assert plan(tmp_path, *told, "--profile", "p.json") == (0, out, "")


def test_json_output(tmp_path: Path) -> None:
    found = planned(tmp_path, "--devices=3", "--paused=0", "--profile", saved_profile(tmp_path))
    by_name = {p["placement"]: p for p in found["placements"]}
    one_each = by_name["teacher1: rank 0, teacher2: rank 1, student: rank 2"]
    assert one_each["step_seconds"] == pytest.approx(0.1)
    assert one_each["settings"] == ["placement=dedicated"]
    assert one_each["memory_bytes"] == [3064, 3064, 3064]
    everywhere = by_name["teacher1: ranks 0-2, teacher2: ranks 0-2, student: ranks 0-2"]
    assert (everywhere["settings"], everywhere["processes"]) == (["placement=replicated"], 3)
    assert everywhere["efficiency"] == pytest.approx(1, abs=0.05)
    assert found["placements"][found["chosen"]]["step_seconds"] == pytest.approx(0.04, rel=0.05)
    assert found["pauses"] == [{"paused": [], "share": 1.0}]
    assert found["profile"]["device"] == "cpu"


@pytest.mark.parametrize(("devices", "is_spread"), [(1, False), (2, True)])
def test_recommended_command_uses_the_recommended_placement(
    devices: int, is_spread: bool, tmp_path: Path
) -> None:
    """placement=replicated fits any number of processes, so the command contains the number."""
    told = ["--profile", saved_profile(tmp_path), f"--devices={devices}", "--paused=0"]
    code, out, err = plan(tmp_path, *told)
    assert (code, err) == (0, "")
    placements = {
        1: "placement=replicated --processes=1",
        2: "'placement={teacher1: [0, 1], teacher2: [0], student: [1]}'",
    }
    *_, last = out.splitlines()
    assert last == f"to use it  switokd train digits-2t1s {placements[devices]}"
    note = "note  BatchNorm layers use the statistics of each rank's own images"
    assert (note in out) == is_spread
    sync = [*told, "compute.batch_norm=sync"]
    code, out, err = plan(tmp_path, *sync)
    assert (code, err) == (0, "")
    assert ("note  compute.batch_norm=sync needs a GPU per rank" in out) == is_spread
    assert note not in out


@pytest.mark.parametrize("setting", ["data.mixup=0.2", "data.label_smoothing=0.1"])
def test_soft_targets_make_the_exchange_larger(setting: str, tmp_path: Path) -> None:
    path, seconds = tmp_path / saved_profile(tmp_path), []
    one_each = dedicated(CONFIG.topology, dict.fromkeys(CONFIG.topology, 1))
    for config in (CONFIG, load("digits-2t1s", [setting])):
        found = make_profile(config, data_facts(config), path, None, 3)
        slow = found.communication.model_copy(update={"bandwidth_bytes_per_second": 1000.0})
        found = found.model_copy(update={"communication": slow})
        seconds.append(predict(found, one_each, 64, Pauses.none()).step_seconds - 0.1)
    hard, soft = seconds
    assert soft == pytest.approx(
        hard * (10 + 10) / (10 + 2)
    )  # 10 logits, and a distribution (10 values) or a label (2)


def test_pauses_come_from_an_earlier_run(tmp_path: Path) -> None:
    lines = [
        {"step": step, "teacher": t, "student": "student", "mode": mode}
        for step, mode in ((1, "expert"), (2, "expert"), (3, "expert"), (4, "learning"))
        for t in ("teacher1", "teacher2")
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "decisions.jsonl").write_text(text)
    found = planned(tmp_path, "--devices=1", "--run=.", "--profile", saved_profile(tmp_path))
    assert found["pauses"] == [
        {"paused": ["teacher1", "teacher2"], "share": 0.75},
        {"paused": [], "share": 0.25},
    ]
    (only,) = found["placements"]
    assert only["step_seconds"] == pytest.approx((0.12 + 3 * (0.11 / 3 + 0.01)) / 4)
    assert only["efficiency"] == pytest.approx(1)


def test_pauses_come_from_the_run_file_by_default(tmp_path: Path) -> None:
    told = ["--profile", saved_profile(tmp_path), "--devices=1", "placement=auto"]
    told.append("auto.paused={teacher1: 1}")
    assert planned(tmp_path, *told)["pauses"] == [{"paused": ["teacher1"], "share": 1.0}]
    assert planned(tmp_path, *told, "--paused=0")["pauses"] == [{"paused": [], "share": 1.0}]


def test_strategy_that_fixes_the_pauses_overrides_options(tmp_path: Path) -> None:
    told = ["--profile", saved_profile(tmp_path), "--devices=1", "--paused=0.5"]
    both = ["teacher1", "teacher2"]
    weights = [f"networks.{teacher}.weights=w.pt" for teacher in both]
    for strategy, paused in (("dml", []), ("kd", both)):
        found = planned(tmp_path, *told, f"distillation.strategy={strategy}", *weights)
        assert found["pauses"] == [{"paused": paused, "share": 1.0}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--paused=0.5", "--run=."], "--paused and --run both say how often"),
        (["--paused=most"], "a share is a number from 0 to 1"),
        (["--run=nowhere"], "nowhere/decisions.jsonl cannot be read"),
        (["--profile=none.json"], "none.json: cannot be read as a profile"),
        (["--profile=p.json", "--save-profile=q.json"], "with --profile nothing is measured"),
        (
            ["--profile=p.json", "networks.student.model=wrn-10-3"],
            "p.json: student is a student, wrn-10-1",
        ),
        (
            ["--profile=p.json", "compute.compile=true"],
            "compute.compile False, and the run file has",
        ),
        (["device=cuda"], "there is no GPU to measure on"),
        (["no.such.key=1"], "no.such.key"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    saved_profile(tmp_path)
    code, out, err = plan(tmp_path, "--devices=2", *arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert err.startswith("switokd: ")
    assert err.count("\n") == 1


def test_mistakes_are_reported_before_measuring(
    tmp_path: Path,
) -> None:
    """While measuring, the network is named on standard error."""
    for told, words in {
        ("--devices=97",): "a batch of 64 images is too small for 97 devices",
        ("--devices=2", "data.train_samples=6"): "64 is more than the 6 training images; choose a",
        ("--devices=2", "data.train_samples=1438"): "1438 is more than the 1437 train",
        (
            "--devices=2",
            "data.drop_last=false",
            "data.train_samples=10",
            "distillation={strategy: kdcl-general, strategy_kwargs: {held_out: 10}}",
        ): "it holds out 10 of the 10 training images, and at least 2 must remain",
        ("--devices=2", "--save-profile=none/p.json"): "none/p.json cannot be written; name a file",
        ("--devices=2", "--save-profile=."): "--save-profile: . cannot be written; name a file",
    }.items():
        code, out, err = plan(tmp_path, *told)
        assert (code, out) == (2, "")
        assert err.startswith("switokd: ")
        assert words in err
        assert "profiling" not in err


def test_batch_is_limited_by_the_training_images(tmp_path: Path) -> None:
    told = ["--profile", saved_profile(tmp_path), "--paused=0", "data.drop_last=false"]
    found = planned(tmp_path, *told, "--devices=2", "data.train_samples=6")
    assert found["batch_size"] == 6
    three_each = "teacher1: ranks 0-1, teacher2: rank 0, student: rank 1"
    assert three_each in [p["placement"] for p in found["placements"]]
    code, _, err = plan(tmp_path, *told, "--devices=10", "data.train_samples=6")
    assert (code, "a batch of 6 images is too small for 10 devices" in err) == (2, True)


def test_notes_on_cores_and_memory(tmp_path: Path) -> None:
    path = tmp_path / saved_profile(tmp_path)
    text = path.read_text()
    told = ["--devices=1", "--profile", path.name]
    path.write_text(text.replace('"threads": 1', f'"threads": {cores() + 1}'))
    path.write_text(path.read_text().replace('"a device"', '"cpu"'))
    code, out, err = plan(tmp_path, *told)
    assert (code, err) == (0, "")
    slow = f"each: slower on the {cores()} cores here"
    assert f"note  1 rank with {cores() + 1} threads {slow}" in out
    assert "fits into memory" not in out
    path.write_text(text.replace('"device_memory_bytes": null', '"device_memory_bytes": 100'))
    code, out, err = plan(tmp_path, *told)
    assert (code, err) == (0, "")
    assert "note  no placement fits into memory; this one needs 0.00919 MB on a rank" in out
    assert "slower" not in out
    path.write_text(text.replace('"a device"', '"cpu"'))
    code, out, err = plan(tmp_path, *told, f"--devices={cores() + 1}")
    assert (code, err) == (0, "")
    assert f"note  {cores() + 1} ranks with 1 thread {slow}" in out


def test_settings_for_a_placement() -> None:
    topology = CONFIG.topology
    one_each = dict.fromkeys(topology, 1)
    for placement, expected in {
        dedicated(topology, one_each): ["placement=dedicated"],
        replicated(topology, 4): ["placement=replicated"],
        dedicated(topology, {**one_each, "teacher1": 6}): ["networks.teacher1.ranks=6"],
    }.items():
        assert placement_settings(placement, CONFIG) == expected
    told = ["placement=auto", "auto.paused=0.5"]  # allowed with placement=auto only
    wanted = placement_settings(replicated(topology, 4), load("digits-2t1s", told))
    assert wanted == ["placement=replicated", "auto={}"]
    assert load("digits-2t1s", [*told, *wanted]) == load("digits-2t1s", wanted[:1])
    alone = load("digits-2t1s", ["placement=replicated", "coordinator=off"])
    assert placement_settings(replicated(topology, 1), alone) == ["placement=replicated"]
    wanted = placement_settings(dedicated(topology, one_each), alone)
    assert wanted == ["placement=dedicated", "coordinator.address=auto"]
    assert load("digits-2t1s", wanted) == CONFIG  # may run on several processes
    table: dict[str, list[int] | dict[int, float]] = {
        "teacher1": {0: 40.0, 1: 24.0},
        "teacher2": [1],
        "student": [1],
    }
    assert train_arguments(replicated(topology, 4), CONFIG) == [
        "placement=replicated",
        "--processes=4",
    ]
    (line,) = train_arguments(Placement.of(table), CONFIG)
    key, _, value = line.partition("=")
    assert key == "placement"
    assert Placement.of(yaml.safe_load(value)) == Placement.of(table)
    assert str(Placement.of(table)) == (
        "teacher1: ranks 0-1 (40:24), teacher2: rank 1, student: rank 1"
    )
