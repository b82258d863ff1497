"""All objects of a run: put together, and written as YAML.

Not covered: the single objects (the modules of their names).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from switokd.config.config import Config
from switokd.config.run_file import load, load_importable
from switokd.deploying.coordinator import coordinator
from switokd.deploying.facts import TLS, RunFacts, facts_of, trackers_with_server
from switokd.deploying.monitoring import monitoring
from switokd.deploying.network_policies import network_policies
from switokd.deploying.options import RenderOptions, in_gibibytes
from switokd.deploying.pods import Manifest
from switokd.deploying.settings import extras_in_image, modules_in_image, with_arguments
from switokd.deploying.storage import claims, run_file, secrets
from switokd.deploying.workers import workers
from switokd.errors import UsageError
from switokd.runtime.durable import replace_file

COMMENTS = {
    "coordinator.yaml": "The coordinator, which decides who pauses; its journal outlives its pod.",
    "workers.yaml": "The ranks. Lost pods are made anew, and continue the run from its checkpoint.",
    "run-file.yaml": "The run file, and modules that it names.",
    "volumes.yaml": "Volumes. 'kubectl delete -k' deletes them too, and with them the results.",
    "network-policies.yaml": "Who may connect to whom; everything else is denied.",
    "monitoring.yaml": "For the Prometheus Operator: where the metrics are, and the alerts.",
    "secrets.yaml": "SECRET: private keys and tokens. Never commit this file.",
}
"""First line of each file."""


class Rendered(NamedTuple):
    """The manifests of a run."""

    files: dict[str, list[Manifest]]
    """By name of a file: its objects."""
    notes: tuple[str, ...]
    """What the user should know or do."""


def render(recipe: str, settings: Sequence[str], options: RenderOptions) -> Rendered:
    """Return the manifests that a run needs.

    recipe: a recipe or the path of a run file. UsageError, with a line per problem, if options, run
    file and settings are not valid or do not fit together.
    """
    config = _checked(recipe, settings, options)
    facts = with_arguments(facts_of(config, options), config, recipe, settings)
    load(recipe, facts.arguments[1:])  # the settings that this module adds are checked, too
    facts, gpu_memory = _with_memory(facts, config)
    files = {
        "coordinator.yaml": coordinator(facts),
        "workers.yaml": workers(facts),
        "run-file.yaml": run_file(facts),
        "volumes.yaml": claims(facts),
        "network-policies.yaml": network_policies(facts),
        "monitoring.yaml": monitoring(facts),
        "secrets.yaml": secrets(facts),
    }
    found = {name: objects for name, objects in files.items() if objects}
    return Rendered(found, tuple(_notes(facts, config, recipe, gpu_memory)))


def _checked(recipe: str, settings: Sequence[str], options: RenderOptions) -> Config:
    """Return the configuration; UsageError with all problems of options and run file."""
    problems = options.problems()
    # Another coordinator's address is allowed with TLS only, or with allow_plaintext.
    with_tls = [f"coordinator.tls.ca={TLS}/ca.crt"] if options.tls.tls else []
    try:
        config = load_importable(recipe, [*settings, *with_tls])
    except UsageError as error:
        if not problems:
            raise
        problems += str(error).splitlines()
    if problems:
        raise UsageError("\n".join(problems))
    return config


def _with_memory(facts: RunFacts, config: Config) -> tuple[RunFacts, float | None]:
    """Return the facts with the memory of a pod, and the GiB that a GPU must hold if estimated."""
    shm, given = facts.shape.ranks_per_pod, facts.options.pods.memory
    if given:
        most = math.ceil(in_gibibytes(given)) + shm
        return replace(facts, memory=(given, f"{most}Gi"), shm=shm), None
    from switokd.deploying.estimate import estimate

    estimated = estimate(config, facts.shape)
    requested = math.ceil(estimated.pod)
    gpu = estimated.gpu if facts.shape.gpus_per_pod else None
    memory = f"{requested}Gi", f"{2 * requested + shm}Gi"
    return replace(facts, memory=memory, shm=shm), gpu


def _notes(facts: RunFacts, config: Config, recipe: str, gpu_memory: float | None) -> list[str]:
    """Return what the user should know or do, one sentence each."""
    shape, options = facts.shape, facts.options
    gpus = f", {shape.gpus_per_pod} GPU{'s' * (shape.gpus_per_pod > 1)} each"
    what = gpus if shape.gpus_per_pod else ", no GPU (--gpus-per-pod)"
    pods = f"{shape.pods} pod{'s' * (shape.pods > 1)} of {shape.ranks_per_pod} rank"
    notes = [f"{pods}{'s' * (shape.ranks_per_pod > 1)}{what}: {facts.placement}"]
    if gpu_memory:
        notes.append(f"a GPU must hold about {gpu_memory:.1f} GiB (estimated)")
    if options.tls.tls and not options.tls.secrets_from:
        named = [f"{facts.name}-worker"]
        named += [facts.coordinator_name] if facts.has_coordinator else []
        notes.append(f"make the Secrets {' and '.join(named)}; see docs/kubernetes.md")
    if missing := modules_in_image(config, Path(recipe)):
        notes.append(f"the image must have your modules: {', '.join(missing)}")
    if extras := extras_in_image(config):
        notes.append(
            f"the image must have the packages of switokd[{','.join(extras)}]; see "
            "docs/operations.md#containers"
        )
    paths = [f"networks.{n}.weights={w.weights}" for n, w in config.networks.items() if w.weights]
    paths += [f"auto.profiles={path}" for path in config.auto.profiles]
    if paths:
        notes.append(f"these files must be in the pods by these names: {', '.join(paths)}")
    if sending := trackers_with_server(config):
        notes.append(
            "the pods may not reach your server: add an egress rule, and the environment that it "
            f"needs, for {', '.join(sending.values())}; see docs/kubernetes.md"
        )
    return notes


class _ManifestDumper(yaml.SafeDumper):
    """Writes text of several lines as it is, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: the same labels are written out each time."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_ManifestDumper.add_representer(str, _text)


def as_yaml(objects: Sequence[Manifest]) -> str:
    """Return objects as YAML documents."""
    return "---\n".join(
        yaml.dump(each, Dumper=_ManifestDumper, sort_keys=False, width=100, allow_unicode=True)
        for each in objects
    )


def as_one(rendered: Rendered) -> str:
    """Return all objects as one text; UsageError if there are Secrets, which are not printed."""
    if "secrets.yaml" in rendered.files:
        raise UsageError("--secrets-from: Secrets are not printed; name a folder with --output")
    return "---\n".join(
        f"# {COMMENTS[name]}\n{as_yaml(objects)}" for name, objects in rendered.files.items()
    )


def write(rendered: Rendered, folder: Path, command: str) -> None:
    """Write the files and a kustomization.yaml; UsageError if the folder cannot be written.

    Files of an earlier rendering that are no longer needed are removed. command: for the comment.
    """
    texts = {
        name: f"# {COMMENTS[name]}\n{as_yaml(objects)}" for name, objects in rendered.files.items()
    }
    resources = [name for name in texts if name != "secrets.yaml"]
    texts["kustomization.yaml"] = (
        f"# Written by: {command}\n# Secrets are applied by themselves: kubectl apply -f.\n"
        + as_yaml(
            [
                {
                    "apiVersion": "kustomize.config.k8s.io/v1beta1",
                    "kind": "Kustomization",
                    "resources": resources,
                }
            ]
        )
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in COMMENTS.keys() - texts.keys():
            (folder / name).unlink(missing_ok=True)
        for name, text in texts.items():
            mode = 0o600 if name == "secrets.yaml" else 0o644
            replace_file(folder / name, text.encode(), mode)
    except OSError as error:
        raise UsageError(
            f"--output: {folder} cannot be written: {os.strerror(error.errno or 0)}"
        ) from None
