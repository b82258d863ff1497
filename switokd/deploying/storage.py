"""Volume claims, the ConfigMap of a run file, and Secrets with certificates and tokens.

Not covered: making certificates (`switokd certificates`).
"""

from __future__ import annotations

from pathlib import Path

from switokd.deploying.coordinator import journal_claim
from switokd.deploying.facts import RunFacts
from switokd.deploying.pods import Manifest, runs_claim
from switokd.errors import UsageError

COORDINATOR_FILES = {
    "tls.crt": "server.crt",
    "tls.key": "server.key",
    "worker": "worker.token",
    "operator": "operator.token",
}
WORKER_FILES = {"ca.crt": "ca.crt", "token": "worker.token"}
"""Keys of the two Secrets, and the files of `switokd certificates` that they hold."""


def claims(run: RunFacts) -> list[Manifest]:
    """Return the volume claims that the user has not named.

    Rank 0 alone writes results, but pods are all alike and may be on several nodes: with more than
    one pod the storage class must offer ReadWriteMany.
    """
    volumes = run.options.volumes
    shared = "ReadWriteOnce" if run.shape.pods == 1 else "ReadWriteMany"
    found = []
    if not volumes.runs_claim:
        found.append(_claim(run, runs_claim(run), shared, volumes.runs_size))
    if run.has_data and not volumes.data_claim:
        found.append(_claim(run, f"{run.name}-data", shared, volumes.data_size))
    if run.has_coordinator:
        found.append(_claim(run, journal_claim(run), "ReadWriteOnce", volumes.journal_size))
    return found


def _claim(run: RunFacts, name: str, mode: str, size: str) -> Manifest:
    spec: Manifest = {"accessModes": [mode], "resources": {"requests": {"storage": size}}}
    if run.options.volumes.storage_class:
        spec["storageClassName"] = run.options.volumes.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": run.metadata(name),
        "spec": spec,
    }


def run_file(run: RunFacts) -> list[Manifest]:
    """Return the ConfigMap with the run file and its modules; nothing for a recipe."""
    if not run.run_files:
        return []
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": run.metadata(f"{run.name}-run"),
            "data": dict(run.run_files),
        }
    ]


def secrets(run: RunFacts) -> list[Manifest]:
    """Return the Secrets made from a folder of `switokd certificates`; nothing without one.

    UsageError if a file is missing.
    """
    folder = run.options.tls.secrets_from
    if folder is None:
        return []
    made = [_secret(run, f"{run.name}-worker", folder, WORKER_FILES)]
    if run.has_coordinator:
        made.append(_secret(run, run.coordinator_name, folder, COORDINATOR_FILES))
    return made


def _secret(run: RunFacts, name: str, folder: Path, files: dict[str, str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": run.metadata(name),
        "type": "Opaque",
        "stringData": {key: _content(run, folder / file) for key, file in files.items()},
    }


def _content(run: RunFacts, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UsageError(
            f"--secrets-from: {path} cannot be read: {reason}; 'switokd certificates "
            f"{path.parent} --host {run.coordinator_name}' makes the files"
        ) from None
