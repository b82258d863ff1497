"""Files in deploy/: checks by promtool, the dashboard, and a real Prometheus with a real run.

The last test trains, lets Prometheus scrape the coordinator, and waits until every expression of
the dashboard has a value.

Not covered: Grafana itself.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from switokd.services.coordinator.metrics import Metrics
from tests.support import REPOSITORY, free_port, process, require, switokd_train

DEPLOY = REPOSITORY / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana" / "switokd.json"

DEADLINE_SECONDS = 140
"""Training starts after about 15 s; slow machines need the rest."""


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


def expressions() -> dict[str, str]:
    """Queries of the dashboard as Grafana sends them, by panel or variable."""
    queries = {}
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert match is not None
            queries[f"${variable['name']}"] = (
                f'count by ({match[2]}) ({match[1]}{{{match[2]}!=""}})'
            )
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "10s").replace("$run", ".*")
            assert "$" not in expression
            queries[f"{panel['title']}, {target['refId']}"] = expression
    return queries


@pytest.mark.parametrize(
    "command",
    ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"],
)
def test_promtool_accepts(command: str) -> None:
    done = subprocess.run(
        [require("promtool", "prometheus"), *command.split()],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        x, y, w, h = (panel["gridPos"][k] for k in "xywh")
        assert x + w <= 24, panel["title"]
        of_panel = {(i, j) for i in range(x, x + w) for j in range(y, y + h)}
        assert not of_panel & cells, panel["title"]
        cells |= of_panel


def test_panels_have_descriptions_units_and_legends() -> None:
    panels = dashboard()["panels"]
    assert len({p["id"] for p in panels}) == len({p["title"] for p in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["expr"], panel["title"]
            assert target["legendFormat"], panel["title"]


@pytest.mark.parametrize(
    "file",
    [PROMETHEUS / "alerts.yml", PROMETHEUS / "alerts_test.yml", DASHBOARD],
    ids=lambda file: file.name,
)
def test_coordinator_exports_every_mentioned_metric(file: Path) -> None:
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    exported = {
        family.name + suffix
        for family in Metrics().registry.collect()
        for suffix in suffixes.get(family.type, [""])
    }
    mentioned = set(re.findall(r"\bswitokd_\w+", file.read_text(encoding="utf-8")))
    assert mentioned
    assert mentioned <= exported


# With method "signal", the context managers stop all processes after a timeout.
@pytest.mark.timeout(180, method="signal")
def test_every_panel_has_data_in_a_real_run(tmp_path: Path) -> None:
    scraped, listening = free_port(), free_port()
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / file) for file in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{scraped}"]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    watch = [
        *(require("prometheus", "prometheus"), "--config.file=prometheus.yml"),
        *("--storage.tsdb.path=tsdb", f"--web.listen-address=127.0.0.1:{listening}"),
        "--log.level=warn",
    ]
    port = f"coordinator.http_port={scraped}"
    train = switokd_train(3, "digits-2t1s", "run_dir=run", port, "schedule.epochs=200")
    logs = [tmp_path / "training.log", tmp_path / "prometheus.log"]

    empty = expressions()
    deadline = time.monotonic() + DEADLINE_SECONDS
    with (
        process(train, tmp_path, logs[0]) as training,
        process(watch, tmp_path, logs[1]) as prometheus,
    ):
        while empty:
            time.sleep(0.2)
            late = time.monotonic() > deadline
            if late or prometheus.poll() is not None or training.poll() is not None:
                break
            empty = {where: e for where, e in empty.items() if not has_value(listening, e)}
        if empty:
            lines = [f"{where}: {expression}" for where, expression in empty.items()]
            ended = f"training ended with code {training.poll()} (None: it is still running)"
            pytest.fail("\n".join([f"{ended}; these have no value:", *lines, *map(tail, logs)]))

        rules = [rule for group in ask(listening, "rules")["groups"] for rule in group["rules"]]
        assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
        assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def ask(port: int, path: str, **parameters: str) -> Any:
    """Send a request to Prometheus and return the data of the response."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", f"/api/v1/{path}?{urlencode(parameters)}")
        answer = json.load(connection.getresponse())
    assert answer["status"] == "success", answer
    return answer["data"]


def has_value(port: int, expression: str) -> bool:
    """Whether a query has a finite value; False while Prometheus does not respond yet."""
    try:
        result = ask(port, "query", query=expression)["result"]
    except (OSError, HTTPException, json.JSONDecodeError):
        return False
    return any(math.isfinite(float(series["value"][1])) for series in result)


def tail(log: Path) -> str:
    """Last 80 lines of a log; torchrun's summary of a failure takes thirty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-80:]
    return "\n".join([f"--- {log.name}", *lines])
