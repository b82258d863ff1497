"""What makes the workers' pods: a Job, a JobSet, or a TrainJob with its TrainingRuntime.

New pods continue the run in its folder (resume=auto). What counts as a failure:

    exit code 2, 3, 6   a mistake, a network that diverged, `switokd stop`: the same again
    143, an eviction    not counted: the ranks have saved a checkpoint, and go on in new pods
    any other code      counted, as 4 (a lost rank), 1 (a fault), 137 (out of memory)

Not covered: the pod itself (`pods.py`).
"""

from __future__ import annotations

from switokd.deploying.facts import MASTER_PORT, RunFacts
from switokd.deploying.pods import Manifest, worker_pod
from switokd.errors import EXIT_STOPPED, EXIT_TERMINATED, NonFiniteError, UsageError

RESTARTS = 3
"""Starts of the whole run after lost pods, before the run has failed."""

TTL_SECONDS = 86_400
"""How long a finished Job and its logs stay."""


def workers(run: RunFacts) -> list[Manifest]:
    """Return the objects that run the ranks, and the Service that names their pods."""
    if run.options.flavor == "job":
        return [_job(run), _service(run)]
    if run.options.flavor == "jobset":
        return [_job_set(run)]
    return [_training_runtime(run), _train_job(run)]


def _job(run: RunFacts) -> Manifest:
    # A lost rank ends all pods of the run.
    spec = _job_spec(run, RESTARTS * run.shape.pods)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": run.metadata(run.workers_name, "worker"),
        "spec": {**spec, "ttlSecondsAfterFinished": TTL_SECONDS},
    }


def _job_spec(run: RunFacts, backoff_limit: int) -> Manifest:
    return {
        "completionMode": "Indexed",
        "completions": run.shape.pods,
        "parallelism": run.shape.pods,
        "backoffLimit": backoff_limit,
        "podFailurePolicy": {"rules": _failure_rules(run.worker_container)},
        "template": worker_pod(run),
    }


def _failure_rules(container: str) -> list[Manifest]:
    """Return what a Job does about a pod that has failed; see the module's docstring."""
    final = sorted((UsageError.exit_code, NonFiniteError.exit_code, EXIT_STOPPED))
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return [
        {"action": "FailJob", "onExitCodes": _codes(container, final)},
        {"action": "Ignore", "onPodConditions": disrupted},
        {"action": "Ignore", "onExitCodes": _codes(container, [EXIT_TERMINATED])},
    ]


def _codes(container: str, values: list[int]) -> Manifest:
    return {"containerName": container, "operator": "In", "values": values}


def _service(run: RunFacts) -> Manifest:
    """Return the headless Service: with it each pod has the name JOB-INDEX.SERVICE.

    Ranks find each other before they are ready, and on ports of their own choosing.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": run.metadata(run.workers_name, "worker"),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": run.labels_of("worker"),
            "ports": [{"name": "rendezvous", "port": MASTER_PORT}],
        },
    }


def _job_set_spec(run: RunFacts, replicated: Manifest) -> Manifest:
    """Return the specification of a JobSet: a lost pod starts all of them again.

    The JobSet makes the headless Service, by the name of the subdomain.
    """
    return {
        "network": {
            "enableDNSHostnames": True,
            "publishNotReadyAddresses": True,
            "subdomain": run.workers_name,
        },
        "failurePolicy": {
            "maxRestarts": RESTARTS,
            "rules": [
                {
                    "name": "mistake",
                    "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }
            ],
        },
        "replicatedJobs": [replicated],
    }


def _job_set(run: RunFacts) -> Manifest:
    replicated = {"name": "workers", "replicas": 1, "template": {"spec": _job_spec(run, 0)}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": run.metadata(run.name, "worker"),
        "spec": {**_job_set_spec(run, replicated), "ttlSecondsAfterFinished": TTL_SECONDS},
    }


def _training_runtime(run: RunFacts) -> Manifest:
    """Return the TrainingRuntime: Kubeflow's controller makes a JobSet of it for a TrainJob."""
    template = {
        "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
        "spec": _job_spec(run, 0),
    }
    replicated = {"name": "node", "replicas": 1, "template": template}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": run.metadata(run.name, "worker"),
        "spec": {
            "mlPolicy": {"numNodes": run.shape.pods},
            "template": {"spec": _job_set_spec(run, replicated)},
        },
    }


def _train_job(run: RunFacts) -> Manifest:
    reference = {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": run.name,
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": run.metadata(run.name, "worker"),
        "spec": {"runtimeRef": reference},
    }
