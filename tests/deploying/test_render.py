"""`switokd k8s render`: what the objects say, validated strictly, and every mistake in one line.

Not covered: pods that run (`tests/deploy/test_cluster.py`); the folders in k8s/ (`test_k8s.py`).
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from switokd.config.run_file import load
from switokd.deploying.monitoring import alert_groups
from switokd.deploying.options import PodOptions, RenderOptions
from switokd.deploying.render import render
from switokd.deploying.storage import COORDINATOR_FILES, WORKER_FILES
from tests.deploy.policies import allows
from tests.deploy.rendering import Manifest, command, of_kind, rendered
from tests.support import REPOSITORY

VERSION = "1.31"
MODELS = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}

FIVE = """\
name: My_Five
topology: 3T2S
data: {dataset: digits}
teacher: {model: wrn-10-1}
student: {model: "ownnets:small"}
networks: {teacher2: {ranks: 2}}
"""
OWN = """\
def small(**_: object) -> None:
    raise NotImplementedError("nobody builds it here")
"""


@pytest.fixture
def five(tmp_path: Path) -> str:
    """A run file of six ranks, with a module of its own beside it."""
    (tmp_path / "five.yaml").write_text(FIVE)
    (tmp_path / "ownnets.py").write_text(OWN)
    return str(tmp_path / "five.yaml")


def pod_of(objects: list[Manifest]) -> Manifest:
    """The pod template of the workers, whatever makes it."""
    kinds = {each["kind"]: each for each in objects}
    if "Job" in kinds:
        return dict(kinds["Job"]["spec"]["template"])
    spec = kinds["JobSet"]["spec"] if "JobSet" in kinds else None
    spec = spec or kinds["TrainingRuntime"]["spec"]["template"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    return dict(replicated["template"]["spec"]["template"])


def worker_of(objects: list[Manifest]) -> Manifest:
    (container,) = pod_of(objects)["spec"]["containers"]
    return dict(container)


def variables(container: Manifest) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


def check(objects: list[Manifest]) -> None:
    """Validate each object by the strictest description of its kind that there is."""
    from cloudcoil.models.prometheus_operator import v1

    for each in objects:
        kind = each["kind"]
        if kind in MODELS:
            model = MODELS[kind].from_dict(each)
            assert model is not None
            assert model.to_dict() == each, kind  # unknown keys would be gone
        elif kind in ("PodMonitor", "PrometheusRule"):
            found = getattr(v1, kind).model_validate(each)
            assert found.model_dump(mode="json", by_alias=True, exclude_unset=True) == each
        else:
            kubernetes_validate.validate(each, VERSION, strict=True)


@pytest.mark.parametrize("flavor", ["job", "jobset", "trainjob"])
@pytest.mark.parametrize("more", [[], ["--tls", "--namespace=team", "--gpus-per-pod=2"]])
def test_every_object_is_valid(five: str, flavor: str, more: list[str]) -> None:
    objects = rendered(five, f"--flavor={flavor}", *more)
    check(objects)
    kinds = {each["kind"] for each in objects}
    assert {"Deployment", "NetworkPolicy", "PodMonitor", "PrometheusRule", "ConfigMap"} <= kinds
    namespaces = {each["metadata"].get("namespace") for each in objects}
    assert namespaces == ({"team"} if more else {None})


def test_a_misspelling_is_found() -> None:
    for kind, flavor in (("Job", "job"), ("JobSet", "jobset"), ("PodMonitor", "job")):
        objects = rendered("digits-2t1s", f"--flavor={flavor}")
        of_kind(objects, kind)["spec"]["misspelt"] = 1
        with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
            check(objects)


@pytest.mark.parametrize(
    ("here", "pods"), [("1", 6), ("2", 3), ("3", 2), ("6", 1)], ids=lambda value: str(value)
)
def test_ranks_fill_the_pods(five: str, here: str, pods: int) -> None:
    objects = rendered(five, f"--ranks-per-pod={here}")
    job, worker = of_kind(objects, "Job")["spec"], worker_of(objects)
    assert (job["completions"], job["parallelism"]) == (pods, pods)
    given = variables(worker)
    assert (given["WORLD_SIZE"], given["LOCAL_WORLD_SIZE"]) == ("6", here)
    index = given["RANK" if here == "1" else "NODE_RANK"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert ("NODE_RANK" in given) is (worker["command"][-1] == "switokd.cli.pod_ranks")
    assert given["MASTER_ADDR"] == "my-five-workers-0.my-five-workers"
    said = pod_of(objects)["metadata"]["annotations"]["switokd/placement"]
    assert said == str(load(five).placement_on(6))
    modes = of_kind_named(objects, "my-five-runs")["spec"]["accessModes"]
    assert modes == ["ReadWriteMany" if pods > 1 else "ReadWriteOnce"]


def of_kind_named(objects: list[Manifest], name: str) -> Manifest:
    (found,) = [
        each
        for each in objects
        if each["metadata"]["name"] == name and each["kind"] == "PersistentVolumeClaim"
    ]
    return found


def test_gpus_are_those_of_the_ranks(five: str) -> None:
    objects = rendered(five, "--gpus-per-pod=2")
    assert worker_of(objects)["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert variables(worker_of(objects))["LOCAL_WORLD_SIZE"] == "2"
    assert pod_of(objects)["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    one = rendered(five, "device=cuda")
    assert worker_of(one)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "tolerations" not in pod_of(rendered(five))["spec"]


def test_the_run_file_and_its_module_travel_along(five: str, tmp_path: Path) -> None:
    objects = rendered(five, "schedule.epochs=2")
    content = of_kind(objects, "ConfigMap")["data"]
    assert content == {"run.yaml": FIVE, "ownnets.py": OWN}
    words = worker_of(objects)["args"]
    assert words[:2] == ["/etc/switokd/run/run.yaml", "schedule.epochs=2"]
    there = tmp_path / "there"
    there.mkdir()
    for name, text in content.items():
        (there / name).write_text(text)
    config = load(str(there / "run.yaml"), words[1:])
    assert (config.resume, config.run_dir) == ("auto", "/runs/My_Five")
    assert config.coordinator.address == "my-five-coordinator:50051"


def test_the_flavors_differ_in_the_names_of_hosts_and_container_only() -> None:
    by_flavor = {f: rendered("digits-2t1s", f"--flavor={f}") for f in ("job", "jobset", "trainjob")}
    hosts = {f: variables(worker_of(o)).pop("MASTER_ADDR") for f, o in by_flavor.items()}
    assert hosts == {
        "job": "digits-2t1s-workers-0.digits-2t1s-workers",
        "jobset": "digits-2t1s-workers-0-0.digits-2t1s-workers",
        "trainjob": "digits-2t1s-node-0-0.digits-2t1s-workers",
    }
    pods = []
    for objects in by_flavor.values():
        pod = pod_of(objects)
        pod["spec"].pop("subdomain", None)
        (container,) = pod["spec"]["containers"]
        container["env"] = [e for e in container["env"] if e["name"] != "MASTER_ADDR"]
        container["name"] = ""
        pods.append(pod)
    assert pods[0] == pods[1] == pods[2]


def test_failures_that_do_not_count() -> None:
    for flavor in ("job", "jobset", "trainjob"):
        text = yaml.safe_dump(rendered("digits-2t1s", f"--flavor={flavor}"))
        assert "type: DisruptionTarget" in text
    spec = of_kind(rendered("digits-2t1s", "--flavor=jobset"), "JobSet")["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (replicated,) = spec["replicatedJobs"]
    assert replicated["template"]["spec"]["backoffLimit"] == 0


def test_nobody_may_connect_who_need_not() -> None:
    objects = rendered("digits-2t1s")
    for client, server, port, is_allowed in (
        ("worker", "worker", 29500, True),
        ("worker", "worker", 40404, True),
        ("worker", "coordinator", 50051, True),
        ("worker", "coordinator", 9464, False),
        ("coordinator", "worker", 29500, False),
    ):
        assert allows(objects, client, server, port) is is_allowed, (client, server, port)
    policies = [o for o in objects if o["kind"] == "NetworkPolicy"]
    (prometheus,) = [
        rule
        for policy in policies
        for rule in policy["spec"].get("ingress", [])
        if "namespaceSelector" in rule["from"][0]
    ]
    assert [each["port"] for each in prometheus["ports"]] == [9464]


def test_the_data_set_has_its_volume() -> None:
    objects = rendered("cifar100-2t1s", "--data-claim=cifar")
    worker = worker_of(objects)
    assert {"name": "data", "mountPath": "/data", "readOnly": True} in worker["volumeMounts"]
    assert worker["args"][-1] == "data.root=/data"
    assert "port: 443" not in yaml.safe_dump(objects)
    downloading = rendered("cifar100-2t1s", "data.download=true")
    assert of_kind_named(downloading, "cifar100-2t1s-data")["spec"]["resources"]
    assert {"name": "data", "mountPath": "/data"} in worker_of(downloading)["volumeMounts"]
    assert "port: 443" in yaml.safe_dump(downloading)


def test_mlflow_writes_where_a_pod_may_write() -> None:
    """The root file system is read-only, and mlruns/ in the current folder would be there."""
    of_files = variables(worker_of(rendered("digits-2t1s", "observers=[mlflow]")))
    assert of_files["MLFLOW_TRACKING_URI"] == "file:///runs/mlruns"
    server = "tracking.kwargs={mlflow: {tracking_uri: 'http://mlflow.example.org'}}"
    of_server = worker_of(rendered("digits-2t1s", "observers=[mlflow]", server))
    assert "MLFLOW_TRACKING_URI" not in variables(of_server)
    assert "MLFLOW_TRACKING_URI" not in variables(worker_of(rendered("digits-2t1s")))


@pytest.mark.parametrize(
    "setting",
    [
        "tracking.kwargs={mlflow: {tracking_uri: 'http://mlflow.example.org'}}",
        "tracking.kwargs={wandb: {mode: online}}",
        "tracking.traces_every=100",
    ],
)
def test_servers_that_the_policies_keep_away_are_told(setting: str) -> None:
    def notes(*settings: str) -> str:
        options = RenderOptions("switokd:1", pods=PodOptions(memory="2Gi"))
        return "\n".join(render("digits-2t1s", settings, options).notes)

    watched = "observers=[mlflow,wandb]"
    assert setting.partition("=")[0] in notes(watched, setting)
    assert "egress" not in notes(watched)


def test_another_coordinator_is_used() -> None:
    objects = rendered("digits-2t1s", "--tls", "coordinator.address=c.example.org:50051")
    assert {"Deployment", "PodMonitor"}.isdisjoint(each["kind"] for each in objects)
    assert "coordinator.address=c.example.org:50051" in worker_of(objects)["args"]


def test_the_alerts_are_those_of_the_repository() -> None:
    text = (REPOSITORY / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8")
    assert alert_groups() == yaml.safe_load(text)["groups"]
    assert of_kind(rendered("digits-2t1s"), "PrometheusRule")["spec"]["groups"] == alert_groups()


def test_secrets_are_written_to_a_private_file_only(tmp_path: Path) -> None:
    certificates, folder = tmp_path / "certs", tmp_path / "out"
    certificates.mkdir()
    for name in {*COORDINATOR_FILES.values(), *WORKER_FILES.values()}:
        (certificates / name).write_text(f"content of {name}\nx\n")
    given = ["digits-2t1s", "--image=a:1", "--memory=2Gi", f"--secrets-from={certificates}"]
    code, out, err = command(*given)
    assert (code, out) == (2, "")
    assert "Secrets are not printed; name a folder with --output" in err
    code, out, err = command(*given, f"--output={folder}")
    assert code == 0, err
    assert "content of" not in out + err
    file = folder / "secrets.yaml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    objects = list(yaml.safe_load_all(file.read_text()))
    check(objects)
    names = {each["metadata"]["name"]: each["stringData"] for each in objects}
    assert {*names} == {"digits-2t1s-coordinator", "digits-2t1s-worker"}
    assert names["digits-2t1s-worker"]["token"] == "content of worker.token\nx\n"
    assert "secrets.yaml" not in (folder / "kustomization.yaml").read_text()
    code, _, _ = command("digits-2t1s", "--image=a:1", "--memory=2Gi", f"--output={folder}")
    assert code == 0
    assert not file.exists()  # nothing of an earlier rendering stays


MISTAKES = {
    "--prometheus-label: found 'release'; allowed: KEY=VALUE": [
        *("digits-2t1s", "--image=a:1", "--prometheus-label=release"),
    ],
    "--image is missing": ["digits-2t1s"],
    "--image: found 'a b'": ["digits-2t1s", "--image=a b"],
    "--flavor: found jobs; allowed: job, jobset, trainjob": [
        *("digits-2t1s", "--image=a:1", "--flavor=jobs")
    ],
    "--name: found 'A_b'; allowed: a DNS label": ["digits-2t1s", "--image=a:1", "--name=A_b"],
    "--namespace: found '-'": ["digits-2t1s", "--image=a:1", "--namespace=-"],
    "--memory: found '2'; allowed": ["digits-2t1s", "--image=a:1", "--memory=2"],
    "--gpus-per-pod: found 2, and the 3 ranks of digits-2t1s cannot": [
        *("digits-2t1s", "--image=a:1", "--gpus-per-pod=2")
    ],
    "--ranks-per-pod: found 2, and the 3 ranks": [
        "digits-2t1s",
        "--image=a:1",
        "--ranks-per-pod=2",
    ],
    "and the run has device: cpu": ["digits-2t1s", "--image=a:1", "--gpus-per-pod=1", "device=cpu"],
    "--ranks: found 4": ["digits-2t1s", "--image=a:1", "--ranks=4"],
    "say how many with --ranks": ["digits-2t1s", "--image=a:1", "placement=replicated"],
    "--data-claim is missing: cifar100": ["cifar100-2t1s", "--image=a:1"],
    "in the pods it must be inside /runs": ["digits-2t1s", "--image=a:1", "run_dir=/elsewhere"],
    "leave resume out": ["digits-2t1s", "--image=a:1", "resume=never"],
    "did you mean": ["digits-2t1s", "--image=a:1", "schedule.epoch=3"],
    "there is no option --imag": ["digits-2t1s", "--imag=3"],
    "no such run file, and no recipe": ["nothing-here", "--image=a:1"],
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_is_one_line(said: str) -> None:
    code, out, err = command(*MISTAKES[said])
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_all_mistakes_are_told() -> None:
    code, _, err = command("digits-2t1s", "--flavor=jobs", "--name=A", "schedule.epoch=3")
    assert code == 2
    lines = err.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["--image", "--flavor:", "--name:"]
    assert "schedule.epoch" in lines[3]


def test_the_help_teaches() -> None:
    code, out, _ = command("--help")
    assert code == 0
    for text in ("switokd k8s render digits-2t1s", "--data-claim", "completion index", "--flavor"):
        assert text in out
