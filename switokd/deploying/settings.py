"""The arguments of the ranks in their pods, and the files that a run file brings along.

Not covered: reading a run file (`config/run_file.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from switokd.config.config import Config
from switokd.config.recipes import recipes
from switokd.config.yaml_loader import in_one_line
from switokd.deploying.facts import DATA, GRPC_PORT, RUN_FILE, RUNS, TLS, RunFacts
from switokd.errors import UsageError
from switokd.plugins import TIMM

_REPLACED = ("run_dir", "resume", "data.root")
"""Settings whose values follow from the volumes."""

MOST_BYTES = 1_000_000
"""Size of a ConfigMap: Kubernetes takes 1 MiB."""


def with_arguments(
    facts: RunFacts, config: Config, recipe: str, settings: Sequence[str]
) -> RunFacts:
    """Return the facts with the arguments of the ranks and the files of the run.

    recipe, settings: as the user has given them. UsageError if they contradict the pods' volumes.
    """
    given = [word for word in settings if word.partition("=")[0] not in _REPLACED]
    if "resume=never" in settings:
        raise UsageError(
            "resume=never: a pod that is replaced has to continue the run; leave resume out"
        )
    words = [*given, *_coordinator(facts), f"run_dir={_text(_run_dir(config))}", "resume=auto"]
    if facts.has_data:
        words.append(f"data.root={_text(_data_root(config))}")
    if recipe in recipes() and not os.path.isfile(recipe):
        return replace(facts, arguments=(recipe, *words))
    arguments = (f"{RUN_FILE}/run.yaml", *words)
    return replace(facts, arguments=arguments, run_files=_files(config, Path(recipe)))


def own_modules(config: Config) -> list[str]:
    """Return the top-level modules of the user that the run file names."""
    return sorted({text.partition(":")[0].partition(".")[0] for _, text in config.own_modules})


def extras_in_image(config: Config) -> list[str]:
    """Return the extras of switokd that the run needs, and deploy/Containerfile lacks."""
    wanted = {"mlflow", "tensorboard", "wandb"} & set(config.observers)
    if config.data.dataset == "huggingface":
        wanted.add("huggingface")
    if any(network.model.startswith(TIMM) for network in config.networks.values()):
        wanted.add("timm")
    return sorted(wanted)


def modules_in_image(config: Config, run_file: Path) -> list[str]:
    """Return the user's modules that are no single file beside the run file."""
    return [name for name in own_modules(config) if not (run_file.parent / f"{name}.py").is_file()]


def _files(config: Config, run_file: Path) -> tuple[tuple[str, str], ...]:
    """Return the run file and the modules beside it; UsageError if they are too large."""
    paths = {"run.yaml": run_file}
    for name in own_modules(config):
        path = run_file.parent / f"{name}.py"
        if path.is_file():
            paths[path.name] = path
    files = tuple((name, path.read_text(encoding="utf-8")) for name, path in paths.items())
    if (size := sum(len(text.encode()) for _, text in files)) > MOST_BYTES:
        raise UsageError(
            f"{run_file}: with its modules it has {size} bytes, and a ConfigMap holds "
            f"{MOST_BYTES}; put the modules into the image"
        )
    return files


def _coordinator(facts: RunFacts) -> list[str]:
    """Return the settings with which the ranks find the coordinator."""
    if facts.coordinator == "off":
        return []
    address = facts.coordinator
    if facts.has_coordinator:
        address = f"{facts.coordinator_name}:{GRPC_PORT}"
    words = [f"coordinator.address={address}"]
    if facts.options.tls.tls:
        words += [f"coordinator.tls.ca={TLS}/ca.crt", f"coordinator.token_file={TLS}/token"]
    elif facts.has_coordinator:
        words.append("coordinator.allow_plaintext=true")
    return words


def _run_dir(config: Config) -> str:
    """Return the run's folder on the volume of results."""
    return _inside(RUNS, config.run_dir or config.name, "run_dir")


def _data_root(config: Config) -> str:
    """Return the folder of the data set on its volume; a relative one is that of this machine."""
    root = config.data.root
    return _inside(DATA, root, "data.root") if root.startswith(DATA) else DATA


def _inside(folder: str, path: str, setting: str) -> str:
    """Return a path inside a folder, to which a relative one belongs."""
    joined = PurePosixPath(os.path.normpath(f"{folder}/{path}" if path[:1] != "/" else path))
    if PurePosixPath(folder) not in joined.parents and (folder == RUNS or str(joined) != folder):
        raise UsageError(f"{setting}: found {path}; in the pods it must be inside {folder}")
    return str(joined)


def _text(path: str) -> str:
    return in_one_line(path)
