"""Every problem of a run file and its settings is named, not only the first.

Not covered: the sentences themselves (`test_run_file.py`); options (`tests/cli/test_commands.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from switokd.config.run_file import load_importable
from switokd.errors import UsageError
from tests.config.test_run_file import MINIMAL, refusals


def assert_told(found: list[str], wanted: list[str]) -> None:
    """Each line has the words that are wanted of it, and there is no other line."""
    assert len(found) == len(wanted), found
    for line, words in zip(found, wanted, strict=True):
        assert words in line


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


def test_every_wrong_value_of_file_and_settings_is_named(run_file: Path) -> None:
    run_file.write_text(MINIMAL + "data: {batch_size: 0, bach_size: 3}\nseed: x\n")
    found = refusals(
        run_file,
        *("schedule.epochs", "device=gpu", "device.x=3", "networks.big.optimizer.lr=-1"),
        *("networks.little.modle=x", "compute.micro_batches=3", "name=[", "seed=-1"),
    )
    wanted = [
        "command line, 'schedule.epochs': a setting is written key.key=value",
        "command line, 'device.x=3': device is 'gpu', which has no keys below it",
        "command line, 'name=[': not valid YAML",
        "unknown key data.bach_size; did you mean data.batch_size?",
        "command line, networks.little.modle=x: unknown key networks.little.modle; did you mean",
        "command line: seed: found -1; allowed: greater than or equal to 0",
        "command line: device: found \"gpu\"; allowed: 'auto', 'cpu' or 'cuda'",
        f"{run_file}:5: data.batch_size: found 0; allowed: greater than or equal to 2",
        "command line: networks.big.optimizer.lr: found -1",
        "command line: compute.micro_batches: found 3; allowed: 1, 2, 4",
    ]
    assert_told(found, wanted)


def test_every_problem_between_sections_is_named() -> None:
    found = refusals(
        "digits-1t1s",
        *("resume=auto", "auto={paused: 0.5}", "compute.cuda_graphs=true"),
        *("schedule.accumulate=2", "pairs={teacher: {stdent: {enabled: false}}}"),
    )
    wanted = ["pairs.teacher.stdent: no student", "run_dir", "auto.paused", "compute.cuda_graphs"]
    assert_told(found, wanted)


def test_names_of_models_data_set_and_strategy_are_told_with_all_others() -> None:
    found = refusals(
        "digits-1t1s",
        *("data.dataset=minst", "networks.student.model=resnet19"),
        *("networks.teacher.model=wrn-9-1", "observers=[x,y]"),
        *("distillation.strategy=nope", "schedule.epochs=x"),
    )
    wanted = [
        'data.dataset: found "minst"; allowed: digits, fashion-mnist',
        'networks.teacher.model: found "wrn-9-1"; allowed: a depth of 10, 16',
        'networks.student.model: found "resnet19"; allowed: wrn-DEPTH-WIDTH',
        "strategy 'nope' is not one of",
        'schedule.epochs: found "x"; allowed: a whole number',
    ]
    assert_told(found, wanted)


def test_all_modules_that_are_missing_are_told() -> None:
    settings = [
        *("networks.student.model=nomod:x", "data.dataset=nodata:y", "distillation.strategy=no:z"),
        "observers=[one:A,two:B]",
    ]
    with pytest.raises(UsageError) as caught:
        load_importable("digits-1t1s", settings)
    found = str(caught.value).splitlines()
    wanted = [
        "networks.student.model nomod:x: there is no module 'nomod'; it must be installed, or",
        "data.dataset nodata:y: there is no module 'nodata'",
        "distillation.strategy no:z: there is no module 'no'",
        "observers one:A: there is no module 'one'",
        "observers two:B: there is no module 'two'",
    ]
    assert_told(found, wanted)
    assert all(line.startswith(words) for line, words in zip(found, wanted, strict=True))


def test_modules_that_are_missing_are_told_with_other_mistakes() -> None:
    settings = ["networks.student.model=nomod:x", "observers=[one:A]", "schedule.epochs=x", "sed=1"]
    with pytest.raises(UsageError) as caught:
        load_importable("digits-1t1s", settings)
    found = str(caught.value).splitlines()
    assert len(found) == 4, found
    for odd in ("observers=3", "networks=3", "networks={1: 2, a: 3}", "data=x", "import_from=3"):
        with pytest.raises(UsageError, match=r"^command line"):
            load_importable("digits-1t1s", [odd, "schedule.epochs=x"])
    for words in ("unknown key sed", "schedule.epochs", "module 'nomod'", "module 'one'"):
        assert any(words in line for line in found), words
