"""Objects of the Prometheus Operator: where the metrics are, and the alerts.

The alerts are those of deploy/prometheus/alerts.yml, which is part of the package.

Not covered: a Prometheus without operator, which finds the coordinator by its annotations.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from switokd.deploying.facts import RunFacts
from switokd.deploying.pods import Manifest


def monitoring(run: RunFacts) -> list[Manifest]:
    """Return PodMonitor and PrometheusRule; nothing without operator or coordinator."""
    if not run.options.monitoring.operator or not run.has_coordinator:
        return []
    return [_pod_monitor(run), _rule(run)]


def alert_groups() -> list[dict[str, Any]]:
    """Return the groups of alerts."""
    text = (resources.files("switokd.deploying") / "alerts.yaml").read_text(encoding="utf-8")
    groups: list[dict[str, Any]] = yaml.safe_load(text)["groups"]
    return groups


def _metadata(run: RunFacts, name: str) -> dict[str, object]:
    """Return metadata with the labels by which the operator's Prometheus selects its objects."""
    selected = dict(label.split("=") for label in run.options.monitoring.labels)
    return {**run.metadata(name), "labels": {**run.labels, **selected}}


def _pod_monitor(run: RunFacts) -> Manifest:
    endpoint: Manifest = {"port": "http", "path": "/metrics", "interval": "15s"}
    if run.options.tls.tls:
        authority = {"secret": {"name": f"{run.name}-worker", "key": "ca.crt"}}
        name = run.coordinator_name
        endpoint |= {"scheme": "https", "tlsConfig": {"ca": authority, "serverName": name}}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _metadata(run, run.coordinator_name),
        "spec": {
            "jobLabel": "app.kubernetes.io/name",  # the alerts ask for job="switokd"
            "selector": {"matchLabels": run.labels_of("coordinator")},
            "podMetricsEndpoints": [endpoint],
        },
    }


def _rule(run: RunFacts) -> Manifest:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": _metadata(run, f"{run.name}-alerts"),
        "spec": {"groups": alert_groups()},
    }
