"""Compressed messages: refused before anything is unpacked, whatever they would grow to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import psutil
import pytest

from switokd.v1 import coordinator_pb2 as pb
from tests.services.live import Coordinator, HonestRun, coordinator, plan

MIB = 2**20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("compression")) as under_test:
        yield under_test


@pytest.fixture
def channel(served: Coordinator) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(served.address, options=options) as made:
        yield made


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_bomb_is_refused_and_not_unpacked(
    served: Coordinator, channel: grpc.Channel, algorithm: grpc.Compression
) -> None:
    honest = HonestRun(served)
    process = psutil.Process(served.pid)
    before = process.memory_info().rss
    bomb = b"\0" * (100 * MIB)  # 100 KiB when it is packed
    join: Any = channel.unary_unary("/switokd.v1.CoordinatorService/Join")
    train: Any = channel.stream_stream("/switokd.v1.CoordinatorService/Train")
    calls = [join.future(bomb, compression=algorithm, timeout=60)]
    calls += [train(iter([bomb]), compression=algorithm, timeout=60)]
    for call in calls:
        assert call.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "ompression" in call.details()
    assert process.memory_info().rss - before < 60 * MIB
    honest.end()


def test_a_small_compressed_message_is_refused_as_well(channel: grpc.Channel) -> None:
    """Not given to the method as it came, which would find that it is no message."""
    join: Any = channel.unary_unary("/switokd.v1.CoordinatorService/Join")
    request = pb.JoinRequest(run_id="r" * 150, plan=plan(config_digest="d" * 150))
    with pytest.raises(grpc.RpcError) as caught:
        join(request.SerializeToString(), compression=grpc.Compression.Gzip, timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_messages_that_are_not_compressed_are_taken(channel: grpc.Channel) -> None:
    join: Any = channel.unary_unary("/switokd.v1.CoordinatorService/Join")
    request = pb.JoinRequest(run_id="plain", plan=plan()).SerializeToString()
    join(request, timeout=60)
    join(request, compression=grpc.Compression.NoCompression, timeout=60)
