"""Trials of a comparison, and their state as the run folders show it.

Not covered: running the trials (`test_runner.py`, `tests/cli/test_compare.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from switokd.config.run_file import load
from switokd.errors import UsageError
from switokd.runs.compare.runner import clear_unfinished, locked
from switokd.runs.compare.trials import (
    VANILLA,
    Trial,
    TrialState,
    Variant,
    find_finished,
    make_trials,
    parse_seeds,
    parse_strategies,
)
from tests.support import REPOSITORY

SETTINGS = ["schedule.epochs=2", "placement=replicated", "coordinator=off"]


def trials(out: Path, strategies: str, seeds: str = "1") -> list[Trial]:
    return make_trials(
        "digits-1t1s", SETTINGS, parse_strategies(strategies), parse_seeds(seeds), out
    )


def leave(trial: Trial, finished: bool, **changes: Any) -> None:
    """Create the folder that a run of this trial leaves behind."""
    trial.folder.mkdir(parents=True)
    config = trial.config.model_copy(update=changes)
    (trial.folder / "config.yaml").write_text(config.dump())
    if finished:
        (trial.folder / "summary.json").write_text('{"networks": {"student": {}}}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vanilla", [("vanilla", {})]),
        ("dml, switokd", [("dml", {}), ("switokd", {})]),
        ("threshold:delta=0.5,kd", [("threshold", {"delta": 0.5}), ("kd", {})]),
        ("a.b:C", [("a.b:C", {})]),
        ("a.b:C:rate=2:how=fast,dml", [("a.b:C", {"rate": 2, "how": "fast"}), ("dml", {})]),
        ("a:C:of=[1, 2]:by={x: 1, y: [2]}", [("a:C", {"of": [1, 2], "by": {"x": 1, "y": [2]}})]),
        ("a:C:lr=5e-4", [("a:C", {"lr": 5e-4})]),
    ],
)
def test_strategies_carry_arguments(text: str, expected: list[tuple[str, dict[str, Any]]]) -> None:
    assert [(v.name, v.kwargs) for v in parse_strategies(text)] == expected


def test_label_parses_to_the_same_strategy() -> None:
    for text in ("threshold:delta=0.5", "a.b:C:of=[1, 2]:how=fast", "kd"):
        (variant,) = parse_strategies(text)
        assert variant.label == text
    assert Variant("a.b:C", {"rate": 2}).folder(Path("out"), 3) == Path("out/a.b-C-rate=2-3")


def test_only_strategies_that_switch_follow_published_semantics(tmp_path: Path) -> None:
    settings = [*SETTINGS, "distillation.semantics=published"]
    wanted = parse_strategies("kd,dml,threshold:delta=0.5,switokd")
    all_trials = make_trials("digits-1t2s", settings, wanted, [0], tmp_path)
    assert [(t.variant.name, t.config.distillation.semantics) for t in all_trials] == [
        *((name, "paper") for name in ("vanilla", "kd", "dml")),
        *((name, "published") for name in ("threshold", "switokd")),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("threshold:delta", "strategy threshold:delta: write|there is no module 'threshold'"),
        ("threshold:delta=0.5:0.6", "found '0.6'; allowed: NAME or package.module:callable"),
        ("threshold:delta=0.5:delta=0.6", "each argument once"),
        ("threshold:delta=[0.5", "not valid YAML"),
        ("dml,dml", "dml occurs twice"),
        ("dmk", "strategy 'dmk' is not one of .* did you mean 'dml'"),
        ("", "strategy '' is not one of"),
        ("threshold:delta=5", "an L1 distance, from 0 to 2, got 5"),
        ("threshold", "cannot be created with strategy_kwargs {}"),
    ],
)
def test_a_wrong_strategy_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        trials(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_seeds_are_a_number_or_a_list() -> None:
    assert parse_seeds("3") == [0, 1, 2]
    assert parse_seeds("0,1,5") == [0, 1, 5]
    assert parse_seeds("5,") == [5]
    for wrong in ("0", "", "a", "-1", "1.5", "1,,2", ","):
        with pytest.raises(UsageError, match="allowed are a number of seeds, like 3"):
            parse_seeds(wrong)
    with pytest.raises(UsageError, match="occurs twice"):
        parse_seeds("1,1")


def test_trial_is_the_recipe_with_strategy_seed_and_folder(tmp_path: Path) -> None:
    all_trials = trials(tmp_path, "vanilla,threshold:delta=0.5", "2")
    assert [(t.variant.label, t.seed) for t in all_trials] == [
        ("vanilla", 0),
        ("threshold:delta=0.5", 0),
        ("vanilla", 1),
        ("threshold:delta=0.5", 1),
    ]
    for trial in all_trials:
        assert trial.teachers_from is None
        recipe, *settings = trial.arguments
        assert load(recipe, settings) == trial.config
    last = all_trials[-1].config
    assert last.run_dir == str(tmp_path / "threshold-delta=0.5-1")
    expected = {
        **load("digits-1t1s", SETTINGS).model_dump(),
        "seed": 1,
        "run_dir": last.run_dir,
        "distillation": {
            **load("digits-1t1s").distillation.model_dump(),
            "strategy": "threshold",
            "strategy_kwargs": {"delta": 0.5},
        },
    }
    assert last.model_dump() == expected


def test_kd_takes_teachers_from_the_vanilla_run_of_the_same_seed(tmp_path: Path) -> None:
    all_trials = trials(tmp_path, "kd", "0,7")
    assert [t.folder.name for t in all_trials] == ["vanilla-0", "kd-0", "vanilla-7", "kd-7"]
    assert all_trials[3].teachers_from == all_trials[2].folder
    assert all_trials[3].config.networks["teacher"].weights == str(
        tmp_path / "vanilla-7" / "weights" / "teacher.pt"
    )
    assert all_trials[3].config.networks["student"].weights is None
    assert (
        trials(tmp_path, "kd,vanilla")[0].folder.name == "kd-0"
    )  # an explicit vanilla keeps its position


def test_kd_takes_the_weights_that_the_run_file_names(tmp_path: Path) -> None:
    settings = [*SETTINGS, "networks.teacher.weights=mine.pt"]
    (trial,) = make_trials("digits-1t1s", settings, parse_strategies("kd"), [0], tmp_path)
    assert trial.teachers_from is None
    assert trial.config.networks["teacher"].weights == "mine.pt"


def test_a_teacher_template_gets_weights_for_each_teacher(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    optimizer = "optimizer: {name: sgd, lr: 0.1}"
    path.write_text(
        f"name: mine\ntopology: 2T1S\nteacher: {{model: wrn-10-1, {optimizer}}}\n"
        f"student: {{model: wrn-10-1, {optimizer}}}\n"
    )
    kd = make_trials(str(path), [], parse_strategies("kd"), [0], tmp_path)[1].config
    named = [kd.networks[name].weights or "" for name in ("teacher1", "teacher2")]
    assert [Path(weights).name for weights in named] == ["teacher1.pt", "teacher2.pt"]


@pytest.mark.parametrize(
    "setting",
    ["seed=3", "run_dir=x", "distillation.strategy=dml", "distillation.strategy_kwargs.delta=1"],
)
def test_a_setting_that_the_comparison_sets_is_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a comparison sets \S+ itself; use --"):
        make_trials("digits-1t1s", [setting], [VANILLA], [0], tmp_path)


def test_state_is_read_from_the_folder(tmp_path: Path) -> None:
    new, unfinished, finished, empty, cut = trials(tmp_path, "dml", "5")
    empty.folder.mkdir()
    cut.folder.mkdir()
    (cut.folder / "config.yaml").touch()  # killed before the file had content
    leave(unfinished, finished=False)
    leave(finished, finished=True)
    assert [t.state() for t in (new, unfinished, finished, empty, cut)] == [
        TrialState.NEW,
        TrialState.UNFINISHED,
        TrialState.FINISHED,
        TrialState.NEW,
        TrialState.UNFINISHED,
    ]


def test_only_unfinished_folders_are_removed(tmp_path: Path) -> None:
    new, unfinished, finished = trials(tmp_path, "dml", "3")
    leave(unfinished, finished=False)
    leave(finished, finished=True)
    assert clear_unfinished([new, unfinished, finished]) == [unfinished]
    assert [p.name for p in tmp_path.iterdir()] == [finished.folder.name]


@pytest.mark.parametrize("finished", [True, False])
def test_folder_of_another_configuration_is_refused(finished: bool, tmp_path: Path) -> None:
    (trial,) = trials(tmp_path, "dml")
    other = load("digits-1t1s", [*SETTINGS, "schedule.epochs=3"]).schedule
    leave(trial, finished, schedule=other, seed=7)
    with pytest.raises(
        UsageError, match=r"dml-0 holds a run with seed 7, .* 0 \(and 1 more\); choose another"
    ):
        clear_unfinished([trial])
    assert (trial.folder / "config.yaml").exists()


def test_paths_of_modules_and_data_do_not_make_another_run(tmp_path: Path) -> None:
    (trial,) = trials(tmp_path, "dml")
    data = trial.config.data.model_copy(update={"root": "elsewhere", "workers": 2})
    leave(trial, True, import_from=("/where/nets/lie",), description="another", data=data)
    assert trial.state() is TrialState.FINISHED


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (trial,) = trials(tmp_path, "dml")
    trial.folder.mkdir()
    (trial.folder / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds files, but no run"):
        clear_unfinished([trial])
    assert (trial.folder / "thesis.tex").exists()


def test_a_moved_comparison_is_the_same(tmp_path: Path) -> None:
    for trial in trials(tmp_path / "old", "kd,dml"):
        leave(trial, finished=True)
    (tmp_path / "old").rename(tmp_path / "new")
    assert {t.state() for t in trials(tmp_path / "new", "kd,dml")} == {TrialState.FINISHED}
    # Teachers of another seed are another configuration.
    _, kd, _, other = trials(tmp_path / "mixed", "kd", "2")
    leave(kd, finished=True, networks=other.config.networks)
    with pytest.raises(UsageError, match=r"networks\.teacher\.weights"):
        kd.state()


def test_strategies_and_seeds_come_from_the_finished_runs(tmp_path: Path) -> None:
    for trial in trials(tmp_path, "switokd,threshold:delta=0.5,vanilla", "1,4"):
        leave(trial, finished=trial.seed == 4)
    (tmp_path / "logs").mkdir()
    (tmp_path / "switokd-4").rename(tmp_path / "copy")
    variants, seeds = find_finished(tmp_path)
    assert [v.label for v in variants] == ["vanilla", "threshold:delta=0.5"]
    assert seeds == [4]
    with pytest.raises(UsageError, match="holds no finished run"):
        find_finished(tmp_path / "logs")


def test_a_folder_serves_one_comparison_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "out"),
        pytest.raises(UsageError, match="is at work in"),
        locked(tmp_path / "out"),
    ):
        pass
    with locked(tmp_path / "out"):  # released again
        pass
    with (
        pytest.raises(UsageError, match="cannot be written"),
        locked(REPOSITORY / "Makefile" / "x"),
    ):
        pass
