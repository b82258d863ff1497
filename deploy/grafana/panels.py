"""Forms of panels that the dashboards are made of; each returns what Grafana's JSON has for it.

A panel has no place and no id yet: `layout` gives it both. Not covered: kinds of panels that no
dashboard uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
"""Width of Grafana's grid."""
GREEN, ORANGE, RED, BLUE, GREY = "green", "orange", "red", "blue", "text"


@dataclass(frozen=True)
class Query:
    """An expression, and the name of its series, with labels in double braces."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Row:
    """Panels side by side. `header` opens a section, once per value of the variable `repeat`."""

    height: int
    panels: Sequence[tuple[int, Json]]
    header: str = ""
    repeat: str = ""


def layout(rows: Sequence[Row]) -> list[Json]:
    """Give each panel its place and a number. ValueError if a row is not 24 columns wide."""
    placed: list[Json] = []
    y = 0
    for row in rows:
        if row.header:
            place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
            header: Json = {"type": "row", "title": row.header, "collapsed": False, "panels": []}
            repeat = {"repeat": row.repeat} if row.repeat else {}
            placed.append({"id": len(placed) + 1, **header, **repeat, "gridPos": place})
            y += 1
        x = 0
        for width, panel in row.panels:
            place = {"x": x, "y": y, "w": width, "h": row.height}
            placed.append({"id": len(placed) + 1, **panel, "gridPos": place})
            x += width
        if x != COLUMNS:
            raise ValueError(f"the row of {row.panels[0][1]['title']!r} has {x} columns, not 24")
        y += row.height
    return placed


def time_series(
    title: str,
    description: str,
    unit: str,
    queries: Sequence[Query],
    *,
    dashed: str = "",
    stacked: bool = False,
    custom: Mapping[str, Any] | None = None,
    **defaults: Any,
) -> Json:
    """Return a chart over time. dashed: pattern of the names whose lines are dashed."""
    style: Json = {
        "drawStyle": "line",
        "lineWidth": 2,
        "fillOpacity": 30 if stacked else 0,
        "showPoints": "auto",
        "spanNulls": False,
        **({"stacking": {"mode": "normal", "group": "A"}} if stacked else {}),
        **(custom or {}),
    }
    dash = {"fill": "dash", "dash": [10, 8]}
    overrides = [{"id": "custom.lineStyle", "value": dash}]
    return {
        **_panel("timeseries", title, description, queries),
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                # The same name has the same colour in all panels.
                "color": {"mode": "palette-classic-by-name"},
                "custom": style,
                **defaults,
            },
            "overrides": [_override(dashed, overrides)] if dashed else [],
        },
        "options": {
            "legend": {
                "showLegend": True,
                "displayMode": "table" if len(queries) < 3 else "list",
                "placement": "bottom",
                "calcs": ["lastNotNull"],
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def stat(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    limits: Sequence[tuple[float | None, str]] = ((None, GREY),),
    names: Mapping[str, str] | None = None,
    **defaults: Any,
) -> Json:
    """Return the value of now, large.

    limits: from which value on which colour. names: show the series' name instead of its value,
    in the colour of the pattern that matches it.
    """
    colours = [
        _override(pattern, [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}])
        for pattern, colour in (names or {}).items()
    ]
    return {
        **_panel("stat", title, description, [query], now=True),
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "color": {"mode": "thresholds"},
                "thresholds": thresholds(limits),
                **defaults,
            },
            "overrides": colours,
        },
        "options": {
            "colorMode": "background" if names else "value",
            "graphMode": "none",
            "justifyMode": "center",
            "orientation": "auto",
            "textMode": "name" if names else "value_and_name",
            "wideLayout": True,
            "showPercentChange": False,
            "percentChangeColorMode": "standard",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
    }


def state_timeline(
    title: str, description: str, query: Query, states: Mapping[int, tuple[str, str]]
) -> Json:
    """Return a bar per series over time; states: text and colour of each value."""
    mapped = {
        str(value): {"text": text, "color": colour, "index": index}
        for index, (value, (text, colour)) in enumerate(states.items())
    }
    return {
        **_panel("state-timeline", title, description, [query]),
        "fieldConfig": {
            "defaults": {
                "unit": "none",
                "color": {"mode": "thresholds"},
                "thresholds": thresholds([(None, GREY)]),
                "mappings": [{"type": "value", "options": mapped}],
                "custom": {"fillOpacity": 80, "lineWidth": 0},
            },
            "overrides": [],
        },
        "options": {
            "alignValue": "center",
            "mergeValues": True,
            "rowHeight": 0.8,
            "showValue": "auto",
            "legend": {
                "showLegend": True,
                "displayMode": "list",
                "placement": "bottom",
                "calcs": [],
            },
            "tooltip": {"mode": "single", "sort": "none"},
        },
    }


def table(
    title: str,
    description: str,
    query: Query,
    columns: Mapping[str, str],
    links: Mapping[str, Sequence[Json]] | None = None,
) -> Json:
    """Return the labels of series as a table.

    columns: headings by label, in order; other labels are left out. links: by heading.
    """
    panel = _panel("table", title, description, [query], now=True)
    panel["targets"][0]["format"] = "table"
    overrides = [
        {
            "matcher": {"id": "byName", "options": heading},
            "properties": [{"id": "links", "value": list(found)}],
        }
        for heading, found in (links or {}).items()
    ]
    return {
        **panel,
        "fieldConfig": {
            "defaults": {
                "unit": "string",
                "custom": {"align": "left", "cellOptions": {"type": "auto"}, "inspect": False},
            },
            "overrides": overrides,
        },
        "transformations": [
            {"id": "filterFieldsByName", "options": {"include": {"names": list(columns)}}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {},
                    "includeByName": {},
                    "indexByName": {label: index for index, label in enumerate(columns)},
                    "renameByName": dict(columns),
                },
            },
        ],
        "options": {"showHeader": True, "cellHeight": "sm", "frameIndex": 0},
    }


def thresholds(limits: Sequence[tuple[float | None, str]]) -> Json:
    """Return from which value on which colour holds; the first one begins at None."""
    return {"mode": "absolute", "steps": [{"value": v, "color": colour} for v, colour in limits]}


def _override(pattern: str, properties: Sequence[Json]) -> Json:
    """Return properties for the series whose names match."""
    matcher = {"id": "byRegexp", "options": f"/{pattern}/"}
    return {"matcher": matcher, "properties": list(properties)}


def _panel(
    kind: str, title: str, description: str, queries: Sequence[Query], *, now: bool = False
) -> Json:
    """Return what all panels have. now: ask for the values of now, not for those over time."""
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "targets": [
            {
                "refId": "ABCDEFGH"[index],
                "datasource": SOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
                "instant": now,
                "range": not now,
            }
            for index, query in enumerate(queries)
        ],
    }
