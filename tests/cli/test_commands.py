"""Mistakes at the terminal: each is one line that says what is wrong, where, and what to do.

Not covered: mistakes that only a run can find (`tests/training`); commands that need a coordinator.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from switokd.cli.commands import settings_named
from switokd.cli.main import main
from tests.support import run

LINES = [
    ("train --epochs 5", "there is no option --epochs; a setting is written without dashes: sch"),
    ("train digits-1t1s --epochs 5", "without dashes: schedule.epochs=5; see 'switokd train --he"),
    ("train digits-1t1s --lr=0.1", "networks.NAME.optimizer.lr=0.1 (NAME: a network of the run f"),
    ("train digits-1t1s --batch-size 8", "without dashes: data.batch_size=8; see"),
    ("train digits-1t1s --epohs 5", "without dashes: schedule.epochs=5; see"),
    ("train digits-1t1s --networks.student.model x", "without dashes: networks.student.model=x"),
    ("check digits-1t1s --seed 3", "check: there is no option --seed; a setting is written with"),
    ("train digits-1t1s --proceses 2", "there is no option --proceses; did you mean '--processes'"),
    ("recipes --epochs 5", "recipes: there is no option --epochs; see 'switokd recipes --help'"),
    ("train digits-1t1s -e 5", "train: there is no option -e; see 'switokd train --help'"),
    ("train --processes", "train: option '--processes' requires an argument; see 'switokd train"),
    ("trian", "no such command 'trian'; did you mean 'train' or 'drain'; see 'switokd --help'"),
    ("--trian", "there is no option --trian"),
    ("settings x", "settings: x is more than the command takes; see 'switokd settings --help'"),
    ("plan digits-1t1s", "plan: missing option '--devices'"),
    ("plan digits-1t1s --devices 12345678901234567890", "1 or more, with 18 digits at most"),
    ("k8s render digits-1t1s --image a --output /dev/null", "--output: /dev/null is a file; name"),
    ("scale run x", "scale: factor: found x; allowed: a number, 1e-06 to 1e+06"),
    ("scale run nan", "scale: factor: found nan; allowed: a number, 1e-06 to 1e+06"),
    ("watch run --interval nan", "watch: --interval: found nan; allowed: a number, 0.1 to 3,600"),
    ("stop run --wait -1", "stop: --wait: found -1; allowed: a number, 0 to 86,400"),
    ("runs --tls-ca nowhere", "runs: --tls-ca: nowhere cannot be read: No such file or directory"),
    ("certificates certs --host a:1", "'a:1' cannot be in a certificate"),
    ("train digits-1t1s run_dir=/dev/null/it", "/dev/null/it cannot be created: /dev/null is a"),
    ("train cifar10-1t1s data.root=none", "none/cifar-10-batches-py; put it there, or set data.d"),
    ("plan digits-1t1s --devices 0", "--devices: found 0; allowed: a whole number, 1 or more"),
    ("coordinator --port 80000", "--port: found 80000; allowed: a whole number, 0 to 65535"),
    ("train digits-1t1s --log-format xml", "--log-format: found xml; allowed: text, json"),
    ("train", "name a recipe (see 'switokd recipes') or a run file, or --resume RUN"),
    ("train nofile.yaml", "nofile.yaml: cannot be read as a run file: No such file"),
    ("train .", ". is a folder; name a run file in it, or a recipe"),
    ("train digits-1t1s extra", "'extra': a setting is written key.key=value"),
    ("train --resume nowhere", "--resume nowhere: there is no such folder"),
    ("train --resume /dev/null", "--resume /dev/null is a file; name a run folder"),
    ("train --resume .", "--resume . is no run folder: there is no config.yaml in it"),
    ("train digits-1t1s -n 5", "digits-1t1s is 1T1S and needs 2 processes, found 5"),
    (
        "train digits-1t1s networks.studnt.model=wrn-10-1",
        "networks.studnt has no role; did you mean 'student'? (networks: teacher, student)",
    ),
    (
        "train digits-1t1s distillation.strategy=switkod",
        "distillation: strategy 'switkod' is not one of",
    ),
    ("hold run teacher expertt", "hold: mode: found expertt; allowed: learning, expert"),
    ("hold run teacher", "hold: missing argument 'MODE'; allowed: learning, expert; see"),
    ("compare digits-1t1s --strategies x", "--strategies: strategy 'x' is not one of switokd"),
    ("certificates /dev/null", "/dev/null is a file; name a new folder for the certificates"),
    ("coordinator --traces-every x", "--traces-every: found x; allowed: a whole number, 0 or"),
    ("train digits-1t1s tracking.traces_every=-1", "command line: tra"),
    ("export nowhere", "nowhere: there is no such folder"),
    ("report /dev/null", "/dev/null is a file; name a run folder"),
    ("predict nowhere x.png", "nowhere is no artefact"),
    ("compare digits-1t1s --out /dev/null", "--out: /dev/null is a file; name a new folder, or"),
    ("compare digits-1t1s --jobs 0", "--jobs: found 0; allowed: a whole number, 1 or more"),
    ("coordinator --strategy foo", "--strategy foo: write package.module:callable"),
    ("recipes digits", "no recipe of that name; did you mean 'digits-2t1s'?"),
]


EMPTY = [
    (
        "check ''",
        "check: RECIPE_OR_FILE|KEY.KEY=VALUE is an empty word; see 'switokd check --help'",
    ),
    ("train ''", "train: RECIPE_OR_FILE is an empty word"),
    ("recipes ''", "recipes: NAME is an empty word"),
    ("status ''", "status: RUN is an empty word"),
    ("report run ''", "report: RUN is an empty word"),
    ("train digits-1t1s ''", "train: KEY.KEY=VALUE is an empty word"),
]


def told(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """Run a command with a mistake in this process; return what it says."""
    monkeypatch.setattr(sys, "argv", ["switokd", *shlex.split(command)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    return said.err.splitlines()


@pytest.mark.parametrize(
    ("command", "words"), [*LINES, *EMPTY], ids=[command for command, _ in [*LINES, *EMPTY]]
)
def test_a_mistake_is_one_line(
    command: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = told(command, monkeypatch, capsys)
    assert line.startswith("switokd: ")
    assert words in line
    assert not list(tmp_path.iterdir())


def test_all_mistakes_of_options_and_settings_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "train digits-1t1s schedule.epochs=x --processes 0 data.batch_size=1 --max-restarts y"
    lines = told(command, monkeypatch, capsys)
    assert lines == [
        "switokd: train: --processes: found 0; allowed: a whole number, 1 or more",
        "switokd: train: --max-restarts: found y; allowed: a whole number, 0 or more",
        "switokd: command line: data.batch_size: found 1; allowed: greater than or equal to 2",
        'switokd: command line: schedule.epochs: found "x"; allowed: a whole number',
    ]
    assert len(told("predict", monkeypatch, capsys)) == 2  # both arguments are missing
    lines = told("train digits-1t1s --batch-size=5 --quite --lr 3", monkeypatch, capsys)
    assert [line.partition(";")[0] for line in lines] == [
        "switokd: train: there is no option --batch-size",
        "switokd: train: there is no option --quite",
        "switokd: train: there is no option --lr",
    ]


def test_all_mistakes_of_a_list_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told("compare digits-1t1s --strategies foo,dml,bar --seeds x", monkeypatch, capsys)
    assert [line[:45] for line in lines] == [
        "switokd: --strategies: strategy 'foo' is not ",
        "switokd: --strategies: strategy 'bar' is not ",
        "switokd: --seeds x: allowed are a number of s",
    ]


def test_settings_that_an_option_may_mean() -> None:
    assert settings_named("temperature") == [
        *("distillation.temperature", "networks.NAME.temperature"),
        "pairs.TEACHER.STUDENT.temperature",
    ]
    assert settings_named("train_samples") == settings_named("train-samples")
    assert settings_named("nothing-like-it") == []


@pytest.mark.parametrize("module", ["switokd", "switokd.train"])
def test_a_mistake_as_an_object(module: str, tmp_path: Path) -> None:
    words = ["train"] if module == "switokd" else []
    command = [sys.executable, "-m", module, *words, "nope", "--log-format", "json", "--lr", "1"]
    code, out, err = run(command, tmp_path)
    assert (code, out) == (2, "")
    said = json.loads(err)
    assert said["level"] == "error"
    assert "there is no option --lr" in said["message"]
