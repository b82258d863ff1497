"""A run's own coordinator takes the run, however large it is.

Not covered: how it is started again (`test_lost_coordinator.py`), and its access (`test_tls.py`).
"""

from __future__ import annotations

import grpc

from switokd.config.config import Config
from switokd.coordination.process import coordinator_process, size_options
from switokd.distillation.topology import Role, Topology
from switokd.runtime.environment import Environment
from switokd.services.coordinator.limits import DEFAULTS
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from switokd.wire import ROLE_TO_WIRE


def many(teachers: int, students: int) -> Topology:
    roles = [(f"t{i}", Role.TEACHER) for i in range(teachers)]
    return Topology((*roles, *((f"s{i}", Role.STUDENT) for i in range(students))))


def test_only_a_large_run_needs_other_limits() -> None:
    assert size_options(many(2, 1), 3) == []
    assert size_options(many(4, 6), 1) == []
    assert size_options(many(5, 5), 1) == ["--max-pairs", "25"]
    assert size_options(many(64, 1), 2000) == [
        *("--max-ranks", "2000", "--max-networks", "65"),
        *("--max-pairs", "64", "--max-parts", "128000"),
    ]


def test_a_run_with_more_pairs_than_the_default_joins_its_own_coordinator() -> None:
    topology = many(7, 6)
    assert len(topology.pairs) > DEFAULTS.max_pairs
    networks = {name: {"role": role.value, "model": "mine:mlp"} for name, role in topology.roles}
    run_file = {"name": "large", "data": {"dataset": "digits"}, "networks": networks}
    config = Config.model_validate(run_file)
    plan = pb.RunPlan(
        networks=[
            pb.Network(name=name, role=ROLE_TO_WIRE[role], ranks=[0])
            for name, role in topology.roles
        ],
        strategy="switokd",
        config_digest="d",
        round_timeout_seconds=60.0,
    )
    request = pb.JoinRequest(run_id="large", rank=0, plan=plan)
    with (
        coordinator_process(config, Environment()) as ready,
        grpc.insecure_channel(ready().grpc) as channel,
    ):
        answer = pb_grpc.CoordinatorServiceStub(channel).Join(request, timeout=20)
    assert answer.joined_ranks == 1
