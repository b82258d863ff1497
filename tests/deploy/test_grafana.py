"""deploy/grafana: the committed dashboards, their form, and their provisioning.

Not covered: values in a real run (`test_deploy.py`); Grafana itself.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.dashboards import (
    GRAFANA,
    NAMES,
    all_chosen,
    choices,
    dashboard,
    expressions,
    filled,
    panels,
    variables,
)
from tests.deploy.grafana_schema import SCHEMA, VERSION
from tests.deploy.test_deploy import exported_names
from tests.support import REPOSITORY, require


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return loaded


def problems(schema: dict[str, Any], part: str, value: Any) -> list[str]:
    """What Grafana's type of a part says against a value."""
    checked = {**schema, "$ref": f"#/definitions/{part}"}
    found = jsonschema.Draft7Validator(checked).iter_errors(value)
    return [
        f"{part}: {'/'.join(map(str, error.absolute_path))}: {error.message}" for error in found
    ]


def test_the_dashboards_are_those_that_the_program_writes(tmp_path: Path) -> None:
    program = [sys.executable, str(GRAFANA / "build.py"), str(tmp_path)]
    subprocess.run(program, check=True)
    written = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    folder = GRAFANA / "dashboards"
    committed = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    assert {*written} == {*committed} == {f"{name}.json" for name in NAMES}
    assert written == committed, "write them again: .venv/bin/python deploy/grafana/build.py"


@pytest.mark.parametrize("name", NAMES)
def test_grafanas_own_types_accept_a_dashboard(name: str, schema: dict[str, Any]) -> None:
    found = problems(schema, "dashboard", dashboard(name))
    for panel in panels(name):
        kind, custom = panel["type"], panel["fieldConfig"]["defaults"].get("custom", {})
        found += problems(schema, f"{kind}.options", panel["options"])
        if custom:
            found += problems(schema, f"{kind}.custom", custom)
    assert found == []


def test_grafanas_own_types_refuse_mistakes(schema: dict[str, Any]) -> None:
    wrong = dashboard("switching")
    wrong["panels"][0]["gridPos"]["w"] = "wide"
    wrong["templating"]["list"][1]["multy"] = True
    wrong["links"][0].pop("keepTime")
    assert len(problems(schema, "dashboard", wrong)) >= 3
    options = panels("switching")[0]["options"]
    assert problems(schema, "stat.options", {**options, "colorMode": "loud"})
    assert problems(schema, "timeseries.custom", {"drawStyle": "line", "lineColour": "red"})


@pytest.mark.parametrize("name", NAMES)
def test_panels_fill_the_grid_without_overlap(name: str) -> None:
    cells: set[tuple[int, int]] = set()
    bottom = 0
    for panel in dashboard(name)["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        of_panel = {(i, j) for i in range(x, x + w) for j in range(y, y + h)}
        assert not of_panel & cells, panel["title"]
        cells |= of_panel
        bottom = max(bottom, y + h)
    assert cells == {(x, y) for x in range(24) for y in range(bottom)}


@pytest.mark.parametrize("name", NAMES)
def test_panels_have_descriptions_units_and_legends(name: str) -> None:
    found = panels(name)
    assert len({p["id"] for p in dashboard(name)["panels"]}) == len(dashboard(name)["panels"])
    assert len({p["title"] for p in found}) == len(found)
    for panel in found:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]
            assert re.search(r"\{\{\w+\}\}|^missing$", target["legendFormat"]), panel["title"]
            assert target["instant"] is not target["range"]


def test_variables_annotations_and_links() -> None:
    needed = {
        "switching": {"datasource", "run", "pair", "network"},
        "training": {"datasource", "run", "network"},
        "service": {"datasource", "instance", "run"},
    }
    uids = {dashboard(name)["uid"] for name in NAMES}
    for name in NAMES:
        assert {*variables(name)} == needed[name]
        linked = {
            match[1]
            for link in dashboard(name)["links"]
            if (match := re.match(r"/d/([\w-]+)\?", link["url"]))
        }
        assert linked == uids - {dashboard(name)["uid"]}
        assert all("${run:queryparam}" in link["url"] for link in dashboard(name)["links"])
    marks = {mark["name"] for mark in dashboard("switching")["annotations"]["list"]}
    assert marks >= {"Restarts of a run", "Starts of the coordinator", "Commands", "Epochs"}


def test_a_pair_is_chosen_by_a_selector() -> None:
    labels = {"pair": "t-1.b → s", "student": "s", "teacher": "t-1.b"}
    chosen = choices(variables("switching")["pair"], labels)
    assert chosen == ("t-1.b → s", 'student="s",teacher="t-1.b"')


def test_promtool_accepts_all_expressions(tmp_path: Path) -> None:
    rules = [
        {"record": f"expression:{number}", "expr": filled(expression, all_chosen(name))}
        for name in NAMES
        for number, (_, expression) in enumerate(expressions(name))
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    command = [require("promtool", "prometheus"), "check", "rules", "--lint=none", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_coordinator_exports_every_metric_of_the_dashboards() -> None:
    text = " ".join(expression for name in NAMES for _, expression in expressions(name))
    mentioned = set(re.findall(r"\b(?:switokd|process)_\w+", text))
    assert mentioned - exported_names() == set()


def test_provisioning_and_compose_name_files_and_folders_that_exist() -> None:
    provider, source = (
        yaml.safe_load((GRAFANA / "provisioning" / file).read_text(encoding="utf-8"))
        for file in ("dashboards/switokd.yml", "datasources/prometheus.yml")
    )
    (provided,) = provider["providers"]
    (prometheus,) = source["datasources"]
    assert prometheus["type"] == "prometheus"
    scraped = yaml.safe_load((REPOSITORY / "deploy/prometheus/prometheus.yml").read_text())
    assert prometheus["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    compose = yaml.safe_load((REPOSITORY / "deploy" / "compose.yaml").read_text())
    grafana = compose["services"]["grafana"]
    assert grafana["image"].endswith(f":{VERSION}")
    mounted = {v.split(":")[1]: REPOSITORY / "deploy" / v.split(":")[0] for v in grafana["volumes"]}
    folder = mounted[provided["options"]["path"]]
    assert {file.stem for file in folder.glob("*.json")} == {*NAMES}
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provided["options"]["path"])
    assert (folder / home.name).is_file()
