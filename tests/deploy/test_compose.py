"""deploy/compose.yaml: valid, consistent with deploy/, and run for real, without containers.

The services' commands run as they stand in a network of their own, where the services' names are
names of this machine, on the ports of the file. Prometheus and Alertmanager read the files that
their services mount.

Not covered: Grafana; the images (`test_image.py`); volumes.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.image import health_check, stages
from tests.support import BIN, REPOSITORY, require, unshare

DEPLOY = REPOSITORY / "deploy"
COMPOSE = DEPLOY / "compose.yaml"

PROGRAM = """\
import json, sys, time, urllib.parse, urllib.request
from pathlib import Path
from tests.support import process, run, wait_until

plan, here = json.loads(sys.argv[1]), Path.cwd()

def get(address):
    try:
        return json.load(urllib.request.urlopen(f"http://{address}", timeout=2))
    except OSError:
        return {}

def ask(query):
    url = f"prometheus:9090/api/v1/query?query={urllib.parse.quote(query)}"
    result = get(url).get("data", {}).get("result", ())
    return max((float(series["value"][1]) for series in result), default=0.0)

def alertmanagers():
    found = get("prometheus:9090/api/v1/alertmanagers").get("data", {})
    return [each["url"] for each in found.get("activeAlertmanagers", ())]

with process(plan["coordinator"], here, here / "coordinator.log"):
    healthy = lambda: run(plan["health"], here)[0] == 0
    wait_until(healthy, 40, "the coordinator's health check")
    with (
        process(plan["prometheus"], here, here / "prometheus.log"),
        process(plan["alertmanager"], here, here / "alertmanager.log"),
    ):
        with process(plan["training"], here, here / "training.log") as training:
            ranks = 'count(switokd_rank_phase_seconds{run=~"digits-2t1s-.*"})'
            wait_until(lambda: ask(ranks) >= 3, 60, "the run's ranks in Prometheus")
            assert ask('up{job="switokd"}') == 1
            wait_until(alertmanagers, 30, "Prometheus to know the Alertmanager")
            assert alertmanagers() == ["http://alertmanager:9093/api/v2/alerts"]
            wait_until(lambda: get("alertmanager:9093/api/v2/status"), 30, "Alertmanager")
            assert training.wait(60) == 0, (here / "training.log").read_text()
"""


def services() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded["services"]


def test_docker_compose_accepts_the_file() -> None:
    command = [require("docker-compose", "docker-compose"), "-f", str(COMPOSE), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_targets_files_and_names_exist() -> None:
    found, volumes = services(), yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["volumes"]
    assert {*found} == {"coordinator", "training", "prometheus", "alertmanager", "grafana"}
    for name in ("coordinator", "training"):
        build = found[name]["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
        assert build["target"] in stages()
    for name, service in found.items():
        for mounted in service.get("volumes", ()):
            source = mounted.split(":")[0]
            assert source in volumes or (DEPLOY / source).exists(), (name, source)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert "coordinator.address=coordinator:50051" in found["training"]["command"]


def test_configurations_differ_from_those_of_one_machine_in_the_address_only() -> None:
    names = {"9464": "coordinator", "9093": "alertmanager", "9090": "prometheus"}
    pairs = [
        ("prometheus/prometheus.yml", "prometheus.yml"),
        ("grafana/provisioning/datasources/prometheus.yml", "datasource.yml"),
    ]
    for single, composed in pairs:
        expected = (DEPLOY / single).read_text(encoding="utf-8")
        for port, name in names.items():
            expected = expected.replace(f"localhost:{port}", f"{name}:{port}")
        found = (DEPLOY / "compose" / composed).read_text(encoding="utf-8")
        assert yaml.safe_load(found) == yaml.safe_load(expected), composed


@pytest.mark.timeout(200, method="signal")
def test_the_services_find_each_other_by_name(tmp_path: Path) -> None:
    found = services()

    def program(words: list[str]) -> list[str]:
        return [str(BIN / words[0]), *words[1:]]

    folder = tmp_path / "etc"
    folder.mkdir()
    for mounted in found["prometheus"]["volumes"] + found["alertmanager"]["volumes"]:
        source, target, _ = mounted.split(":")
        (folder / Path(target).name).write_text((DEPLOY / source).read_text())
    quick = (folder / "prometheus.yml").read_text().replace("_interval: 5s", "_interval: 1s")
    (folder / "prometheus.yml").write_text(quick)
    training = [w.replace("/runs/", "runs/") for w in found["training"]["command"]]
    coordinator = [w.replace("/journal/", "") for w in found["coordinator"]["command"]]
    prometheus = [require("prometheus", "prometheus"), f"--config.file={folder}/prometheus.yml"]
    alertmanager = require("prometheus-alertmanager", "prometheus-alertmanager")
    plan = {
        "alertmanager": [
            *(alertmanager, f"--config.file={folder}/alertmanager.yml"),
            *(f"--storage.path={tmp_path}/alerts", "--cluster.listen-address="),
        ],
        "coordinator": program(coordinator),
        "health": program(health_check(stages()["coordinator"])),
        "training": [*program(training), "schedule.epochs=10"],
        "prometheus": [*prometheus, f"--storage.tsdb.path={tmp_path}/tsdb", "--log.level=warn"],
    }
    (tmp_path / "hosts").write_text(
        f"127.0.0.1 localhost {socket.gethostname()} {' '.join(found)}\n"
    )
    (tmp_path / "program.py").write_text(PROGRAM)
    script = 'ip link set lo up && mount --bind hosts /etc/hosts && exec "$@"'
    command = [*unshare("-rnm"), "sh", "-c", script, "sh", sys.executable, "program.py"]
    done = subprocess.run(
        [*command, json.dumps(plan)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        timeout=190,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "journal.db").is_file()
