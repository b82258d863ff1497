"""Manifests in k8s/: rendering, strict validation, consistency, and a training with their commands.

Not covered: a real cluster.
"""

import functools
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support import REPOSITORY, free_port, lines, process, require, wait_until

BASE, GPU = REPOSITORY / "k8s/base", REPOSITORY / "k8s/overlays/gpu"
KUSTOMIZATIONS = sorted(file.parent for file in REPOSITORY.glob("k8s/**/kustomization.yaml"))


@functools.cache
def render(directory: Path) -> str:
    command = [require("kubectl", "kubernetes-client"), "kustomize", str(directory)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def validation_errors(manifests: str) -> list[str]:
    """Output of the validator except "passed"; an unknown kind is only a warning there."""
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-"]
    done = subprocess.run(command, input=manifests, capture_output=True, text=True, timeout=60)
    output = (done.stdout + done.stderr).splitlines()
    return [line for line in output if " passed for resource " not in line]


class Manifests:
    """Rendered objects of a kustomization."""

    def __init__(self, directory: Path) -> None:
        objects = list(yaml.safe_load_all(render(directory)))
        self.specs = {f"{o['kind']}/{o['metadata']['name']}": o["spec"] for o in objects}
        self.deployment = self.specs["Deployment/switokd-coordinator"]
        self.job = self.specs["Job/switokd-workers"]
        (self.coordinator,) = self.deployment["template"]["spec"]["containers"]
        (self.worker,) = self.job["template"]["spec"]["containers"]


def options(container: dict[str, Any]) -> dict[str, str]:
    """Arguments of a container of the form name=value."""
    return dict(word.split("=", 1) for word in container["args"] if "=" in word)


def command(container: dict[str, Any], changed: dict[str, str]) -> list[str]:
    """Command of a container with its environment, and with changed name=value arguments."""
    assert changed.keys() <= options(container).keys()
    env = [f"{variable['name']}={variable['value']}" for variable in container.get("env", [])]
    args = [
        f"{n}={changed[n]}" if (n := a.split("=")[0]) in changed else a for a in container["args"]
    ]
    return ["env", *env, *container["command"], *args]


@pytest.fixture(params=KUSTOMIZATIONS, ids=lambda directory: directory.name)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return Manifests(request.param)


@pytest.mark.parametrize("directory", KUSTOMIZATIONS, ids=lambda directory: directory.name)
def test_validates_strictly(directory: Path) -> None:
    assert validation_errors(render(directory)) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("replicas:", "replcas:"), ("runAsUser:", "runAsUsr:"), ("kind: Job", "kind: Jb")],
)
def test_misspelling_is_refused(right: str, wrong: str) -> None:
    assert right in render(BASE)
    assert validation_errors(render(BASE).replace(right, wrong)) != []


def test_each_service_selects_its_own_pods(manifests: Manifests) -> None:
    coordinator = manifests.deployment["template"]["metadata"]["labels"]
    worker = manifests.job["template"]["metadata"]["labels"]
    assert manifests.deployment["selector"]["matchLabels"] == coordinator
    assert manifests.specs["Service/switokd-coordinator"]["selector"] == coordinator
    assert manifests.specs["Service/switokd-workers"]["selector"] == worker
    assert coordinator != worker


def test_ranks_find_each_other(manifests: Manifests) -> None:
    given, job = options(manifests.worker), manifests.job
    subdomain = job["template"]["spec"]["subdomain"]
    service = manifests.specs[f"Service/{subdomain}"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(given["--nnodes"])
    assert given["--node-rank"] == "$(JOB_COMPLETION_INDEX)"
    assert given["--master-addr"] == f"switokd-workers-0.{subdomain}"
    assert int(given["--master-port"]) == service["ports"][0]["port"]


def test_workers_find_the_coordinator(manifests: Manifests) -> None:
    service, port = options(manifests.worker)["coordinator.address"].split(":")
    target = {p["port"]: p["targetPort"] for p in manifests.specs[f"Service/{service}"]["ports"]}
    served = {p["name"]: p["containerPort"] for p in manifests.coordinator["ports"]}
    assert served[target[int(port)]] == int(options(manifests.coordinator)["--port"])


def test_probes_and_scraping_use_served_ports(manifests: Manifests) -> None:
    given, container = options(manifests.coordinator), manifests.coordinator
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == int(given["--port"])
    annotations = manifests.deployment["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == given["--http-port"]


def test_one_rank_per_network_of_the_recipe(manifests: Manifests) -> None:
    recipe = manifests.worker["args"][manifests.worker["args"].index("switokd.train") + 1]
    text = (REPOSITORY / f"switokd/recipes/{recipe}.yaml").read_text(encoding="utf-8")
    assert len(yaml.safe_load(text)["networks"]) == manifests.job["completions"]


def test_run_folder_is_on_the_shared_volume(manifests: Manifests) -> None:
    (volume,) = [v for v in manifests.job["template"]["spec"]["volumes"] if v["name"] == "runs"]
    (mount,) = [m for m in manifests.worker["volumeMounts"] if m["name"] == "runs"]
    claim = volume["persistentVolumeClaim"]["claimName"]
    assert options(manifests.worker)["run_dir"].startswith(f"{mount['mountPath']}/")
    assert manifests.specs[f"PersistentVolumeClaim/{claim}"]["accessModes"] == ["ReadWriteMany"]


def test_gpu_overlay_gives_each_worker_a_gpu() -> None:
    limits = [Manifests(directory).worker["resources"]["limits"] for directory in (BASE, GPU)]
    assert [limit.get("nvidia.com/gpu") for limit in limits] == [None, 1]


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Run the Deployment's command; returns the addresses that it prints when it is ready."""
    changed = {"--host": "127.0.0.1", "--port": "0", "--http-port": "0"}
    log = tmp_path / "coordinator.log"
    with process(command(Manifests(BASE).coordinator, changed), tmp_path, log) as child:
        wait_until(lambda: child.poll() is not None or "}\n" in log.read_text(), 30, "coordinator")
        assert child.poll() is None, log.read_text()
        (ready,) = [line for line in log.read_text().splitlines() if line.startswith("{")]
        yield json.loads(ready)


def test_coordinator_answers_probe_and_scrape(coordinator: dict[str, str]) -> None:
    with grpc.insecure_channel(coordinator["grpc"]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        reply = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    annotations = Manifests(BASE).deployment["template"]["metadata"]["annotations"]
    url = f"http://{coordinator['http']}{annotations['prometheus.io/path']}"
    with urllib.request.urlopen(url, timeout=10) as page:
        assert b"# HELP" in page.read()


@pytest.mark.timeout(180)
def test_job_command_trains(coordinator: dict[str, str], tmp_path: Path) -> None:
    run, ranks = tmp_path / "run", range(Manifests(BASE).job["completions"])
    changed = {"--master-addr": "127.0.0.1", "--master-port": str(free_port())}
    changed |= {"coordinator.address": coordinator["grpc"], "run_dir": str(run)}
    words = [*command(Manifests(BASE).worker, changed), "schedule.epochs=1", "schedule.max_steps=5"]
    with ExitStack() as stack:
        workers = []
        for rank in ranks:
            of_rank = [word.replace("$(JOB_COMPLETION_INDEX)", str(rank)) for word in words]
            log = tmp_path / f"worker-{rank}.log"
            workers.append(stack.enter_context(process(of_rank, tmp_path, log)))
        until = (
            time.monotonic() + 140
        )  # before pytest's timeout, which would leave processes behind
        while None in (codes := [w.poll() for w in workers]) and time.monotonic() < until:
            time.sleep(0.1)
    output = [f"{log.name}: {log.read_text()}" for log in sorted(tmp_path.glob("*.log"))]
    assert codes == [0, 0, 0], "\n".join(output)
    assert len(json.loads((run / "summary.json").read_text())["networks"]) == 3
    assert len(lines(run / "decisions.jsonl")) == 2 * 5
