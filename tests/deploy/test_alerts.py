"""deploy/prometheus/alerts.yml: promtool's tests, the runbook, and alerts that reach a receiver.

Every alert is seen to fire and not to fire (deploy/prometheus/tests), names what it is about, and
has a section in docs/alerts.md. The last test lets a real run fail and kills its coordinator: a
real Prometheus finds both, and a real Alertmanager tells a receiver.

Not covered: how long the alerts wait in that test, which are seconds there; mail and chat.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

from switokd.services.coordinator.metric_families import FAMILIES
from tests import preloaded
from tests.support import REPOSITORY, free_port, process, require, wait_until

DEPLOY = REPOSITORY / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RULES = PROMETHEUS / "alerts.yml"
ALERTMANAGER = DEPLOY / "alertmanager" / "alertmanager.yml"
UNIT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
RUNBOOK = REPOSITORY / "docs" / "alerts.md"
PARTS = ("Meaning", "Look at", "Do", "Harmless")
"""What a section of the runbook consists of."""


def loaded(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@cache
def alerts() -> dict[str, dict[str, Any]]:
    rules = [rule for group in loaded(RULES)["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    return {rule["alert"]: rule for rule in rules}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Its databases last for a second: a slow disk need not hold them.
    folder = {"TMPDIR": "/dev/shm"} if os.access("/dev/shm", os.W_OK) else {}
    return subprocess.run(
        [require("promtool", "prometheus"), *arguments],
        cwd=PROMETHEUS,
        env={**os.environ, **folder},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint-fatal", "alerts.yml"),
        *(("test", "rules", str(file)) for file in UNIT_TESTS),
    ],
    ids=lambda arguments: "-".join(Path(a).name for a in arguments),
)
@pytest.mark.timeout(300)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def expected(group: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Time, and labels of the alerts that fire then, for each query of a promtool test."""
    for query in group["promql_expr_test"]:
        labels = [dict(re.findall(r'(\w+)="(.*?)"', s["labels"])) for s in query["exp_samples"]]
        yield query["eval_time"], labels


def test_every_alert_is_seen_to_fire_and_not_to_fire() -> None:
    groups = [group for file in UNIT_TESTS for group in loaded(file)["tests"]]
    assert {group["name"].split()[0].rstrip(",") for group in groups} == {*alerts(), "No"}
    for group in groups:
        name = group["name"].split()[0].rstrip(",")
        if name == "No":
            assert not any(labels for _, labels in expected(group))
            continue
        fires = [name in [a["alertname"] for a in labels] for _, labels in expected(group)]
        assert {*fires} == {True, False}, group["name"]
        # A harmless case that the alert could take for its own: all of its metrics, or those of
        # its own condition without that of the run's state.
        metrics = set(re.findall(r"\b(?:switokd_\w+|up\b)", alerts()[name]["expr"]))
        near = [s["series"] for s in group["input_series"] if '"near' in s["series"]]
        assert {series.split("{")[0] for series in near} & metrics, group["name"]
        assert '"near' not in json.dumps(group["promql_expr_test"]), group["name"]


def test_the_coordinator_exports_every_metric_of_the_alerts() -> None:
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    exported = {
        f"switokd_{name}{suffix}"
        for name, family in FAMILIES.items()
        for suffix in suffixes.get(family[0], [""])
    }
    for file in (RULES, RUNBOOK, *UNIT_TESTS):
        mentioned = set(re.findall(r"\bswitokd_\w+", file.read_text(encoding="utf-8")))
        assert mentioned
        assert mentioned <= exported, file.name


@pytest.mark.parametrize("name", alerts())
def test_style_of_an_alert(name: str) -> None:
    alert = alerts()[name]
    assert re.fullmatch(r"Switokd([A-Z][a-z]+)+", name)
    assert {*alert} - {"for"} == {"alert", "expr", "labels", "annotations"}
    assert [*alert["labels"]] == ["severity"]
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    # Windows of several scrapes, and coordinators that know nothing of each other.
    for seconds in re.findall(r"\[(\d+)([mh])\]", alert["expr"]):
        assert seconds[1] == "h" or int(seconds[0]) >= 2
    for kept in re.findall(r"\b(?:by|on) \(([^)]*)\)", alert["expr"]):
        assert kept.startswith("job"), kept
    texts = alert["annotations"]
    assert [*texts] == ["summary", "description", "runbook_url"]
    assert len(texts["summary"]) <= 160
    assert not texts["summary"].endswith(".")
    assert texts["description"].endswith(".")
    sentences = re.split(r"[.:;] ", re.sub("{{.*?}}", "VALUE", texts["description"]))
    assert [s for s in sentences if len(s.split()) > 25] == []
    assert texts["runbook_url"] == f"docs/alerts.md#{name.lower()}"


def sections() -> dict[str, str]:
    """Text of each section of the runbook about an alert, by its heading."""
    parts = re.split(r"^## (\w+)\n", RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_runbook_has_a_section_per_alert_in_the_same_order() -> None:
    assert [name for name in sections() if name.startswith("Switokd")] == [*alerts()]
    for name in alerts():
        bold = re.findall(r"^\*\*(.+?):\*\*", sections()[name], re.MULTILINE)
        assert bold == [*PARTS], name
        severity = alerts()[name]["labels"]["severity"]
        assert f"Severity: {severity}" in sections()[name], name


@pytest.mark.timeout(300)
def test_the_texts_of_every_alert_name_what_it_is_about(tmp_path: Path) -> None:
    """promtool renders them: as the difference to no alert, at the time when it first fires."""
    made, about = [], {}
    for file in UNIT_TESTS:
        content = loaded(file)
        tests = []
        for group in content["tests"]:
            fires = [(time, alert) for time, labels in expected(group) for alert in labels]
            fires = [f for f in fires if group["name"].startswith(f[1]["alertname"])]
            if not fires:
                continue
            time, alert = fires[0]
            name = alert.pop("alertname")
            about[name] = alert
            empty = [{"alertname": name, "eval_time": time, "exp_alerts": []}]
            inputs = {key: group[key] for key in ("interval", "input_series")}
            tests.append({**inputs, "alert_rule_test": empty})
        made.append(tmp_path / file.name)
        rendering = {**content, "rule_files": [str(RULES)], "tests": tests}
        made[-1].write_text(yaml.safe_dump(rendering), encoding="utf-8")
    assert about.keys() == alerts().keys()
    text = promtool("test", "rules", *map(str, made)).stderr
    rendered = re.findall(r'Labels:{alertname="(\w+)".*\n\s*Annotations:{(.*)}', text)
    assert {name for name, _ in rendered} == about.keys(), text
    for _, texts in rendered:
        assert "no value" not in texts
        assert "error expanding" not in texts
    for name, labels in about.items():
        for value in labels.values():
            assert any(n == name and value in texts for n, texts in rendered), (name, value)


def amtool(*arguments: str) -> str:
    command = [require("amtool", "prometheus-alertmanager"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_amtool_accepts_the_configuration() -> None:
    assert "SUCCESS" in amtool("check-config", str(ALERTMANAGER))


@pytest.mark.parametrize(
    ("severity", "receiver"),
    [("critical", "look-at-once"), ("warning", "look-today"), ("info", "nobody")],
)
def test_severities_have_receivers(severity: str, receiver: str) -> None:
    routes = ("config", "routes", "test", f"--config.file={ALERTMANAGER}")
    assert amtool(*routes, f"severity={severity}", "alertname=SwitokdAny") == receiver


def test_inhibitions_name_alerts_that_exist() -> None:
    for rule in loaded(ALERTMANAGER)["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            label, names = re.fullmatch(r'(\w+)!?=~?"(.+)"', matcher).groups()  # type: ignore[union-attr]
            assert label == "alertname"
            assert names == "Switokd.+" or {*names.split("|")} <= alerts().keys(), names


@contextmanager
def receiver() -> Iterator[tuple[int, SimpleQueue[dict[str, Any]]]]:
    """A port that takes Alertmanager's notifications, and what has arrived."""
    arrived: SimpleQueue[dict[str, Any]] = SimpleQueue()

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1], arrived
        server.shutdown()
        thread.join()


def configure(folder: Path, scraped: str, alertmanager: int, webhook: int) -> None:
    """Write both configurations of deploy/ with short times and the addresses of a test."""
    rules = loaded(RULES)
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
    config = loaded(PROMETHEUS / "prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [scraped]}]
    targets = [{"targets": [f"127.0.0.1:{alertmanager}"]}]
    config["alerting"]["alertmanagers"] = [{"static_configs": targets}]
    notify = loaded(ALERTMANAGER)
    times = {"group_wait": "1s", "group_interval": "1s"}
    notify["route"].update(times)
    for route in notify["route"]["routes"]:
        route.update(times)
    for each in notify["receivers"]:
        url = f"http://127.0.0.1:{webhook}/{each['name']}"
        each["webhook_configs"] = [{"url": url}]
    for name, content in (
        ("alerts.yml", rules),
        ("prometheus.yml", config),
        ("alertmanager.yml", notify),
    ):
        (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")


def notified(arrived: SimpleQueue[dict[str, Any]], name: str) -> dict[str, Any]:
    """Wait for a notification about an alert that fires; the alert, with its receiver."""

    def next_one() -> dict[str, Any] | None:
        while not arrived.empty():
            message = arrived.get()
            for alert in message["alerts"]:
                if (alert["labels"]["alertname"], alert["status"]) == (name, "firing"):
                    return {**alert, "receiver": message["receiver"]}
        return None

    found: dict[str, Any] = wait_until(next_one, 60, f"a notification about {name}")
    return found


@pytest.mark.timeout(400, method="signal")
def test_a_failed_run_and_a_lost_coordinator_reach_the_receiver(tmp_path: Path) -> None:
    sending, scraping = free_port(), free_port()
    prometheus = [
        *(require("prometheus", "prometheus"), "--config.file=prometheus.yml"),
        *("--storage.tsdb.path=tsdb", f"--web.listen-address=127.0.0.1:{scraping}"),
        "--log.level=warn",
    ]
    alertmanager = [
        require("prometheus-alertmanager", "prometheus-alertmanager"),
        *("--config.file=alertmanager.yml", "--storage.path=alerts"),
        *(f"--web.listen-address=127.0.0.1:{sending}", "--cluster.listen-address="),
    ]
    serve = [sys.executable, "-m", "switokd", "coordinator", "--port=0", "--http-port=0"]
    with (
        receiver() as (webhook, arrived),
        process(serve, tmp_path) as serving,
    ):
        assert serving.stdout is not None
        address = json.loads(serving.stdout.readline())
        configure(tmp_path, address["http"], sending, webhook)
        with (
            process(prometheus, tmp_path, tmp_path / "prometheus.log"),
            process(alertmanager, tmp_path, tmp_path / "alertmanager.log"),
        ):
            wait_until(lambda: answers(scraping) and answers(sending), 60, "both to be ready")
            # A learning rate that no network survives: the run ends with exit code 3.
            rates = [f"networks.{name}.optimizer.lr=1e38" for name in ("teacher", "student")]
            words = ("digits-1t1s", f"coordinator.address={address['grpc']}", "run_dir=run")
            code, _, err = preloaded.call(
                tmp_path, preloaded.train_ranks, 2, (*words, *rates), seconds=200
            )
            assert code == 3, err
            run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]
            alert = notified(arrived, "SwitokdRunFailed")
            assert alert["receiver"] == "look-at-once"
            assert alert["labels"] == {
                "alertname": "SwitokdRunFailed",
                "instance": address["http"],
                "job": "switokd",
                "run": run_id,
                "severity": "critical",
                "state": "failed",
            }
            assert alert["annotations"]["summary"] == f"Run {run_id} has failed"
            assert alert["annotations"]["runbook_url"] == "docs/alerts.md#switokdrunfailed"
            serving.kill()
            alert = notified(arrived, "SwitokdCoordinatorDown")
            assert alert["labels"]["instance"] == address["http"]
            url = f"http://127.0.0.1:{sending}/api/v2/alerts?inhibited=true"

            def inhibited() -> list[str]:
                with urlopen(url, timeout=5) as answer:
                    shown = json.load(answer)
                return [a["labels"]["run"] for a in shown if a["status"]["inhibitedBy"]]

            wait_until(lambda: inhibited() == [run_id], 30, "the run's alert to be inhibited")


def answers(port: int) -> bool:
    """Whether Prometheus or Alertmanager is ready."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
