"""Tests that need a GPU; skipped without one, also in CI.

The test process itself sees no GPU (`conftest.py`). The processes that these tests start see the
machine's first GPU.

Not covered: several GPUs (NCCL between GPUs, SyncBatchNorm); speed (`bench/gpu.py`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from switokd.config.run_file import load
from switokd.planning.profile import Profile
from tests.conftest import GPUS
from tests.support import REPOSITORY, lines, run, torchrun

pytestmark = pytest.mark.timeout(300)

DEVICE = "cuda"
FIRST = "0" if GPUS == "all" else GPUS.partition(",")[0]
SEEN = {
    "CUDA_VISIBLE_DEVICES": FIRST,
    "NVIDIA_TF32_OVERRIDE": "0",  # PyTorch computes convolutions in TF32 by default
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
# Both modes occur, and no decision is close. Eight steps hardly amplify rounding errors.
STEPS = ["schedule.max_steps=8", "distillation.temperature=0.25"]
ONE_PROCESS = ["placement=replicated", "coordinator=off"]

# Trains; any wait for the GPU outside of `to_host` raises an error.
STEP = """
import sys
import torch
from bench.in_process import InProcess
from switokd.training import step
from switokd.training import meters
from tests.training.test_step import STEPS, configured

device = torch.device(sys.argv[1])
compute = {"precision": sys.argv[2]}
if "eager" in sys.argv:
    compute["cuda_graphs"] = False
config = configured("switokd", compute=compute)
to_host, waits = step.to_host, []

def forbid(mode):
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)

def wait(*tensors):
    forbid("default")
    waits.append(to_host(*tensors))
    forbid("error")
    return waits[-1]

step.to_host = wait
ours = InProcess(config, device)
meters.SEND_SECONDS = float("inf")  # sending live metrics reads from the device
log = meters.EpochLog(ours.learners, ours.placement, ours.decider, device)
for x, y in ours.batches(STEPS):
    forbid("error")  # from here on, for the input as well
    log.add(ours.step(x, y), len(y))
forbid("default")
print(len(waits) / STEPS, "waits a step")
forbid("error")
try:
    torch.ones(1, device=device).tolist()
except RuntimeError as error:
    print("another:", error)
"""


MODELS = ("wrn-10-2", "resnet-20", "mobilenet-0.5", "mobilenetv2-0.5")  # the last one has dropout

# Compares logits and gradients with and without CUDA graphs, from the same weights and seeds.
SAME = """
import sys
import torch
import torch.nn.functional as F
from switokd.config.config import Config
from switokd.data.images import open_images
from switokd.runtime.environment import Environment
from switokd.training.schedules import AccumulationWindow
from switokd.training.build import make_learner, make_model
from switokd.training.warm_up import warm_up
from switokd.runtime.process_group import World
from tests.training.test_step import configured

device = torch.device(sys.argv[1], 0)
config = configured("switokd", s={"model": sys.argv[2]})
images = open_images(config.data, config.seed)
network = make_model(config, "s", images)
window = AccumulationWindow()
learner = make_learner(config, "s", network, World(Environment(), device), None, window)
warm_up(learner, 16, images.shape, config.compute)
eager = learner.eager()
for step in range(1, 4):
    x, y = torch.randn(16, *images.shape, device=device), torch.arange(16, device=device) % 10
    x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for one in (learner, eager):
        learner.optimizer_step.reducer.start()  # else the gradients would be added up
        z = one.forward(x, step)
        one.backward(F.cross_entropy(z, y), step)
        grads = [p.grad.clone() for p in network.parameters()]
        results.append((z.detach().clone(), torch.cat([g.flatten() for g in grads])))
    for graphed, usual in zip(*results):
        atol = 1e-4 * float(usual.abs().max())
        torch.testing.assert_close(graphed, usual, rtol=1e-3, atol=atol)
    learner.update(step)
print(learner.graphs.batch_sizes)
"""


# With one GPU, NCCL allows one rank; the sum is this rank's own gradients.
SUMS = """
import sys
import torch
import torch.distributed as dist
from switokd.models import registry
from switokd.training.exchange import all_gather
from switokd.training.reducer import GradientReducer

device, backend = torch.device(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.new_group([0], backend=backend)
torch.manual_seed(0)
network = registry.build("wrn-16-4", 3, 10).to(device, memory_format=torch.channels_last)
weights = list(network.parameters())
x = torch.randn(8, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
expected = torch.autograd.grad(network(x).square().mean(), weights)
for overlapping in (True, False):  # sent while backward runs, or after it
    reducer = GradientReducer("net", weights, group)
    reducer.set_sync(overlapping)
    reducer.start()
    network(x).square().mean().backward()
    reducer.set_sync(True)
    reducer.complete()
    reducer.finish()
    for weight, gradient in zip(weights, expected):
        # A GPU may add up the same gradients in another order.
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-5)
row = torch.arange(7.0, device=device)
gathered = row.new_empty(7)
all_gather(gathered, row, group=group)
print(dist.get_backend(group), torch.equal(gathered, row))
dist.destroy_process_group()
"""


def seeing(command: list[str], folder: Path) -> tuple[int, str, str]:
    """Call `run` with a visible GPU."""
    return run(command, folder, 90, **SEEN)


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    """Skip the tests without a GPU."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    if FIRST in ("", "-1") or "True" not in seeing(command, REPOSITORY)[1]:
        pytest.skip("no GPU")


def decisions(command: list[str], folder: Path, name: str, *settings: str) -> list[dict[str, Any]]:
    """Train a few steps with `command` into `folder`/`name`; return the decision log."""
    recipe = next(word for word in command if word.startswith("digits-"))
    rates = [f"networks.{network}.optimizer.lr=0.001" for network in load(recipe).networks]
    code, out, err = seeing([*command, *STEPS, *rates, *settings, f"run_dir={name}"], folder)
    assert code == 0, f"{out}\n{err}"
    (folder / f"{name}.out").write_text(out)
    return lines(folder / name / "decisions.jsonl")


def check_close(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Check that two decision logs differ by rounding errors only."""
    assert [d["mode"] for d in one] == [d["mode"] for d in other]
    assert {d["mode"] for d in one} == {"learning", "expert"}
    for key in ("gap", "e_s", "e_t"):
        assert [d[key] for d in one] == pytest.approx([d[key] for d in other], rel=0, abs=1e-4)


def test_a_gpu_decides_like_the_cpu_with_images_on_the_gpu_or_the_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "switokd", "train", "digits-2t1s", *ONE_PROCESS]
    cpu = decisions(command, tmp_path, "cpu", "device=cpu")
    for name, held in (("held", "true"), ("fed", "false")):
        on_device = [f"device={DEVICE}", f"compute.data_on_device={held}"]
        check_close(decisions(command, tmp_path, name, *on_device), cpu)
        assert f"1 process on {DEVICE}" in (tmp_path / f"{name}.out").read_text()


def test_training_with_cuda_graphs_equals_training_without(tmp_path: Path) -> None:
    """Every third batch is the last of an epoch, with 29 images."""
    command = [sys.executable, "-m", "switokd", "train", "digits-2t1s", *ONE_PROCESS]
    settings = [f"device={DEVICE}", "data.drop_last=false", "data.train_samples=157"]
    usual = decisions(command, tmp_path, "usual", *settings, "compute.cuda_graphs=false")
    check_close(decisions(command, tmp_path, "graphs", *settings), usual)


def test_a_plan_measures_networks_with_cuda_graphs(tmp_path: Path) -> None:
    plan = [sys.executable, "-m", "switokd", "plan", "digits-2t1s", f"device={DEVICE}"]
    code, _, err = seeing([*plan, "--devices", "2", "--save-profile", "p.json"], tmp_path)
    assert code == 0, err
    profile = Profile.load(tmp_path / "p.json")
    assert profile.device_memory_bytes
    assert all(network.cuda_graphs for network in profile.networks.values())
    plan += ["--devices", "2", "--profile", "p.json"]
    assert seeing(plan, tmp_path)[0] == 0
    code, _, err = seeing([*plan, "compute.cuda_graphs=false"], tmp_path)
    assert code == 2
    assert "teacher1 was profiled with CUDA graphs, and the run trains it without them" in err


def test_auto_measures_and_trains_on_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "switokd", "train", "digits-1t1s", "placement=auto"]
    few = ["schedule.max_steps=8", f"device={DEVICE}", "run_dir=out"]
    code, out, err = seeing([*command, *few, "--processes", "2"], tmp_path)
    assert code == 0, f"{out}\n{err}"
    (profile,) = map(Profile.load, (tmp_path / "out" / "profiles").iterdir())
    assert all(network.cuda_graphs for network in profile.networks.values())
    assert len(lines(tmp_path / "out" / "decisions.jsonl")) == 8


@pytest.mark.parametrize("model", MODELS)
def test_this_packages_networks_compute_the_same_with_cuda_graphs(
    model: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SAME)
    code, out, err = seeing([sys.executable, "script.py", DEVICE, model], tmp_path)
    assert code == 0, err
    assert out.splitlines()[-1] == "[16]"


@pytest.mark.parametrize(
    "how", [["fp32"], ["bf16"], ["fp16"], ["fp32", "eager"], ["fp16", "eager"]], ids=" ".join
)
def test_only_one_read_per_step_waits_for_the_gpu(how: list[str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(STEP)
    code, out, err = seeing([sys.executable, "script.py", DEVICE, *how], tmp_path)
    assert code == 0, err
    assert out.startswith("1.0 waits a step\n")
    assert "another: called a synchronizing CUDA operation" in out  # shows that the check works


def test_nccl_sums_gradients(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SUMS)
    code, out, err = seeing([sys.executable, "script.py", DEVICE, "nccl"], tmp_path)
    assert code == 0, err
    assert out.splitlines()[-1] == "nccl True"


@pytest.mark.parametrize("placement", ["dedicated", "replicated"])
def test_two_ranks_on_one_gpu_exchange_over_the_hosts_memory(
    placement: str, tmp_path: Path
) -> None:
    command = torchrun(2, "digits-1t1s", f"placement={placement}")
    cpu = decisions(command, tmp_path, "cpu", "device=cpu")
    check_close(decisions(command, tmp_path, "gpu", f"device={DEVICE}"), cpu)
    out = (tmp_path / "gpu.out").read_text().splitlines()
    assert out[0].startswith(f"2 processes on {DEVICE}")
    assert "ranks share a GPU: exchanging over Gloo and the host's memory, not NCCL" in out
