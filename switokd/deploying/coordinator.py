"""The coordinator's objects: Deployment and Service.

Not covered: the volume of its journal (`storage.py`).
"""

from __future__ import annotations

from switokd.deploying.facts import GRPC_PORT, HTTP_PORT, JOURNAL, TLS, TMP, RunFacts
from switokd.deploying.pods import Manifest, container_security, pod_security, secret_volume

CLAIM = "journal"
TMP_SIZE = "256Mi"
"""Most that may lie in /tmp, which is on the node's disk: SQLite's own files."""


def coordinator(run: RunFacts) -> list[Manifest]:
    """Return Deployment and Service; nothing if the run uses another coordinator, or none."""
    return [_deployment(run), _service(run)] if run.has_coordinator else []


def journal_claim(run: RunFacts) -> str:
    """Return the name of the claim on the journal's volume."""
    return f"{run.name}-{CLAIM}"


def _deployment(run: RunFacts) -> Manifest:
    labels = run.labels_of("coordinator")
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": run.metadata(run.coordinator_name, "coordinator"),
        "spec": {
            # The journal belongs to one process: never a second one beside it, not even
            # during a rollout.
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels, **_annotations(run)},
                "spec": {
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "securityContext": pod_security(),
                    "containers": [_container(run)],
                    "volumes": _volumes(run),
                },
            },
        },
    }


def _annotations(run: RunFacts) -> Manifest:
    """Return what a Prometheus without operator looks for."""
    if run.options.monitoring.operator:
        return {}
    scheme = {"prometheus.io/scheme": "https"} if run.options.tls.tls else {}
    annotations = {"scrape": "true", "port": str(HTTP_PORT), "path": "/metrics"}
    named = {f"prometheus.io/{key}": value for key, value in annotations.items()}
    return {"annotations": {**named, **scheme}}


def _container(run: RunFacts) -> Manifest:
    return {
        "name": "coordinator",
        "image": run.options.coordinator_image or run.options.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["switokd", "coordinator"],
        "args": _arguments(run),
        "ports": [
            {"name": "grpc", "containerPort": GRPC_PORT},
            {"name": "http", "containerPort": HTTP_PORT},
        ],
        **_probes(run),
        "resources": {
            "requests": {"cpu": "250m", "memory": "128Mi"},
            "limits": {"memory": "512Mi"},
        },
        "securityContext": container_security(),
        "volumeMounts": _mounts(run),
    }


def _arguments(run: RunFacts) -> list[str]:
    words = ["--host=0.0.0.0", f"--port={GRPC_PORT}", f"--http-port={HTTP_PORT}"]
    words.append(f"--journal={JOURNAL}/journal.db")
    if run.traces_every:
        words.append(f"--traces-every={run.traces_every}")
    if not run.options.tls.tls:
        return [*words, "--allow-plaintext"]
    return [
        *words,
        f"--tls-certificate={TLS}/tls.crt",
        f"--tls-key={TLS}/tls.key",
        f"--worker-token-file={TLS}/worker",
        f"--operator-token-file={TLS}/operator",
    ]


def _probes(run: RunFacts) -> Manifest:
    """Return probes: gRPC health asks the server that the ranks depend on.

    A gRPC probe cannot speak TLS. Liveness is slower to act than readiness.
    """
    check: Manifest = {"grpc": {"port": GRPC_PORT}}
    if run.options.tls.tls:
        check = {"httpGet": {"path": "/healthz", "port": HTTP_PORT, "scheme": "HTTPS"}}
    return {
        "readinessProbe": {**check, "periodSeconds": 5},
        "livenessProbe": {
            **check,
            "initialDelaySeconds": 10,
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
    }


def _mounts(run: RunFacts) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "journal", "mountPath": JOURNAL},
        {"name": "tmp", "mountPath": TMP},
    ]
    if run.options.tls.tls:
        # The whole folder: a single file would never be replaced.
        mounts.append({"name": "tls", "mountPath": TLS, "readOnly": True})
    return mounts


def _volumes(run: RunFacts) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "journal", "persistentVolumeClaim": {"claimName": journal_claim(run)}},
        {"name": "tmp", "emptyDir": {"sizeLimit": TMP_SIZE}},
    ]
    if run.options.tls.tls:
        volumes.append(secret_volume(run.coordinator_name))
    return volumes


def _service(run: RunFacts) -> Manifest:
    labels = run.labels_of("coordinator")
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": run.metadata(run.coordinator_name, "coordinator"),
        "spec": {
            "selector": labels,
            "ports": [
                {"name": "grpc", "port": GRPC_PORT, "targetPort": "grpc"},
                {"name": "http", "port": HTTP_PORT, "targetPort": "http"},
            ],
        },
    }
