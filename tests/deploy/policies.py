"""What NetworkPolicies allow, as far as the rendered ones go: labels, namespaces, ports.

Not covered: blocks of addresses, ranges of ports, expressions.
"""

from __future__ import annotations

from typing import Any

Manifest = dict[str, Any]


def labels_of(objects: list[Manifest], component: str) -> dict[str, str]:
    """The labels of a component's pods."""
    found: list[dict[str, str]] = []

    def search(value: Any) -> None:
        if isinstance(value, dict):
            if "containers" in value.get("spec", {}):
                found.append(value["metadata"]["labels"])
            for each in value.values():
                search(each)
        elif isinstance(value, list):
            for each in value:
                search(each)

    search(objects)
    (labels,) = [la for la in found if la["app.kubernetes.io/component"] == component]
    return labels


def allows(objects: list[Manifest], client: str, server: str, port: int) -> bool:
    """Whether a component may connect to a port of another one, by both sides' policies."""
    here, there = labels_of(objects, client), labels_of(objects, server)
    return _side(objects, "egress", "to", here, there, port) and _side(
        objects, "ingress", "from", there, here, port
    )


def _side(
    objects: list[Manifest],
    way: str,
    key: str,
    own: dict[str, str],
    peer: dict[str, str],
    port: int,
) -> bool:
    """Whether one side's policies allow it; a pod that no policy selects may do everything."""
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
    selecting = [
        spec
        for spec in policies
        if way.capitalize() in spec["policyTypes"] and _selects(spec["podSelector"], own)
    ]
    rules = [rule for spec in selecting for rule in spec.get(way, [])]
    return not selecting or any(_matches(rule, key, peer, port) for rule in rules)


def _matches(rule: Manifest, key: str, peer: dict[str, str], port: int) -> bool:
    ports = [each["port"] for each in rule.get("ports", []) if each["protocol"] == "TCP"]
    if "ports" in rule and port not in ports:
        return False
    if key not in rule:
        return True
    return any("podSelector" in each and _selects(each["podSelector"], peer) for each in rule[key])


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
