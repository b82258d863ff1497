"""What a run needs of a cluster: packages, memory, space, ports, and labels.

Not covered: the objects as a whole (`test_render.py`).
"""

from __future__ import annotations

from switokd.deploying.options import PodOptions, RenderOptions
from switokd.deploying.render import render
from tests.deploy.rendering import of_kind, rendered
from tests.deploying.test_render import worker_of


def test_ranks_and_coordinator_trace_the_same_steps() -> None:
    deployment = of_kind(rendered("digits-2t1s", "tracking.traces_every=100"), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert "--traces-every=100" in container["args"]
    deployment = of_kind(rendered("digits-2t1s"), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert not [word for word in container["args"] if "traces" in word]


def test_no_temporary_folder_fills_the_disk_of_a_node() -> None:
    templates = [
        each["spec"]["template"]["spec"]
        for each in rendered("digits-2t1s")
        if each["kind"] in ("Job", "Deployment")
    ]
    folders = [v["emptyDir"] for spec in templates for v in spec["volumes"] if "emptyDir" in v]
    assert len(folders) == 3
    assert all(folder["sizeLimit"] for folder in folders)


def test_packages_that_the_image_lacks_are_told() -> None:
    options = RenderOptions("switokd:1", pods=PodOptions(memory="2Gi"))
    settings = ["observers=[wandb,mlflow]", "networks.student.model=timm:resnet18"]
    notes = render("digits-2t1s", settings, options).notes
    assert any("the packages of switokd[mlflow,timm,wandb]" in note for note in notes), notes
    assert not any("your modules" in note for note in notes)
    assert not any("switokd[" in note for note in render("digits-2t1s", [], options).notes)


def test_the_memory_that_is_asked_for_is_requested() -> None:
    options = RenderOptions("switokd:1", pods=PodOptions(memory="512Mi"))
    files = render("digits-2t1s", [], options).files
    (job,) = [each for each in files["workers.yaml"] if each["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"]["memory"] == "512Mi"
    assert container["resources"]["limits"]["memory"] == "2Gi"


def test_a_data_set_can_be_downloaded() -> None:
    objects = rendered("fashion-2t1s", "data.download=true")
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    ports = [
        p["port"]
        for each in policies
        for e in each["spec"].get("egress", [])
        for p in e.get("ports", [])
    ]
    assert {80, 443} <= set(ports)
    mounts = worker_of(objects)["volumeMounts"]
    assert [m for m in mounts if m["mountPath"] == "/data"] == [
        {"name": "data", "mountPath": "/data"}
    ]


def test_labels_by_which_prometheus_selects_its_objects() -> None:
    objects = rendered("digits-2t1s", "--prometheus-label=release=kps", "--prometheus-label=a/b=")
    for kind in ("PodMonitor", "PrometheusRule"):
        labels = of_kind(objects, kind)["metadata"]["labels"]
        assert (
            labels.items()
            >= {"release": "kps", "a/b": "", "app.kubernetes.io/name": "switokd"}.items()
        )
    assert "release" not in of_kind(objects, "Deployment")["metadata"]["labels"]
