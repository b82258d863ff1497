"""Runs rendered manifests on this machine, each pod in namespaces of its own with its own address.

    unshare -nmp --fork --kill-child python -m tests.deploy.cluster PLAN.json

It does what the kubelet and the controllers of Kubernetes would: volumes are folders, references
in the environment are resolved, names are those of the Services, probes are executed, a pod that
fails is treated by the Job's podFailurePolicy and made anew, with another address. All namespaces
and mounts belong to the process, so that nothing outlives it.

Not covered: images, scheduling, limits; the waiting time before a new pod is shorter.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.flows import Flow, flows_of
from tests.deploy.programs import may_be_read, programs
from tests.support import BIN, REPOSITORY

Manifest = dict[str, Any]

NETWORK = "10.84.0"
BACKOFF_SECONDS = 2.0
"""Time before a new pod; Kubernetes waits 10 s at first."""
PROBE_SECONDS = 2.0
"""Time between two probes of a pod; manifests have longer ones."""
INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass
class Pod:
    """A pod: its template, and its process once it has one."""

    name: str
    hostname: str
    template: Manifest
    index: int | None = None
    address: str = ""
    process: subprocess.Popen[bytes] | None = None
    has_started: bool = False
    probed_at: float = 0.0
    failures: int = 0
    """Failures of the liveness probe since its last success."""

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.template["spec"]
        return spec

    @property
    def container(self) -> Manifest:
        (container,) = self.spec["containers"]
        return dict(container)

    @property
    def first_process(self) -> int:
        """Process id of the container's process 1; 0 if there is none."""
        assert self.process
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return int((path.read_text().split() or ["0"])[0])
        except OSError:
            return 0

    @property
    def code(self) -> int | None:
        """Exit code as the kubelet tells it; None while the pod runs."""
        assert self.process
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code


@dataclass
class Cluster:
    """A machine with pods. folder: for volumes, logs and results."""

    folder: Path
    objects: list[Manifest]
    pods: list[Pod] = field(default_factory=list)
    probes: dict[str, int] = field(default_factory=dict)
    """How often each kind of probe has succeeded."""
    flows: set[Flow] = field(default_factory=set)
    components: dict[str, str] = field(default_factory=dict)
    """Component by address, also of pods that are gone."""
    _made: int = 0

    def set_up(self) -> None:
        """Make the bridge to which all pods are connected."""
        Path(self.folder, "hosts").touch()
        shutil.copy("/etc/passwd", self.folder / "passwd")
        with (self.folder / "passwd").open("a") as file:
            file.write("switokd:x:10001:10001::/nonexistent:/usr/sbin/nologin\n")
        subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
        for words in (
            "link set lo up",
            "link add pods type bridge",
            f"addr add {NETWORK}.1/24 dev pods",
            "link set pods up",
        ):
            ip(words)

    def of_kind(self, kind: str) -> list[Manifest]:
        return [each for each in self.objects if each["kind"] == kind]

    def start(self, pod: Pod) -> None:
        """Give a pod its network, and start its container."""
        self._made += 1
        host, network = f"pod{self._made}", f"net{self._made}"
        pod.address = f"{NETWORK}.{self._made + 1}"
        ip(f"netns add {network}")
        ip(f"link add {host} type veth peer name eth0 netns {network}")
        ip(f"link set {host} master pods up")
        for words in ("link set lo up", f"addr add {pod.address}/24 dev eth0", "link set eth0 up"):
            ip(f"-n {network} {words}")
        self.components[pod.address] = pod.template["metadata"]["labels"][
            "app.kubernetes.io/component"
        ]
        self.pods = [other for other in self.pods if other.name != pod.name] + [pod]
        self._write_hosts()
        here = self.folder / f"pod-{self._made}-{pod.name}"
        here.mkdir()
        (here / "root").mkdir()
        (here / "spec.json").write_text(json.dumps(self._spec(pod, here)))
        inside = [sys.executable, str(REPOSITORY / "tests/deploy/pod.py"), str(here / "spec.json")]
        with (here / "log").open("wb") as log:
            command = ["ip", "netns", "exec", network, *inside]
            pod.process = subprocess.Popen(command, stdout=log, stderr=log)

    def _write_hosts(self) -> None:
        """Write the names that the Services give; the pods' files are this one."""
        lines = ["127.0.0.1 localhost"]
        for service in self.of_kind("Service"):
            name, spec = service["metadata"]["name"], service["spec"]
            for pod in self.pods:
                labels = pod.template["metadata"]["labels"]
                if not spec["selector"].items() <= labels.items():
                    continue
                if spec.get("clusterIP") != "None":
                    lines.append(f"{pod.address} {name}")
                elif spec["publishNotReadyAddresses"] and pod.spec.get("subdomain") == name:
                    lines.append(f"{pod.address} {pod.hostname}.{name} {pod.hostname}")
        with (self.folder / "hosts").open("r+") as file:
            file.truncate()
            file.write("\n".join(lines) + "\n")

    def _spec(self, pod: Pod, here: Path) -> Manifest:
        container, security = pod.container, pod.spec["securityContext"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        is_root = not may_be_read(programs())
        return {
            "root": str(here / "root"),
            "read_only": container["securityContext"]["readOnlyRootFilesystem"],
            "hostname": pod.hostname,
            "folder": "/tmp",
            "user": 0 if is_root else security["runAsUser"],
            "group": 0 if is_root else security["runAsGroup"],
            "env": self._environment(pod),
            "command": [*container["command"], *container["args"]],
            "programs": programs(),
            "files": {
                "/etc/hosts": str(self.folder / "hosts"),
                "/etc/passwd": str(self.folder / "passwd"),
            },
            "mounts": list(self._mounts(pod, here)),
        }

    def _environment(self, pod: Pod) -> dict[str, str]:
        """What the image has, and the manifest's variables."""
        found = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONUNBUFFERED": "1"}
        for variable in pod.container.get("env", []):
            if "value" in variable:
                found[variable["name"]] = variable["value"]
                continue
            reference = variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert reference == f"metadata.annotations['{INDEX}']"
            found[variable["name"]] = str(pod.index)
        return found

    def _mounts(self, pod: Pod, here: Path) -> Iterator[Manifest]:
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for mounted in pod.container["volumeMounts"]:
            source = self._folder_of(volumes[mounted["name"]], here)
            read_only = mounted.get("readOnly", False)
            yield {"target": mounted["mountPath"], "source": str(source), "read_only": read_only}

    def _folder_of(self, volume: Manifest, here: Path) -> Path:
        files: dict[str, str] = {}
        if "persistentVolumeClaim" in volume:
            claim: str = volume["persistentVolumeClaim"]["claimName"]
            assert claim in [c["metadata"]["name"] for c in self.of_kind("PersistentVolumeClaim")]
            folder: Path = self.folder / "volumes" / claim
        else:
            folder = here / volume["name"]
            assert {"emptyDir", "configMap", "secret"} & volume.keys()
        if "configMap" in volume:
            files = self._content("ConfigMap", volume["configMap"]["name"], "data")
        if "secret" in volume:
            files = self._content("Secret", volume["secret"]["secretName"], "stringData")
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
        for name, text in files.items():
            (folder / name).write_text(text)
        return folder

    def _content(self, kind: str, name: str, key: str) -> dict[str, str]:
        (found,) = [o for o in self.of_kind(kind) if o["metadata"]["name"] == name]
        return dict(found[key])

    def probe(self, pod: Pod) -> None:
        """Execute the probe that is due, and kill the pod if it has failed too often."""
        if time.monotonic() - pod.probed_at < PROBE_SECONDS or not pod.first_process:
            return
        pod.probed_at = time.monotonic()
        self.flows |= flows_of(pod.first_process, pod.address)
        if not pod.has_started:
            first = "startupProbe" if "startupProbe" in pod.container else "readinessProbe"
            pod.has_started = self._succeeds(pod, first)
            return
        is_alive = self._succeeds(pod, "livenessProbe")
        pod.failures = 0 if is_alive else pod.failures + 1
        if pod.failures >= pod.container["livenessProbe"]["failureThreshold"]:
            kill(pod)

    def _succeeds(self, pod: Pod, kind: str) -> bool:
        probe = pod.container[kind]
        if "exec" in probe:
            command = ["nsenter", "-t", str(pod.first_process), "-a", "-r", "-w"]
            done = subprocess.run([*command, *probe["exec"]["command"]], capture_output=True)
            succeeds = done.returncode == 0
        else:
            succeeds = is_serving(f"{pod.address}:{probe['grpc']['port']}")
        self.probes[kind] = self.probes.get(kind, 0) + succeeds
        return succeeds

    def end(self) -> None:
        """End all pods."""
        for pod in self.pods:
            if pod.process and pod.code is None:
                kill(pod)
                pod.process.wait(20)


def kill(pod: Pod) -> None:
    """Kill the first process of a pod, and with it the kernel kills all others."""
    assert pod.process
    with suppress(ProcessLookupError):
        os.kill(pod.first_process or pod.process.pid, signal.SIGKILL)


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


def is_serving(address: str) -> bool:
    """Ask gRPC's health service, as the kubelet does."""
    with grpc.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            reply = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def job_of(cluster: Cluster) -> tuple[Manifest, str]:
    """The Job of the workers and its name; that of a JobSet as the controllers make it."""
    for each in cluster.of_kind("Job"):
        return each["spec"], each["metadata"]["name"]
    job_sets = [(o["metadata"]["name"], o["spec"]) for o in cluster.of_kind("JobSet")]
    for runtime in cluster.of_kind("TrainingRuntime"):
        (train_job,) = cluster.of_kind("TrainJob")
        assert train_job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
        job_sets.append((train_job["metadata"]["name"], runtime["spec"]["template"]["spec"]))
    ((name, spec),) = job_sets
    (replicated,) = spec["replicatedJobs"]
    job: Manifest = replicated["template"]["spec"]
    network = spec["network"]
    assert network["enableDNSHostnames"]
    labels = job["template"]["metadata"]["labels"]
    job["template"]["spec"]["subdomain"] = network["subdomain"]
    headless = {"clusterIP": "None", "selector": labels, **network}
    service = {"kind": "Service", "metadata": {"name": network["subdomain"]}, "spec": headless}
    cluster.objects.append(service)
    return job, f"{name}-{replicated['name']}-0"


def action(job: Manifest, code: int) -> str:
    """What the Job's podFailurePolicy says about an exit code."""
    for rule in job["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", []):
            return str(rule["action"])
    return "Count"


class Killing(threading.Thread):
    """Kills the pod with an index once the run has saved a checkpoint."""

    def __init__(self, index: int, run: Path) -> None:
        super().__init__(daemon=True)
        self._index, self._run = index, run
        self.pods: dict[int, Pod] = {}

    def run(self) -> None:
        while not any(self._run.glob("checkpoints/step-*")):
            time.sleep(0.005)
        kill(self.pods[self._index])


def run_job(cluster: Cluster, killing: Killing | None) -> dict[str, Any]:
    """Run the coordinator and the Job to its end; return what has happened."""
    for deployment in cluster.of_kind("Deployment"):
        name = deployment["metadata"]["name"]
        cluster.start(Pod(name, name, deployment["spec"]["template"]))
    job, name = job_of(cluster)
    assert job["completionMode"] == "Indexed"

    def new(index: int) -> Pod:
        host = f"{name}-{index}"
        pod = Pod(host, host, job["template"], index)
        cluster.start(pod)
        return pod

    pods = {index: new(index) for index in range(job["completions"])}
    if killing:
        killing.pods = pods
        killing.start()
    ended: list[tuple[int, int]] = []
    waiting: dict[int, float] = {}
    failed, complete = 0, set[int]()
    while len(complete) < job["completions"]:
        time.sleep(0.02)
        for pod in cluster.pods:
            if pod.index is None and pod.code is not None:
                raise AssertionError(f"the coordinator has ended with {pod.code}")
            if pod.code is None:
                cluster.probe(pod)
        for index, pod in pods.items():
            if index in complete or index in waiting or (code := pod.code) is None:
                continue
            ended.append((index, code))
            if code == 0:
                complete.add(index)
                continue
            said = action(job, code)
            failed += said == "Count"
            if said == "FailJob" or failed > job["backoffLimit"]:
                return {"state": "Failed", "ended": ended}
            waiting[index] = time.monotonic() + BACKOFF_SECONDS
        for index, when in list(waiting.items()):
            if time.monotonic() > when:
                del waiting[index]
                pods[index] = new(index)
    return {"state": "Complete", "ended": ended}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(plan["folder"])
    objects = list(yaml.safe_load_all(Path(plan["manifests"]).read_text()))
    cluster = Cluster(folder, objects)
    cluster.set_up()
    killing = None
    if plan["kill"] is not None:
        killing = Killing(plan["kill"], folder / "volumes" / plan["run"])
    try:
        result = run_job(cluster, killing)
    finally:
        cluster.end()
    named = [
        [cluster.components.get(flow.client, "other"), cluster.components[flow.server], flow.port]
        for flow in cluster.flows
    ]
    flows = sorted(map(list, {tuple(flow) for flow in named}), key=str)
    report = {**result, "probes": cluster.probes, "flows": flows}
    (folder / "result.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
