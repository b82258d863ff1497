"""Files in deploy/: a real Prometheus with a real run.

The last test trains, lets Prometheus scrape the coordinator, and waits until every expression of
the dashboards has a value.

Not covered: the form of the dashboards (`test_grafana.py`), the alerts (`test_alerts.py`); Grafana
itself.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from switokd.services.coordinator.metrics import Metrics
from tests.deploy.dashboards import (
    NAMES,
    all_chosen,
    choices,
    expressions,
    filled,
    queried,
    variables,
)
from tests.services.live import coordinator
from tests.support import REPOSITORY, free_port, process, require, run, switokd_train, wait_until

DEPLOY = REPOSITORY / "deploy"
PROMETHEUS = DEPLOY / "prometheus"

DEADLINE_SECONDS = 240
"""For everything. Training starts after about 15 s; slow machines need the rest."""
HELD_AND_PAUSED = 5
"""What the timeline of a teacher shows while a command holds it in expert mode."""
WITHOUT_DATA = {
    "training: GPU memory, A": "tests have no GPU",
    **dict.fromkeys(
        [f"{name}: annotation Restarts of a run" for name in NAMES],
        "the run is not started again; no mark is right",
    ),
}
"""Expressions that are rightly empty in this run, with the reason."""


def exported_names() -> set[str]:
    """Names of all metrics of a coordinator, as a query writes them."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    return {
        family.name + suffix
        for family in Metrics().registry.collect()
        for suffix in suffixes.get(family.type, [""])
    }


# With method "signal", the context managers stop all processes after a timeout.
@pytest.mark.timeout(300, method="signal")
def test_every_panel_has_data_in_a_real_run(tmp_path: Path) -> None:
    port = free_port()
    prometheus = [
        *(require("prometheus", "prometheus"), "--config.file=prometheus.yml"),
        *("--storage.tsdb.path=tsdb", f"--web.listen-address=127.0.0.1:{port}"),
        "--log.level=warn",
    ]
    logs = [tmp_path / name for name in ("training.log", "prometheus.log", "log")]
    with coordinator(tmp_path, journal=True) as served:
        (tmp_path / "prometheus.yml").write_text(configuration(served.http), encoding="utf-8")
        at = f"coordinator.address={served.address}"
        train = switokd_train(3, "digits-2t1s", "run_dir=run", at, "schedule.epochs=300")
        with (
            process(train, tmp_path, logs[0]) as training,
            process(prometheus, tmp_path, logs[1]) as scraping,
        ):
            deadline = time.monotonic() + DEADLINE_SECONDS
            watched = Watched(port, [training, scraping], logs, deadline)
            watched.wait({"a pair has switched both ways": "switokd_switches_total >= 2"})
            hold = ["hold", "run", "teacher1", "expert", "--until-step", "1000000"]
            code, _, err = run([sys.executable, "-m", "switokd", *hold], tmp_path)
            assert code == 0, err
            run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]
            chosen = {"run": run_id, "instance": served.http}
            check_dashboards(watched, chosen)

            rules = [rule for group in ask(port, "rules")["groups"] for rule in group["rules"]]
            assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
            assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def configuration(scraped: str) -> str:
    """Prometheus' own configuration of deploy/ with another target, and faster."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / file) for file in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [scraped]}]
    text: str = yaml.safe_dump(config)
    return text


def check_dashboards(watched: Watched, chosen: Mapping[str, str]) -> None:
    """Every expression has finite values now, and has had no other ones since the start.

    chosen: values of variables; all choices are taken of the others.
    """
    panels, marks = {}, {}
    for name in NAMES:
        values = {**all_chosen(name), **chosen}
        for where, expression in expressions(name):
            if where in WITHOUT_DATA:
                continue
            if " annotation " in where:
                marks[where] = filled(expression, values)
            else:
                panels[where] = filled(expression, values)
    watched.wait(panels)
    watched.wait(marks, seconds=2 * DEADLINE_SECONDS)  # marks are drawn over a time
    now = {where: watched.values(expression) for where, expression in panels.items()}
    assert [where for where, found in now.items() if not found] == []
    (timeline,) = (where for where in panels if "Mode of each teacher" in where)
    held = "the held teacher on the timeline"
    wait_until(lambda: HELD_AND_PAUSED in watched.values(panels[timeline]), 60, held)
    modes = watched.values(panels[timeline])
    assert {*modes} <= {1, 2, 3, HELD_AND_PAUSED}
    for where, expression in panels.items():
        ever = watched.values(expression, seconds=60)
        assert all(map(math.isfinite, ever)), f"{where}: {expression}"
    check_choices_of_pairs(watched, chosen)


def check_choices_of_pairs(watched: Watched, chosen: Mapping[str, str]) -> None:
    """The variable offers both pairs, and with each of them the panels show that one only."""
    variable = variables("switching")["pair"]
    values = {**all_chosen("switching"), **chosen}
    offered = ask(watched.port, "query", query=filled(queried(variable["query"]["query"]), values))
    found = dict(filter(None, (choices(variable, s["metric"]) for s in offered["result"])))
    assert {*found} == {"teacher1 → student", "teacher2 → student"}
    of_pairs = {w: e for w, e in expressions("switching") if "${pair:raw}" in e}
    assert of_pairs
    for selector in found.values():
        for where, expression in of_pairs.items():
            one = watched.values(filled(expression, {**values, "pair": selector}))
            assert len(one) == (2 if "Time in mode" in where else 1), where


@dataclass(frozen=True)
class Watched:
    """A Prometheus, the programs that must go on until the deadline, and their logs."""

    port: int
    programs: Sequence[subprocess.Popen[str]]
    logs: Sequence[Path]
    deadline: float
    """On the monotonic clock."""

    def values(self, expression: str, seconds: int = 0) -> list[float]:
        """All values of a query now, or of the last seconds; none before Prometheus responds."""
        now = time.time()
        period = {"start": str(now - seconds), "end": str(now), "step": "1"}
        path, times = ("query_range", period) if seconds else ("query", {})
        try:
            result = ask(self.port, path, query=expression, **times)["result"]
        except (OSError, HTTPException, json.JSONDecodeError):
            return []
        samples = (series["values"] if seconds else [series["value"]] for series in result)
        return [float(value) for of_series in samples for _, value in of_series]

    def wait(self, queries: Mapping[str, str], seconds: int = 0) -> None:
        """Poll until each query has once had values, all of them finite. seconds: as `values`."""
        missing = dict(queries)
        while True:
            for where, expression in list(missing.items()):
                found = self.values(expression, seconds)
                if found and all(map(math.isfinite, found)):
                    del missing[where]
            if not missing:
                return
            ended = [program.args for program in self.programs if program.poll() is not None]
            if ended or time.monotonic() > self.deadline:
                lines = [f"{where}: {expression}" for where, expression in missing.items()]
                why = [f"ended: {ended}; these have no value:", *lines, *map(tail, self.logs)]
                pytest.fail("\n".join(why))
            time.sleep(0.2)


def ask(port: int, path: str, **parameters: str) -> Any:
    """Send a request to Prometheus and return the data of the response."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", f"/api/v1/{path}?{urlencode(parameters)}")
        answer = json.load(connection.getresponse())
    assert answer["status"] == "success", answer
    return answer["data"]


def tail(log: Path) -> str:
    """Last 80 lines of a log; torchrun's summary of a failure takes thirty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-80:]
    return "\n".join([f"--- {log.name}", *lines])
