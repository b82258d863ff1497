"""Run files: valid ones, invalid ones, and the error messages for invalid ones.

Not covered: whether data, networks and processes fit together (`tests/data`, `tests/models`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from switokd.config.config import Config
from switokd.config.optimizers import SGD, Adam
from switokd.config.placement_setting import ranks_of_row
from switokd.config.recipes import recipe_text, recipes
from switokd.config.run_file import load, load_importable
from switokd.errors import (
    CoordinatorError,
    NonFiniteError,
    PeerError,
    SwitokdError,
    UsageError,
)

MINIMAL = """\
name: small
networks:
  big: {role: teacher, model: wrn-10-2, optimizer: {name: sgd}}
  little: {role: student, model: wrn-10-1, optimizer: {name: adam}}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(recipe_or_file: object, *settings: str) -> str:
    """Load an invalid run file and return the error message, which must be one line."""
    (message,) = refusals(recipe_or_file, *settings)
    return message


def refusals(recipe_or_file: object, *settings: str) -> list[str]:
    """As `refusal`, with a line per problem."""
    with pytest.raises(UsageError) as caught:
        load(str(recipe_or_file), settings)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def test_minimal_file_gets_the_documented_defaults(run_file: Path) -> None:
    config = load(str(run_file))
    assert (config.seed, config.data.dataset, config.device) == (0, "digits", "auto")
    assert config.run_dir is None
    method = config.distillation
    assert method.strategy == "switokd"
    assert (method.temperature, method.alpha, method.beta) == (1.0, 1.0, 1.0)
    assert config.networks["big"].optimizer == SGD(lr=0.1, momentum=0.9, weight_decay=5e-4)
    assert config.networks["little"].optimizer == Adam(name="adam", lr=1e-3)


def test_settings_override_the_file_and_the_last_one_wins(run_file: Path) -> None:
    settings = ["schedule.epochs=3", "networks.big.model=wrn-16-2", "schedule.epochs=4"]
    config = load(str(run_file), [*settings, "schedule.milestones=[1, 2]"])
    assert config.schedule.epochs == 4
    assert config.schedule.milestones == (1, 2)
    assert config.networks["big"].model == "wrn-16-2"
    assert config.networks["little"].model == "wrn-10-1"


@pytest.mark.parametrize("text", ["5e-4", "5E-4", ".0005", "0.05e-2", "+5e-4"])
def test_number_with_an_exponent_is_a_number(run_file: Path, text: str) -> None:
    config = load(str(run_file), [f"networks.big.optimizer.lr={text}"])
    assert config.networks["big"].optimizer.lr == 5e-4


@pytest.mark.parametrize("recipe", recipes())
def test_recipe_loads_and_is_named_after_its_topology(recipe: str) -> None:
    config = load(recipe)
    assert config.name == recipe
    assert config.topology.name.lower() == recipe.rpartition("-")[2]
    assert config.description
    assert config.run_dir is None


@pytest.mark.parametrize("recipe", recipes())
def test_dump_loads_to_the_same_configuration(recipe: str, tmp_path: Path) -> None:
    kwargs = "data.kwargs={a: ['007', null], b: {c: 1e-3}}"
    settings = ["description='Größe: \"5e-4\", no'", "data.dataset=own:data", kwargs]
    config = load(recipe, settings)
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(), encoding="utf-8")
    again = load(str(path))
    assert again == config
    assert (again.dump(), again.digest) == (config.dump(), config.digest)
    assert list(yaml.safe_load(config.dump())) == list(Config.model_fields)


@pytest.mark.parametrize(
    ("setting", "matters"),
    [
        ("seed=1", True),
        ("networks.student.model=wrn-10-2", True),
        ("distillation.beta=0.5", True),
        ("data.batch_size=32", True),
        ("run_dir=elsewhere", False),
        ("coordinator.timeout=5", False),
        ("observers=[tensorboard]", False),
        ("tracking.every_steps=3", False),
        ("description=other", False),
    ],
)
def test_digest_follows_what_the_training_depends_on(setting: str, matters: bool) -> None:
    digests = {load("digits-2t1s").digest, load("digits-2t1s", [setting]).digest}
    assert (len(digests) == 2) is matters


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("schedule.epochs=many", 'schedule.epochs: found "many"; allowed: a whole number'),
        ("schedule.epochs='3'", 'schedule.epochs: found "3"; allowed: a whole number'),
        ("schedule.epochs=0", "found 0; allowed: greater than or equal to 1"),
        ("seed=true", "seed: found true; allowed: a whole number"),
        ("data.batch_size=1", "data.batch_size: found 1; allowed: greater than or equal to 2"),
        ("networks.big.optimizer.lr=0", "networks.big.optimizer.lr: found 0"),
        (
            "networks.big.optimizer.name=rmsprop",
            "=rmsprop: networks.big.optimizer.name: found rmsprop; allowed: 'sgd', 'adam', 'adamw'",
        ),
        (
            "networks.big.optimizer=adam",
            'command line: networks.big.optimizer: found "adam"; allowed: keys and values, like',
        ),
        (
            "networks.big.optimizer={name: adam, momentum: 1}",
            "momentum is no setting of adam; to change",
        ),
        (
            "networks.big.role=student",
            "needs at least one teacher and one student (there is no teacher)",
        ),
        ("networks.big.optimizer={nesterov: true, momentum: 0}", "nesterov needs a momentum"),
        ("networks.big.optimizer={name: adam, betas: [0.9, 1.5]}", "betas.1: found 1.5; allowed:"),
        ("placement=everywhere", "dedicated, replicated, auto, or a table {NETWORK: [RANK, ...]}"),
        ("placement={big: [0], little: [2]}", "ranks must be 0 to world size - 1, each used"),
        ("placement={big: [0, 0], little: [1]}", "a network's ranks are [0, 1], or {0: 2, 1: 1}"),
        ("placement={big: {a: 1}, little: [0]}", "with weights, got {'a': 1}"),
        ("placement={big: {0: .inf}, little: [0]}", "weights above 0 to 1e+06"),
        ("placement={big: [0]}", "the table must name each network once: little is missing"),
        (
            "placement={big: [0], litle: [0]}",
            "the table must name each network once: no network 'litle'; did you mean 'little'?",
        ),
        ("placement={big: {0: '2', 1: 1}, little: [0]}", "or {0: 2, 1: 1} with weights, got {"),
        ("placement={big: {0: 1, 1: true}, little: [0]}", "or {0: 2, 1: 1} with weights, got {"),
        ("placement={big: {' 0': 1}, little: [0]}", "or {0: 2, 1: 1} with weights, got {"),
        ("networks.big.ranks=0", "networks.big.ranks: found 0"),
        ("coordinator=maybe", "off, or keys and values such as {address: HOST:PORT}"),
        ("compute.precision=fp8", "'fp32', 'tf32', 'bf16' or 'fp16'"),
        ("schedule={name: cosine, milestones: [5]}", "set schedule.milestones=[] with cosine"),
        ("schedule.min_lr=1e-4", "min_lr is for cosine; set schedule.name=cosine"),
        ("schedule={epochs: 5, warmup_epochs: 5}", "must be less than epochs, found 5 of 5"),
        (
            "schedule={name: cosine, min_lr: 0.05}",
            "schedule.min_lr: 0.05 is more than the learning rate that little starts with",
        ),
        ("schedule.name=step", "schedule.name: found \"step\"; allowed: 'multistep' or 'cosine'"),
        ("schedule.accumulate=0", "schedule.accumulate: found 0; allowed: greater than or equal"),
        ("schedule.ema_decay=1.0", "schedule.ema_decay: found 1.0; allowed: less than 1"),
        ("networks.big.clip_norm=0", "networks.big.clip_norm: found 0; allowed: greater than 0"),
        ("coordinator.address=here:99999", "allowed: auto, off, or HOST:PORT"),
        ("coordinator.address=here:1,there", "allowed: auto, off, or HOST:PORT (several"),
        ("distillation.temperature=1e-320", "greater than or equal to 0.001"),
        (
            "data.kwargs={a: 1}",
            "kwargs are for a dataset of your own, named as package.module:callable",
        ),
        ("data.label_smoothing=1.0", "data.label_smoothing: found 1.0; allowed: less than 1"),
        ("data.mixup=-1", "data.mixup: found -1; allowed: greater than or equal to 0"),
        ("data.cutmix=.inf", "data.cutmix: found Infinity"),
        ("network={}", "unknown key network; did you mean networks?"),
        ("networks.big.role=boss", "found \"boss\"; allowed: 'teacher' or 'student'"),
        ("distillation.strategy=switokt", "is not one of switokd, vanilla, dml, kd, threshold, "),
        ("distillation.temperature=.inf", "distillation.temperature: found Infinity"),
        ("coordinator.address=here", 'found "here"; allowed: auto, off, or HOST:PORT'),
        ("name=a b", 'name: found "a b"; allowed: letters, digits'),
        ("networks.a b={role: student, model: wrn-10-1}", "networks.a b is no name for a network"),
        ("schedule.milestones=3", "schedule.milestones: found 3; allowed: a list"),
        ("schedule.milestones=[1, two]", 'schedule.milestones.1: found "two"'),
        ("data=7", "data: found 7; allowed: keys and values"),
        ("networks={}", "at least one teacher and one student"),
        ("networks.big.role=student", "one teacher and one student (there is no teacher)"),
        ("networks.third.role=student", "networks.third.model is missing"),
        (
            "networks.bog.optimizer.lr=0.2",
            "networks.bog has neither role nor model; did you mean 'big'? (networks: big, little)",
        ),
        ("schedule.epohs=3", "unknown key schedule.epohs; did you mean schedule.epochs?"),
        ("epochs=3", "unknown key epochs; did you mean schedule.epochs?"),
        ("networks.big.modell=x", "key networks.big.modell; did you mean networks.big.model?"),
        ("schedule.zzz=3", "unknown key schedule.zzz; known keys here: epochs, max_steps"),
        ("seed.x=3", 'seed: found {"x": 3}; allowed: a whole number'),
        ("seed", "'seed': a setting is written key.key=value"),
        ("=3", "'=3': a setting is written key.key=value"),
        ("name.x=3", "'name.x=3': name is 'small', which has no keys below it"),
        ("seed=[1", "command line, 'seed=[1': not valid YAML"),
    ],
)
def test_message_names_key_value_and_allowed_values(
    run_file: Path, setting: str, sentence: str
) -> None:
    assert sentence in refusal(run_file, setting)


def test_message_names_the_file_and_the_invalid_setting(run_file: Path) -> None:
    message = refusal(run_file, "seed=1", "schedule.epochs=0", "device=cpu")
    assert message.startswith("command line: schedule.epochs: found 0")
    run_file.write_text(MINIMAL + "schedule: {epochs: 0}\n")
    assert refusal(run_file, "seed=1").startswith(f"{run_file}:5: schedule.epochs: found 0")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 1\nname: x\nseed: 2\n", ":3: not valid YAML: key 'seed' is there twice"),
        ("data: {root: a, root: b}\n", ":1: not valid YAML: key 'root' is there twice"),
        ("a: [1\n", "not valid YAML: expected ',' or ']'"),
        ("seed: !!python/name:os.system\n", "not valid YAML: the tag !!python/name:os.system is"),
        ("", "a run file holds keys and values"),
        ("- name\n", "a run file holds keys and values"),
        ("name: x\n", "networks is missing"),
        (MINIMAL + "? [1, 2]\n: 3\n", "not valid YAML: a list or a mapping cannot be a key"),
        (MINIMAL + "on: 3\n", "unknown key on; known keys here: name, description, seed"),
        (MINIMAL + "2001-01-01: 3\n", "unknown key 2001-01-01; known keys here: name"),
        (MINIMAL + "3: 4\n", "unknown key 3; known keys here: name, description, seed"),
    ],
)
def test_message_for_an_invalid_file(run_file: Path, text: str, sentence: str) -> None:
    run_file.write_text(text)
    message = refusal(run_file)
    assert sentence in message
    assert message.startswith(str(run_file))


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no.yaml: cannot be read as a run file: No such" in refusal(tmp_path / "no.yaml")
    assert f"{tmp_path} is a folder; name a run file in it" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    assert "latin.yaml: cannot be read as a run file: not UTF-8" in refusal(tmp_path / "latin.yaml")


def test_unknown_recipe_names_the_nearest_and_all() -> None:
    message = refusal("digits-2t1z")
    assert "did you mean 'digits-2t1s'?" in message
    assert f"(recipes: {', '.join(recipes())})" in message
    assert "did you mean" not in refusal("quite-other")


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError, 2), (NonFiniteError, 3), (PeerError, 4), (CoordinatorError, 4)],
)
def test_exit_codes(error: type[SwitokdError], code: int) -> None:
    assert error.exit_code == code


def test_ranks_of_a_network_need_placement_dedicated(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(UsageError, match=r"networks\.big\.ranks is for placement: dedicated"):
        load(str(path), ["networks.big.ranks=2", "placement=replicated"])


@pytest.mark.parametrize("setting", ["coordinator=off", "coordinator.address=off"])
def test_coordinator_off_is_read(setting: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    config = load(str(path), [setting, "placement=replicated"])
    assert config.coordinator.address == "off"


def test_effective_run_file_names_the_folders_of_own_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    project, cwd, elsewhere = (tmp_path / name for name in ("project", "cwd", "elsewhere"))
    for folder in (project, cwd, elsewhere):
        folder.mkdir()
    (project / "run.yaml").write_text(MINIMAL)
    (project / "lib").mkdir()
    (project / "lib" / "own_nets_here.py").touch()
    own = ["networks.big.model=own_nets_here:build", "import_from=[lib]"]
    monkeypatch.chdir(cwd)
    config = load_importable(str(project / "run.yaml"), own)
    folders = [str(project / "lib"), str(project), str(cwd)]
    assert list(config.import_from) == folders
    assert sys.path[-3:] == folders
    plain = load(str(project / "run.yaml"), own)
    assert config.digest == plain.digest
    assert config.must_agree() == plain.must_agree()  # import_from may differ between machines

    (elsewhere / "config.yaml").write_text(config.dump())
    monkeypatch.chdir(elsewhere)
    again = load_importable(str(elsewhere / "config.yaml"))
    assert list(again.import_from) == [*folders, str(elsewhere)]
    assert load_importable(str(project / "run.yaml")).import_from == ()


def test_a_rank_may_be_number_or_text_but_not_both() -> None:
    """JSON makes the keys of a table text; a table from Python has numbers."""
    assert ranks_of_row({0: 1, "1": 2.5}) == {0: 1.0, 1: 2.5}
    with pytest.raises(ValueError, match="a network's ranks are"):
        ranks_of_row({0: 1, "0": 2})


def test_current_folder_that_was_deleted_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="the current folder was deleted; change to another one"):
        load_importable("digits-1t1s")


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    text = recipe_text("digits-1t1s")
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load(str(file)) == load("digits-1t1s")


@pytest.mark.parametrize("name", ["a" * 300, f"{'a' * 300}.yaml", f"{'a/' * 3000}b.yaml"])
def test_a_name_that_is_too_long_is_one_line(name: str) -> None:
    with pytest.raises(UsageError) as told:
        load(name)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("key", ["name", "networks"])
def test_a_name_too_long_for_a_file_is_refused(key: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    long = "a" * 101
    text = recipe_text("digits-1t1s")
    if key == "name":
        text = text.replace("name: digits-1t1s", f"name: {long}")
    else:
        text = text.replace("  student:", f"  {long}:")
    assert long in text
    file.write_text(text)
    with pytest.raises(UsageError) as told:
        load(str(file))
    assert "100" in str(told.value)
    file.write_text(text.replace(long, long[1:]))
    load(str(file))


def test_names_that_a_file_system_may_confuse_are_refused(run_file: Path) -> None:
    run_file.write_text(MINIMAL.replace("big", "Little"))
    assert "networks: Little and little differ only in the case of letters" in refusal(run_file)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (f"schedule.epochs={10**400}", "schedule.epochs: found a number of 401 digits; allowed: w"),
        (
            f"data={{kwargs: {{a: [1, {-(2**63)}]}}}}",
            "data.kwargs.a.1: found a number of 19 digits",
        ),
        (f"networks.big.optimizer={{name: sgd, lr: {10**400}}}", "lr: found a number of 401 digit"),
        (f"compute.micro_batches={2**40}", "micro_batches: found 1099511627776; allowed: less th"),
        ("networks.big.ranks=1000000000", "ranks: found 1000000000; allowed: less than or equal "),
        ("data.workers=1000000", "data.workers: found 1000000; allowed: less than or equal to 10"),
        ("data.image_size=1000000000", "image_size: found 1000000000; allowed: less than or equ"),
        ("distillation.temperature=1e300", "temperature: found 1e+300; allowed: less than or equ"),
        ("coordinator.timeout=1e300", "coordinator.timeout: found 1e+300; allowed: less than or"),
        ("coordinator.deadline=1e12", "deadline: found 1000000000000.0; allowed: less than or equ"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused(
    run_file: Path, setting: str, sentence: str
) -> None:
    assert sentence in refusal(run_file, setting)
