"""What the dashboards have in common: variables, annotations, links, and parts of expressions.

Not covered: panels (`panels.py`), and which of them a dashboard has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from panels import SOURCE, Json

RUN = 'run=~"$run"'
NETWORK = 'run=~"$run", network=~"$network"'
PAIR = 'run=~"$run", ${pair:raw}'
INSTANCE = 'instance=~"$instance"'
WINDOW = "[$__rate_interval]"
"""At least four scrapes."""
TITLES = {"switching": "Switching", "training": "Training", "service": "Service"}
SCHEMA_VERSION = 41
"""Of Grafana 11.6."""


def rate(metric: str, selector: str) -> str:
    """Return the increase per second of a counter."""
    return f"rate({metric}{{{selector}}}{WINDOW})"


def quantile(q: float, metric: str, selector: str, by: str) -> str:
    """Return a quantile of a histogram of seconds, without the NaN of a time without events."""
    return f"histogram_quantile({q}, sum by ({by}, le) ({rate(f'{metric}_bucket', selector)})) >= 0"


def data_source() -> Json:
    """Return the variable that chooses one of Grafana's Prometheus data sources."""
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "description": "The Prometheus that scrapes the coordinator.",
    }


def labels_of(name: str, label: str, series: str, description: str) -> Json:
    """Return a variable for values of the label `name` of `series`; several may be chosen."""
    return {
        **_query_variable(name, label, f"label_values({series}, {name})", description),
        "multi": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def pair() -> Json:
    """Return the variable whose values are selectors: student="...", teacher="..."."""
    joined = (
        f'label_join(last_over_time(switokd_gap{{{RUN}}}[$__range]), "pair", " → ", '
        '"teacher", "student")'
    )
    query = f"query_result(count by (pair, student, teacher) ({joined}))"
    description = "A teacher and its student. The value is a selector for both labels."
    return {
        **_query_variable("pair", "Pair", query, description),
        # The text and the value of a choice, out of a series as Grafana writes it.
        "regex": r'/pair="(?<text>[^"]+)",\s*(?<value>student="[^"]+",\s*teacher="[^"]+")/',
        "multi": False,
        "allValue": 'teacher=~".+"',
        "current": {"text": "All", "value": "$__all"},
    }


def run(series: str = "switokd_run_state") -> Json:
    """Return the variable for the runs that Prometheus has in the time shown."""
    return labels_of("run", "Run", series, "Runs in the time shown, also those that have ended.")


def events_of_runs() -> list[Json]:
    """Return the annotations of starts, restarts, commands and epochs of the chosen runs."""
    starts = f"1000 * switokd_run_started_timestamp_seconds{{{RUN}}}"
    restarts = f"changes(switokd_run_attempt{{{RUN}}}{WINDOW}) > 0"
    commands = f"increase(switokd_commands_total{{{RUN}}}{WINDOW}) > 0"
    # Where several epochs begin in one window, marks would cover the panel.
    epochs = f"changes(switokd_run_epoch{{{RUN}}}{WINDOW}) == 1"
    return [
        _annotation("Starts of a run", starts, "green", "{{run}} started", at_value=True),
        _annotation("Restarts of a run", restarts, "orange", "{{run}} started again"),
        _annotation("Commands", commands, "blue", "Command {{action}} to {{run}}"),
        _annotation("Epochs", epochs, "text", "{{run}}: an epoch begins"),
    ]


def starts_of_coordinators(selector: str = "") -> Json:
    """Return the annotation of each start of a coordinator."""
    starts = f"1000 * switokd_start_timestamp_seconds{{{selector}}}"
    title = "Coordinator {{instance}} started"
    return _annotation("Starts of the coordinator", starts, "red", title, at_value=True)


def dashboard(
    name: str,
    description: str,
    variables: Sequence[Json],
    annotations: Sequence[Json],
    panels: Sequence[Json],
) -> Json:
    """Return a whole dashboard; it links to the other ones."""
    return {
        "uid": f"switokd-{name}",
        "title": f"switokd: {TITLES[name].lower()}",
        "description": description,
        "tags": ["switokd"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "links": [_link(other) for other in TITLES if other != name],
        "templating": {"list": list(variables)},
        "annotations": {"list": list(annotations)},
        "panels": list(panels),
    }


def address(name: str, run_variable: str) -> str:
    """Return the address of a dashboard, for the same data source and the given run."""
    return f"/d/switokd-{name}?${{datasource:queryparam}}&{run_variable}"


def _link(name: str) -> Json:
    return {
        "type": "link",
        "title": TITLES[name],
        "tooltip": f"Dashboard {TITLES[name]!r} for the same runs and time",
        "url": address(name, "${run:queryparam}"),
        "icon": "dashboard",
        "keepTime": True,
        # A network or a pair of this dashboard may not exist in the other one.
        "includeVars": False,
        "asDropdown": False,
        "targetBlank": False,
        "tags": [],
    }


def _query_variable(name: str, label: str, query: str, description: str) -> Json:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "description": description,
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "includeAll": True,
    }


def _annotation(
    name: str, expression: str, colour: str, title: str, *, at_value: bool = False
) -> Json:
    """Return marks where an expression has a value; at_value: at that time, in milliseconds."""
    marks: dict[str, Any] = {
        "name": name,
        "datasource": SOURCE,
        "enable": True,
        "iconColor": colour,
        "expr": expression,
        # With a scrape every 5 s, each event is in one window only.
        "step": "15s",
        "titleFormat": title,
    }
    return {**marks, "useValueForTime": "on"} if at_value else marks
