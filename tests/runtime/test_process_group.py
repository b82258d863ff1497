"""torchrun's variables, the choice of a device, the check of the world size."""

from __future__ import annotations

import pytest
import torch

from switokd.errors import CollectiveError, UsageError
from switokd.runtime import device, process_group
from switokd.runtime.device import choose_device
from switokd.runtime.environment import (
    Environment,
    check_alone,
    check_world_size,
    environment,
)
from switokd.runtime.process_group import World, collective_errors, join_world

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "TORCHELASTIC_RUN_ID": "x",
}


def test_environment_is_torchruns() -> None:
    env = environment(TORCHRUN)
    assert env == Environment(5, 6, 1, 2, "node0", under_torchrun=True)
    assert not env.one_host
    assert environment({**TORCHRUN, "LOCAL_WORLD_SIZE": "6"}).one_host


def test_one_process_alone_without_torchrun() -> None:
    env = environment({})
    assert environment({"WORLD_SIZE": ""}) == env
    assert (env.rank, env.world_size, env.under_torchrun) == (0, 1, False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set, but not LOCAL_WORLD_SIZE, RANK, LOCAL_RANK, "),
        ({"WORLD_SIZE": "4", "RANK": "1"}, "but not LOCAL_WORLD_SIZE, LOCAL_RANK, MASTER_ADDR: "),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "but not MASTER_ADDR: torchrun sets all of them; "),
        ({**TORCHRUN, "WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: allowed: 1 or more; "),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE=0: allowed: 1 or more; "),
        ({**TORCHRUN, "RANK": "6"}, "RANK=6: allowed: 0 to 5; "),
        ({**TORCHRUN, "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: allowed: 0 to 1; "),
    ],
)
def test_variables_left_by_another_program_are_one_line(given: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as told:
        environment(given)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("wanted", "gpus", "chosen"),
    [
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda:0"),  # shared with the other process
        ("cuda", 1, "cuda:0"),
        ("auto", 2, "cuda:1"),
        ("cuda", 2, "cuda:1"),
        ("cpu", 8, "cpu"),
    ],
)
def test_device(wanted: str, gpus: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_count", lambda: gpus)
    assert choose_device(wanted, environment(TORCHRUN)) == torch.device(chosen)


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
    with pytest.raises(UsageError, match="PyTorch finds no GPU here; use device=cpu"):
        choose_device("cuda", environment(TORCHRUN))


def test_ranks_that_share_a_gpu_exchange_over_the_host() -> None:
    env, gpu = environment(TORCHRUN), torch.device("cuda", 0)
    assert World(env, gpu, backend="gloo").transport == torch.device("cpu")
    assert World(env, gpu, backend="nccl").transport is None
    assert World(env, torch.device("cpu")).transport is None
    assert World(Environment(), gpu).transport is None  # alone nothing travels


@pytest.mark.parametrize(
    ("identities", "backend"),
    [
        (["h 1", "h 2"], "nccl"),
        (["a 1", "b 1"], "nccl"),  # the same number on two machines
        (["h 1", "h 1"], "gloo"),
        (["h 1", ""], "gloo"),
        (["", ""], "gloo"),
    ],
)
def test_nccl_is_for_ranks_with_a_gpu_each(identities: list[str], backend: str) -> None:
    assert process_group._backend(identities) == backend


def test_a_lack_of_memory_is_this_ranks_and_no_peers() -> None:
    with pytest.raises(CollectiveError, match="adding up"), collective_errors("adding up"):
        raise RuntimeError("[/a/pair.cc:12] connection closed. This may")
    with pytest.raises(torch.OutOfMemoryError), collective_errors("adding up"):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_one_process_is_a_world_of_its_own() -> None:
    with join_world(environment({}), torch.device("cpu"), timeout=1.0) as alone:
        assert (alone.all_gather("a"), alone.gather("b"), alone.broadcast("c")) == (
            ["a"],
            ["b"],
            "c",
        )
        assert alone.group([0]) is None
        assert alone.on_rank_0(lambda: "d") == "d"


def test_deciding_alone_is_for_one_process() -> None:
    check_alone(environment({}))
    with pytest.raises(UsageError, match="coordinator: off is for a run of one process, found 6"):
        check_alone(environment(TORCHRUN))


def test_world_size_must_fit_and_the_command_is_given() -> None:
    check_world_size(6, "5T1S", "mine.yaml", environment(TORCHRUN))
    with pytest.raises(UsageError) as caught:
        check_world_size(3, "2T1S", "mine.yaml", environment(TORCHRUN))
    assert str(caught.value) == (
        "mine.yaml is 2T1S and needs 3 processes, found 6: "
        "torchrun --standalone --nproc-per-node=3 -m switokd.train mine.yaml"
    )
