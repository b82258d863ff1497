"""The dashboards of deploy/grafana as Grafana sees them: panels, and expressions that it sends.

Not covered: Grafana itself, which the package registries do not have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tests.support import REPOSITORY

GRAFANA = REPOSITORY / "deploy" / "grafana"
NAMES = ("switching", "training", "service")
Json = dict[str, Any]


def dashboard(name: str) -> Json:
    """A dashboard by its name."""
    loaded: Json = json.loads((GRAFANA / "dashboards" / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def panels(name: str) -> list[Json]:
    """Panels of a dashboard without the rows' headers."""
    return [panel for panel in dashboard(name)["panels"] if panel["type"] != "row"]


def variables(name: str) -> dict[str, Json]:
    """Variables of a dashboard by name."""
    return {variable["name"]: variable for variable in dashboard(name)["templating"]["list"]}


def expressions(name: str) -> Iterator[tuple[str, str]]:
    """Every expression of a dashboard as it stands, with where it is."""
    for panel in panels(name):
        for target in panel["targets"]:
            yield f"{name}: {panel['title']}, {target['refId']}", target["expr"]
    for annotation in dashboard(name)["annotations"]["list"]:
        yield f"{name}: annotation {annotation['name']}", annotation["expr"]
    for variable in variables(name).values():
        if variable["type"] == "query":
            yield f"{name}: variable {variable['name']}", queried(variable["query"]["query"])


def queried(query: str) -> str:
    """The expression behind a variable's query."""
    values = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    if values:
        return f"count by ({values[2]}) ({values[1]})"
    result = re.fullmatch(r"query_result\((.+)\)", query)
    assert result, query
    return result[1]


def filled(expression: str, values: Mapping[str, str]) -> str:
    """An expression with values for its variables; KeyError for a variable that has none."""
    return re.sub(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))", lambda m: values[m[1] or m[2]], expression)


def all_chosen(name: str) -> dict[str, str]:
    """Values of the variables of a dashboard where all choices are taken, in a window of 10 s."""
    chosen = {
        variable["name"]: variable["allValue"]
        for variable in variables(name).values()
        if "allValue" in variable
    }
    return {**chosen, "__rate_interval": "10s", "__range": "15m"}


def choices(variable: Json, series: Mapping[str, str]) -> tuple[str, str] | None:
    """Text and value of a choice, from the labels of one series of `query_result`.

    Grafana writes the series as text, and the variable's pattern takes both from there.
    """
    labels = ",".join(f'{label}="{value}"' for label, value in sorted(series.items()))
    pattern = variable["regex"].strip("/").replace("(?<", "(?P<")
    match = re.search(pattern, f"{{{labels}}} 1 1700000000000")
    return (match["text"], match["value"]) if match else None
