"""The pod of the workers: one or several ranks of the run, all pods alike.

Rank and role follow from the completion index. The pod has no privileges, a read-only root, and
probes that look at the files of `runtime/heartbeat_file.py`.

Not covered: the Job around it (`workers.py`).
"""

from __future__ import annotations

from typing import Any

from switokd.deploying.facts import (
    DATA,
    HEARTBEATS,
    MASTER_PORT,
    RUN_FILE,
    RUNS,
    TLS,
    TMP,
    USER,
    RunFacts,
)
from switokd.runtime.heartbeat_file import FOLDER, name_of

INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
TMP_SIZE = "10Gi"
"""Most that may lie in /tmp, which is on the node's disk: caches, compiled code, copies."""
GRACE_SECONDS = 60
"""The ranks end their step and save a checkpoint, for which they have 20 s."""
STARTUP_SECONDS = 600
"""How long a pod may take until its ranks have read the run file."""

Manifest = dict[str, Any]


def worker_pod(run: RunFacts) -> Manifest:
    """Return the pod template of the workers."""
    labels = run.labels_of("worker")
    spec: Manifest = {
        "restartPolicy": "Never",  # as podFailurePolicy needs it; the Job makes new pods
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": False,
        # Otherwise every Service becomes SWITOKD_..._PORT in the environment.
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "affinity": _one_zone(labels),
        "topologySpreadConstraints": [_spread(labels)],
        "containers": [_container(run)],
        "volumes": _volumes(run),
    }
    if run.options.flavor == "job":  # JobSet sets it by itself
        spec["subdomain"] = run.workers_name
    if run.shape.gpus_per_pod:
        # GPU nodes are commonly tainted with the resource's name.
        spec["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    annotations = {"switokd/placement": run.placement}
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}


def pod_security() -> Manifest:
    """Return the security context of a pod: the user of the images, who is not root."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Manifest:
    """Return the security context of a container: no privilege, nothing to write to."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _container(run: RunFacts) -> Manifest:
    module = "switokd.train" if run.shape.ranks_per_pod == 1 else "switokd.cli.pod_ranks"
    return {
        "name": run.worker_container,
        "image": run.options.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-u", "-m", module],
        "args": list(run.arguments),
        "env": _environment(run),
        "ports": [{"name": "rendezvous", "containerPort": MASTER_PORT, "protocol": "TCP"}],
        **_probes(run),
        "resources": _resources(run),
        "securityContext": container_security(),
        "volumeMounts": _mounts(run),
    }


def _environment(run: RunFacts) -> list[Manifest]:
    """Return what torchrun would set; with several ranks in a pod, what `pod_ranks.py` reads."""
    shape = run.shape
    is_single = shape.ranks_per_pod == 1
    index = {"valueFrom": {"fieldRef": {"fieldPath": INDEX}}}
    values = {
        "WORLD_SIZE": str(shape.world_size),
        **({"LOCAL_RANK": "0"} if is_single else {}),
        "LOCAL_WORLD_SIZE": str(shape.ranks_per_pod),
        "MASTER_ADDR": run.host_of_pod(0),
        "MASTER_PORT": str(MASTER_PORT),
        # Threads of a rank.
        "OMP_NUM_THREADS": str(run.options.pods.cpus_per_rank),
        "MPLCONFIGDIR": f"{TMP}/matplotlib",
        "XDG_CACHE_HOME": f"{TMP}/cache",
        FOLDER: HEARTBEATS,
        **({"MLFLOW_TRACKING_URI": f"file://{RUNS}/mlruns"} if run.has_mlflow_files else {}),
    }
    named = [{"name": name, "value": value} for name, value in values.items()]
    return [{"name": "RANK" if is_single else "NODE_RANK", **index}, *named]


def _probes(run: RunFacts) -> Manifest:
    """Return probes that look at the ranks' files: all there, then none of them old.

    A file is old when its rank could not run for longer than coordinator.timeout, and 60 s.
    """
    old = max(60, int(run.timeout))
    find = f"find {HEARTBEATS} -name '{name_of('*')}'"
    all_there = f'test "$({find} | wc -l)" -ge {run.shape.ranks_per_pod}'
    none_old = f"test -z \"$({find} ! -newermt '-{old} seconds')\""
    return {
        "startupProbe": {
            "exec": {"command": ["sh", "-c", all_there]},
            "periodSeconds": 5,
            "failureThreshold": STARTUP_SECONDS // 5,
            "timeoutSeconds": 5,
        },
        "livenessProbe": {
            "exec": {"command": ["sh", "-c", none_old]},
            "periodSeconds": 20,
            "failureThreshold": 3,
            "timeoutSeconds": 10,
        },
    }


def _resources(run: RunFacts) -> Manifest:
    shape, (requested, most) = run.shape, run.memory
    cpus = shape.ranks_per_pod * (run.options.pods.cpus_per_rank + run.loader_processes)
    limits: Manifest = {"memory": most}
    if shape.gpus_per_pod:
        limits["nvidia.com/gpu"] = shape.gpus_per_pod
    return {"requests": {"cpu": str(cpus), "memory": requested}, "limits": limits}


def _mounts(run: RunFacts) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "runs", "mountPath": RUNS},
        {"name": "tmp", "mountPath": TMP},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if run.has_data:
        read_only = {} if run.downloads else {"readOnly": True}
        mounts.append({"name": "data", "mountPath": DATA, **read_only})
    if run.run_files:
        mounts.append({"name": "run-file", "mountPath": RUN_FILE, "readOnly": True})
    if run.options.tls.tls:
        mounts.append({"name": "tls", "mountPath": TLS, "readOnly": True})
    return mounts


def _volumes(run: RunFacts) -> list[Manifest]:
    """Return the volumes. What is in /dev/shm counts against the memory limit.

    The runtime's own /dev/shm holds 64 MiB, too little for loader processes and NCCL.
    """
    claims = run.options.volumes
    volumes: list[Manifest] = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": runs_claim(run)}},
        {"name": "tmp", "emptyDir": {"sizeLimit": TMP_SIZE}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{run.shm}Gi"}},
    ]
    if run.has_data:
        claim: Manifest = {"claimName": claims.data_claim or f"{run.name}-data"}
        if not run.downloads:
            claim["readOnly"] = True
        volumes.append({"name": "data", "persistentVolumeClaim": claim})
    if run.run_files:
        volumes.append({"name": "run-file", "configMap": {"name": f"{run.name}-run"}})
    if run.options.tls.tls:
        volumes.append(secret_volume(f"{run.name}-worker"))
    return volumes


def runs_claim(run: RunFacts) -> str:
    """Return the name of the claim on the volume of results."""
    return run.options.volumes.runs_claim or f"{run.name}-runs"


def secret_volume(name: str) -> Manifest:
    """Return the volume `tls` with the files of a Secret, which only the pod's group may read."""
    return {"name": "tls", "secret": {"secretName": name, "defaultMode": 0o440}}


def _spread(labels: dict[str, str]) -> Manifest:
    """Return the wish for pods on nodes of their own, where there are enough."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels},
    }


def _one_zone(labels: dict[str, str]) -> Manifest:
    """Return the wish for pods in one zone: the logits of every step travel between them."""
    term = {
        "labelSelector": {"matchLabels": labels},
        "topologyKey": "topology.kubernetes.io/zone",
    }
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
