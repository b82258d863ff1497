"""Who may connect to whom: nobody but those whom the run needs.

    worker      <-> worker        any port: Gloo and NCCL choose theirs
    worker       -> coordinator   gRPC
    Prometheus   -> coordinator   HTTP, from one namespace
    worker       -> DNS           any resolver, port 53
    worker       -> HTTPS         only if the ranks download the data set

The policies select the pods of this run alone. They hold where the cluster's network plugin
enforces them. Probes come from the node, which policies do not concern.

Not covered: the rest of the namespace.
"""

from __future__ import annotations

from switokd.deploying.facts import GRPC_PORT, HTTP_PORT, RunFacts
from switokd.deploying.pods import Manifest


def network_policies(run: RunFacts) -> list[Manifest]:
    """Return the policies of the run's pods."""
    everyone = {"podSelector": {"matchLabels": run.labels}, "policyTypes": ["Ingress", "Egress"]}
    found = [_policy(run, f"{run.name}-default-deny", everyone), _workers(run)]
    return [*found, _coordinator(run)] if run.has_coordinator else found


def _policy(run: RunFacts, name: str, spec: Manifest) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": run.metadata(name),
        "spec": spec,
    }


def _peers(run: RunFacts, component: str) -> list[Manifest]:
    return [{"podSelector": {"matchLabels": run.labels_of(component)}}]


def _tcp(port: int) -> Manifest:
    return {"port": port, "protocol": "TCP"}


def _workers(run: RunFacts) -> Manifest:
    others = _peers(run, "worker")
    dns = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    egress: list[Manifest] = [{"to": others}, {"ports": dns}]
    if run.has_coordinator:
        egress.append({"to": _peers(run, "coordinator"), "ports": [_tcp(GRPC_PORT)]})
    elif run.coordinator != "off":  # wherever it is
        ports = [int(address.rpartition(":")[2]) for address in run.coordinator.split(",")]
        egress.append({"ports": [_tcp(port) for port in dict.fromkeys(ports)]})
    if run.downloads:
        # Fashion-MNIST's only mirror speaks plain HTTP; torchvision compares a checksum.
        egress.append({"ports": [_tcp(443), _tcp(80)]})
    spec = {
        "podSelector": {"matchLabels": run.labels_of("worker")},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": others}],
        "egress": egress,
    }
    return _policy(run, run.workers_name, spec)


def _coordinator(run: RunFacts) -> Manifest:
    namespace = {"kubernetes.io/metadata.name": run.options.monitoring.namespace}
    prometheus = [{"namespaceSelector": {"matchLabels": namespace}}]
    spec = {
        "podSelector": {"matchLabels": run.labels_of("coordinator")},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"from": _peers(run, "worker"), "ports": [_tcp(GRPC_PORT)]},
            {"from": prometheus, "ports": [_tcp(HTTP_PORT)]},
        ],
    }
    return _policy(run, run.coordinator_name, spec)
