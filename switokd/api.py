"""Training from Python: `switokd.train` and `switokd.distil`, in a script, notebook or debugger.

Training runs in this process, unless the caller asks for several processes. A run in this process
uses placement=replicated and no coordinator, and trains the same weights. It restores the caller's
signal handlers, random generators and sys.path. Errors are raised (`errors.py`).

Not covered: several machines; live metrics for a run in this process.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from switokd import plugins, worker
from switokd.config.config import Config
from switokd.config.places import RunFileText
from switokd.config.run_file import (
    checked,
    import_folders,
    load,
    with_folders,
)
from switokd.config.yaml_loader import in_one_line
from switokd.data.augment import seeding
from switokd.errors import (
    EXIT_STOPPED,
    NonFiniteError,
    PeerError,
    SwitokdError,
    UsageError,
    own_code_errors,
)
from switokd.runs.run import EMPTY, Run, importing_from
from switokd.runtime.environment import Environment, environment
from switokd.runtime.interpreter import python_command
from switokd.runtime.log import plain_environment
from switokd.training.observer import Observer

CONFIGURATION = RunFileText("the configuration")

Source = str | Path | Mapping[str, Any] | Config
"""Name of a recipe, path of a run file, content of a run file, or a configuration."""

Settings = Mapping[str, Any]
"""Settings by dotted key, as on the command line: {"schedule.epochs": 5}."""


def train(
    source: Source,
    settings: Settings = EMPTY,
    *,
    processes: int | Literal["auto"] | None = None,
    observers: Sequence[Observer] = (),
) -> Run:
    """Train the networks of a recipe, run file, dict or Config; return the finished run.

    settings: replace values of the source. processes: None trains in this process, "auto" starts
    as many processes as `switokd train`, a number starts that many. observers: objects that watch a
    training in this process, besides those that the run file names. Relative folders of import_from
    are relative to the run file, or to the current folder if the source is no file.
    UsageError, NonFiniteError and PeerError as in `errors.py`.
    """
    is_count = type(processes) is int and processes >= 1
    if not (processes is None or processes == "auto" or is_count):
        raise UsageError(f"processes: found {processes!r}; allowed: None, 'auto', 1 or more")
    if observers and processes is not None:
        raise UsageError(
            "observers: an object cannot watch a training in other processes; name its class in "
            "the run file, like observers: [package.module:Class]"
        )
    overrides = [_setting(key, value) for key, value in settings.items()]
    file = Path(source) if isinstance(source, str | Path) else None
    beside = file.resolve().parent if file else Path.cwd()
    config = with_folders(_config(source, overrides), beside)
    _refuse_torchrun()
    if processes is None:
        return _train_here(config, observers=observers)
    if file:
        return Run(_train_in_processes([str(file), *overrides], processes))
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "config.yaml"
        written.write_text(config.dump(), encoding="utf-8")
        return Run(_train_in_processes([str(written)], processes))


def distil(
    *,
    teachers: Mapping[str, Any],
    students: Mapping[str, Any],
    train: Any,
    test: Any,
    classes: int | None = None,
    epochs: int = 10,
    settings: Settings = EMPTY,
    observers: Sequence[Observer] = (),
) -> Run:
    """Train networks and data sets that are Python objects, in this process; return the run.

    teachers, students: by name, a torch.nn.Module, a callable that builds one, or the name of a
    model. Training starts from the weights of a module, and does not change the module itself.
    train, test: map-style data sets of (image, label), as for `data.dataset` of a run file.
    classes: number of classes; None counts the labels. observers: as for `train`.
    UsageError and NonFiniteError as in `errors.py`.
    """
    data = plugins.name_of("data", train)
    lend: dict[str, Any] = {data: plugins.Datasets(train, test, classes)}
    networks: dict[str, dict[str, Any]] = {}
    for role, given in (("teacher", teachers), ("student", students)):
        for name, thing in given.items():
            if name in networks:
                raise UsageError(f"distil: {name!r} is a teacher and a student; name them apart")
            if not isinstance(thing, str) and not callable(thing):
                raise UsageError(
                    f"distil: {role} {name!r} is a {type(thing).__name__}; allowed: a "
                    "torch.nn.Module, a callable that makes one, or the name of a model"
                )
            model = thing if isinstance(thing, str) else plugins.name_of(name, thing)
            networks[name] = {"role": role, "model": model}
            lend[model] = thing
    raw = {
        "name": "distil",
        "data": {"dataset": data},
        "networks": networks,
        "schedule": {"epochs": epochs},
    }
    overrides = [_setting(key, value) for key, value in settings.items()]
    config = checked(raw, RunFileText("distil"), overrides, "settings")
    _refuse_torchrun()
    return _train_here(with_folders(config, Path.cwd()), lend, observers)


def _config(source: Source, overrides: Sequence[str]) -> Config:
    if isinstance(source, str | Path):
        return load(str(source), overrides, "settings")
    if isinstance(source, Config):
        return checked(source.model_dump(mode="json"), CONFIGURATION, overrides, "settings")
    return checked(copy.deepcopy(dict(source)), CONFIGURATION, overrides, "settings")


def _setting(key: str, value: Any) -> str:
    """Format a setting as on the command line, in YAML."""

    def plain(other: Any) -> Any:  # for numbers of NumPy and PyTorch, and for paths
        return other.item() if hasattr(other, "item") else str(other)

    # By way of JSON, which has no types but those of YAML.
    return f"{key}={in_one_line(json.loads(json.dumps(value, default=plain)))}"


def _refuse_torchrun() -> None:
    if environment().world_size > 1:
        raise UsageError(
            "switokd.train and switokd.distil cannot run in a process of torchrun; they train in "
            "one process or start several themselves. With torchrun, start "
            "-m switokd.train RECIPE_OR_FILE"
        )


def _refuse_untrained(config: Config, lend: Mapping[str, Any]) -> None:
    """Raise UsageError if the strategy freezes its teachers, and a callable builds one of them."""
    if not config.method.strategy.frozen_teachers:
        return
    for name in config.topology.teachers:
        network = config.networks[name]
        thing = lend.get(network.model)
        if thing is not None and network.weights is None and not isinstance(thing, nn.Module):
            raise UsageError(
                f"distil: strategy {config.distillation.strategy} does not train its teachers, "
                f"and {name!r} is a callable; give a trained torch.nn.Module"
            )


def _train_here(
    config: Config, lend: Mapping[str, Any] = EMPTY, observers: Sequence[Observer] = ()
) -> Run:
    """Train in this process."""
    if config.coordinator.address not in ("auto", "off"):
        raise UsageError(
            f"coordinator.address: {config.coordinator.address}, but a run in this process decides "
            "by itself; give processes=1 or more"
        )
    # networks.NAME.ranks requires placement: dedicated, and the auto settings placement: auto.
    single = ["placement=replicated", "auto={}", "coordinator.address=off"]
    single += [f"networks.{name}.ranks=1" for name in config.networks]
    config = checked(
        config.model_dump(mode="json"), RunFileText(config.name), single, "a run in this process"
    )
    folders = import_folders(config, Path.cwd())
    with (
        _random_generators_restored(),
        plugins.lend(lend),
        importing_from(folders),
        own_code_errors(),
    ):
        _refuse_untrained(config, lend)
        path = worker.train(config, Environment(embedded=True), worker.Helpers(observers=observers))
    assert path is not None, "one process, which is rank 0"
    return Run(path, lend)


@contextmanager
def _random_generators_restored() -> Iterator[None]:
    """Restore the default random generators of Python, numpy and PyTorch after the body."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with seeding(), torch.random.fork_rng(devices=list(gpus)):
        yield


def _train_in_processes(arguments: Sequence[str], processes: int | Literal["auto"]) -> Path:
    """Run `switokd train`, print its output, and return the run folder.

    The command runs in a new process, because it changes signal handlers and the environment.
    Raises the error that the command reports.
    """
    command = [*python_command("switokd"), "train", *arguments]
    command += [] if processes == "auto" else [f"--processes={processes}"]
    path = ""
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=plain_environment(),
        ) as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                print(line, end="")
                if line.startswith("run folder"):
                    path = line.removeprefix("run folder").strip()
            code = child.wait()
        except (
            BaseException
        ):  # Ctrl-C, or an interrupt of a notebook, which reaches only this process
            child.terminate()
            child.wait()
            raise
        errors.seek(0)
        said = errors.read()
    if code:
        raise _error(code, said)
    sys.stderr.write(said)
    return Path(path)


def _error(code: int, said: str) -> SwitokdError:
    """Return the exception for a failed `switokd train`, from its exit code and its messages.

    said: standard error of the command. The exit codes are in `errors.py`.
    """
    kinds = {2: UsageError, 3: NonFiniteError, 4: PeerError, EXIT_STOPPED: SwitokdError}
    ours = [line for line in said.splitlines() if line.startswith("switokd: ")]
    if code in kinds and ours:
        return kinds[code](ours[-1].removeprefix("switokd: "))
    sys.stderr.write(said)  # a traceback
    return SwitokdError(f"switokd train ended with exit code {code}; standard error says why")
