"""The memory of a pod: that of the planner's dry run.

Not covered: how much memory a training really takes.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from switokd.config.run_file import load
from switokd.deploying.estimate import CPU_PROCESS, GIBIBYTE, GPU_PROCESS, estimate
from switokd.deploying.facts import PodShape
from switokd.planning.dry_run import dry_run
from tests.preloaded import call, switokd_command


def test_a_pod_has_the_memory_of_its_ranks() -> None:
    config = load("digits-2t1s")
    networks = {n.name: n.memory_bytes / GIBIBYTE for n in dry_run(config).networks}
    apart, together = estimate(config, PodShape(3, 1, 0)), estimate(config, PodShape(1, 3, 0))
    assert apart.gpu == max(networks.values())
    assert CPU_PROCESS + max(networks.values()) < apart.pod < CPU_PROCESS + 0.5
    assert 3 * CPU_PROCESS + sum(networks.values()) < together.pod < 3 * CPU_PROCESS + 0.5
    on_gpus = estimate(config, PodShape(3, 1, 1))
    assert GPU_PROCESS < on_gpus.pod < GPU_PROCESS + 0.5  # the networks are on the GPU


def test_a_larger_batch_needs_more() -> None:
    configs = [load("digits-2t1s", [f"data.batch_size={batch}"]) for batch in (64, 1024)]
    small, large = (estimate(config, PodShape(1, 3, 0)).pod for config in configs)
    assert large > 1.05 * small


def test_the_estimate_is_what_a_pod_requests(tmp_path: Path) -> None:
    words = ("digits-2t1s", "--image=a:1", "--ranks-per-pod=3")
    code, out, err = call(tmp_path, switokd_command, "k8s", "render", *words)
    assert code == 0, err
    (job,) = [o for o in yaml.safe_load_all(out) if o["kind"] == "Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    requested = int(container["resources"]["requests"]["memory"].removesuffix("Gi"))
    pod = estimate(load("digits-2t1s"), PodShape(1, 3, 0)).pod
    assert pod <= requested < pod + 1.01


def test_a_run_file_that_cannot_train_is_told_in_one_line(tmp_path: Path) -> None:
    words = ("digits-2t1s", "--image=a:1", "networks.student.model=torch.nn:Identity")
    code, out, err = call(tmp_path, switokd_command, "k8s", "render", *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "--memory SIZE leaves the estimate out" in err
