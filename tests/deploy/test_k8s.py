"""Manifests in k8s/: drift, strict validation, consistency, and a training with their commands.

Not covered: a real cluster; pods with addresses of their own (`test_cluster.py`).
"""

import functools
import json
import re
import shlex
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from switokd.config.run_file import load
from switokd.coordination.client import plan_of
from switokd.coordination.connection import Connection
from switokd.coordination.membership import Endpoint, Membership
from switokd.deploying.storage import COORDINATOR_FILES, WORKER_FILES
from switokd.errors import EXIT_FAULT, EXIT_TERMINATED, NonFiniteError, PeerError, UsageError
from switokd.runtime.lifecycle import GRACE_SECONDS
from tests.certificates import Certificates
from tests.deploy.rendering import validation_errors
from tests.preloaded import call, switokd_command
from tests.support import REPOSITORY, free_port, lines, process, require, wait_until

BASE, GPU = REPOSITORY / "k8s/base", REPOSITORY / "k8s/overlays/gpu"
TLS = REPOSITORY / "k8s/overlays/tls"
KUSTOMIZATIONS = sorted(file.parent for file in REPOSITORY.glob("k8s/**/kustomization.yaml"))


@functools.cache
def render(directory: Path) -> str:
    command = [require("kubectl", "kubernetes-client"), "kustomize", str(directory)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def known(manifests: str) -> str:
    """The documents whose kinds the validator knows; `tests/deploying` validates the others."""
    foreign = ("kind: PodMonitor\n", "kind: PrometheusRule\n")
    parts = [p for p in manifests.split("\n---\n") if not any(kind in p for kind in foreign)]
    return "\n---\n".join(parts)


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


def variables(container: dict[str, Any]) -> dict[str, str]:
    """Environment variables of a container that have a value, not a reference."""
    return {v["name"]: v["value"] for v in container.get("env", []) if "value" in v}


def command(container: dict[str, Any], changed: dict[str, str], **env: str) -> list[str]:
    """Command of a container with its environment, and with changed name=value arguments.

    env: replaces environment variables.
    """
    assert changed.keys() <= options(container).keys()
    assert env.keys() <= {variable["name"] for variable in container.get("env", [])}
    words = [f"{name}={value}" for name, value in {**variables(container), **env}.items()]
    args = [
        f"{n}={changed[n]}" if (n := a.split("=")[0]) in changed else a for a in container["args"]
    ]
    return ["env", *words, *container["command"], *args]


def action(job: dict[str, Any], code: int) -> str:
    """What the Job does about a pod whose rank has ended with a code."""
    for rule in job["podFailurePolicy"]["rules"]:
        if (codes := rule.get("onExitCodes")) and code in codes["values"]:
            assert (codes["containerName"], codes["operator"]) == ("worker", "In")
            return str(rule["action"])
    return "Count"  # against backoffLimit


@pytest.fixture(params=KUSTOMIZATIONS, ids=lambda directory: directory.name)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return Manifests(request.param)


def test_what_is_committed_is_what_the_script_renders(tmp_path: Path) -> None:
    script = (REPOSITORY / "k8s/render.sh").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^switokd (k8s render .*)$", script, re.MULTILINE)
    assert len(commands) == len(KUSTOMIZATIONS)
    for words in commands:
        given = shlex.split(words.replace("$to", str(tmp_path)))
        code, _, err = call(tmp_path, switokd_command, *given)
        assert code == 0, err
    for folder in (tmp_path, REPOSITORY / "k8s"):
        assert sorted(file.parent.name for file in folder.rglob("kustomization.yaml")) == sorted(
            directory.name for directory in KUSTOMIZATIONS
        )
    again = "make k8s writes it anew"
    for directory in KUSTOMIZATIONS:
        other = tmp_path / directory.relative_to(REPOSITORY / "k8s")
        names = {file.name for file in directory.iterdir()}
        assert names == {file.name for file in other.iterdir()}, again
        for name in names:
            assert (directory / name).read_text() == (other / name).read_text(), (name, again)


@pytest.mark.parametrize("directory", KUSTOMIZATIONS, ids=lambda directory: directory.name)
def test_validates_strictly(directory: Path) -> None:
    assert validation_errors(known(render(directory))) == []


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
    given, job = variables(manifests.worker), manifests.job
    subdomain = job["template"]["spec"]["subdomain"]
    service = manifests.specs[f"Service/{subdomain}"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(given["WORLD_SIZE"])
    (rank,) = [v for v in manifests.worker["env"] if v["name"] == "RANK"]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert rank["valueFrom"]["fieldRef"]["fieldPath"] == index
    assert given["MASTER_ADDR"] == f"switokd-workers-0.{subdomain}"
    assert int(given["MASTER_PORT"]) == service["ports"][0]["port"]


def test_only_losses_are_tried_again(manifests: Manifests) -> None:
    job = manifests.job
    assert [action(job, e.exit_code) for e in (UsageError, NonFiniteError)] == ["FailJob"] * 2
    assert action(job, EXIT_TERMINATED) == "Ignore"
    assert action(job, PeerError.exit_code) == action(job, EXIT_FAULT) == "Count"
    assert job["backoffLimit"] >= job["completions"]
    conditions = [r.get("onPodConditions") for r in job["podFailurePolicy"]["rules"]]
    assert [{"type": "DisruptionTarget", "status": "True"}] in conditions
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] > GRACE_SECONDS
    assert options(manifests.worker)["resume"] == "auto"


def test_workers_find_the_coordinator(manifests: Manifests) -> None:
    service, port = options(manifests.worker)["coordinator.address"].split(":")
    target = {p["port"]: p["targetPort"] for p in manifests.specs[f"Service/{service}"]["ports"]}
    served = {p["name"]: p["containerPort"] for p in manifests.coordinator["ports"]}
    assert served[target[int(port)]] == int(options(manifests.coordinator)["--port"])


def test_probes_and_scraping_use_served_ports(manifests: Manifests) -> None:
    given, container = options(manifests.coordinator), manifests.coordinator
    for probe in (container["readinessProbe"], container["livenessProbe"]):
        if "--tls-certificate" in given:  # a gRPC probe cannot speak TLS
            assert "grpc" not in probe
            assert (probe["httpGet"]["path"], probe["httpGet"]["scheme"]) == ("/healthz", "HTTPS")
            assert probe["httpGet"]["port"] == int(given["--http-port"])
        else:
            assert probe["grpc"]["port"] == int(given["--port"])
    annotations = manifests.deployment["template"]["metadata"].get("annotations", {})
    if any(name.startswith("PodMonitor/") for name in manifests.specs):
        assert annotations == {}  # else Prometheus might read the metrics twice
    else:
        assert annotations["prometheus.io/port"] == given["--http-port"]


def test_one_rank_per_network_of_the_recipe(manifests: Manifests) -> None:
    recipe = manifests.worker["args"][0]
    assert recipe.startswith("digits-")
    text = (REPOSITORY / f"switokd/recipes/{recipe}.yaml").read_text(encoding="utf-8")
    assert len(yaml.safe_load(text)["networks"]) == manifests.job["completions"]


def test_run_folder_is_on_the_shared_volume(manifests: Manifests) -> None:
    assert manifests.job["completions"] > 1
    (volume,) = [v for v in manifests.job["template"]["spec"]["volumes"] if v["name"] == "runs"]
    (mount,) = [m for m in manifests.worker["volumeMounts"] if m["name"] == "runs"]
    claim = volume["persistentVolumeClaim"]["claimName"]
    assert options(manifests.worker)["run_dir"].startswith(f"{mount['mountPath']}/")
    assert manifests.specs[f"PersistentVolumeClaim/{claim}"]["accessModes"] == ["ReadWriteMany"]


def test_gpu_overlay_gives_each_worker_a_gpu() -> None:
    limits = [Manifests(directory).worker["resources"]["limits"] for directory in (BASE, GPU)]
    assert [limit.get("nvidia.com/gpu") for limit in limits] == [None, 1]


def mounted(manifests: Manifests, kind: str, folder: str) -> str:
    """The Secret whose files a container finds in a folder."""
    spec = (manifests.deployment if kind == "coordinator" else manifests.job)["template"]["spec"]
    container = manifests.coordinator if kind == "coordinator" else manifests.worker
    (name,) = [m["name"] for m in container["volumeMounts"] if m["mountPath"] == folder]
    (volume,) = [v for v in spec["volumes"] if v["name"] == name]
    secret: str = volume["secret"]["secretName"]
    return secret


def test_plain_text_is_only_where_the_base_says_so() -> None:
    base, tls = Manifests(BASE), Manifests(TLS)
    for manifests, allowed in ((base, True), (tls, False)):
        assert ("--allow-plaintext" in manifests.coordinator["args"]) is allowed
        assert ("coordinator.allow_plaintext=true" in manifests.worker["args"]) is allowed


def test_the_secrets_of_the_tls_overlay_serve_its_commands(tmp_path: Path) -> None:
    """Its Secrets, as the page makes them; its coordinator; what its workers are told."""
    manifests, files = Manifests(TLS), Certificates(tmp_path)
    page = (REPOSITORY / "docs/kubernetes.md").read_text(encoding="utf-8").replace("\\\n", "")
    secrets: dict[str, set[str]] = {}
    for name, keys in re.findall(r"secret generic ([\w-]+)(.*)", page):
        secrets[name] = set(re.findall(r"--from-file=([\w.]+)=", keys))
    assert secrets == {
        "switokd-coordinator": {*COORDINATOR_FILES},
        "switokd-worker": {*WORKER_FILES},
    }
    given, worker = options(manifests.coordinator), options(manifests.worker)
    for kind, values in (("coordinator", given), ("worker", worker)):
        paths = [v for v in values.values() if v.startswith("/etc/switokd/tls/")]
        names = {path.rpartition("/")[2] for path in paths}
        assert names == secrets[mounted(manifests, kind, "/etc/switokd/tls")]
    changed = {"--host": "127.0.0.1", "--port": "0", "--http-port": "0"}
    changed |= {
        "--journal": str(tmp_path / "journal.db"),
        "--tls-certificate": files.path("server.crt"),
        "--tls-key": files.path("server.key"),
        "--worker-token-file": files.path("worker.token"),
        "--operator-token-file": files.path("operator.token"),
    }
    with process(command(manifests.coordinator, changed), tmp_path) as child:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        named = ready["grpc"].replace("127.0.0.1", "localhost")
        settings = {**worker, "coordinator.address": named}
        settings["coordinator.tls.ca"] = files.path("ca.crt")
        settings["coordinator.token_file"] = files.path("worker.token")
        config = load(manifests.worker["args"][0], [f"{k}={v}" for k, v in settings.items()])
        plan = plan_of(config, config.placement_on(3), 1)
        connection = Connection(Membership(Endpoint(named), "r", 0), config.coordinator, plan)
        assert connection.join_first(config.coordinator, print) == ""
        connection.close()


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Run the Deployment's command; returns the addresses that it prints when it is ready."""
    changed = {"--host": "127.0.0.1", "--port": "0", "--http-port": "0"}
    changed |= {"--journal": str(tmp_path / "journal.db")}
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


@contextmanager
def pods(coordinator: str, folder: Path, *settings: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Run the Job's command once per pod, with additional settings; one log file each."""
    container, job = Manifests(BASE).worker, Manifests(BASE).job
    changed = {"coordinator.address": coordinator, "run_dir": str(folder / "run")}
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env["SWITOKD_HEARTBEAT_FOLDER"] = str(folder / "heartbeats")
    with ExitStack() as stack:
        workers = []
        for rank in range(job["completions"]):
            words = [*command(container, changed, **env, RANK=str(rank)), *settings]
            log = folder / f"worker-{rank}.log"
            workers.append(stack.enter_context(process(words, folder, log)))
        yield workers


def ended(workers: list[subprocess.Popen[str]]) -> list[int]:
    """Wait until all pods have ended, and return their codes."""
    wait_until(lambda: None not in [w.poll() for w in workers], 90, "the end of all ranks")
    return [w.returncode for w in workers]


def logs(folder: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text()}" for log in sorted(folder.glob("*.log")))


@pytest.mark.timeout(240)
def test_job_command_trains_and_continues_after_an_eviction(
    coordinator: dict[str, str], tmp_path: Path
) -> None:
    """Kubernetes sends SIGTERM to one pod, and then makes new ones with the same command."""
    run, settings = tmp_path / "run", ["schedule.epochs=3", "schedule.max_steps=40"]
    record = run / "decisions.jsonl"
    with pods(coordinator["grpc"], tmp_path, *settings) as workers:
        wait_until(lambda: record.exists() and len(lines(record)) >= 2 * 5, 90, "5 steps")
        workers[1].send_signal(signal.SIGTERM)
        assert ended(workers) == [143, 143, 143], logs(tmp_path)
    with pods(coordinator["grpc"], tmp_path, *settings) as workers:
        assert ended(workers) == [0, 0, 0], logs(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert (len(summary["networks"]), summary["restarts"], summary["steps_lost"]) == (3, 1, 0)
    assert len(lines(record)) == 2 * 40


def test_job_command_hands_on_the_exit_code_of_a_mistake(tmp_path: Path) -> None:
    with pods("127.0.0.1:1", tmp_path, "schedule.epochs=nonsense") as workers:
        assert ended(workers) == [2, 2, 2], logs(tmp_path)
