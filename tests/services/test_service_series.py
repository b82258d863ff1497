"""What a real coordinator counts of refused calls, and of the streams of a rank."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.services.live import Stream, plan
from tests.support import process, wait_until

TOKEN = "w" * 32


class Live:
    """A coordinator that asks for a worker's token."""

    def __init__(self, grpc_address: str, http: str) -> None:
        self.address, self._http = grpc_address, http
        self.channel = grpc.insecure_channel(grpc_address)
        self.stub = pb_grpc.CoordinatorServiceStub(self.channel)

    def series(self) -> dict[str, float]:
        """All series of the coordinator, by name with labels."""
        with urllib.request.urlopen(f"http://{self._http}/metrics", timeout=10) as response:
            text = response.read().decode()
        rows = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("switokd_")]
        return {name: float(value) for name, value in rows}

    def refused(self) -> dict[str, int]:
        """Number of refusals by reason, those that are not zero."""
        name = "switokd_refused_messages_total"
        found = {key: value for key, value in self.series().items() if key.startswith(name)}
        assert len(found) == 7
        return {key.split('"')[1]: int(value) for key, value in found.items() if value}


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Live]:
    command = [sys.executable, "-m", "switokd", "coordinator", "--port=0", "--http-port=0"]
    with process([*command, *options], folder) as p:
        assert p.stdout is not None
        ready = json.loads(p.stdout.readline())
        live = Live(ready["grpc"], ready["http"])
        yield live
        live.channel.close()


def status_of(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code: grpc.StatusCode = caught.value.code()
    return code.name.lower()


@pytest.mark.parametrize("has_tokens", [False, True], ids=["open", "tokens"])
def test_refusals_are_counted_by_status(has_tokens: bool, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    with serving(tmp_path, *["--worker-token-file=token"] * has_tokens) as live:
        no_message: Any = live.channel.unary_unary("/switokd.v1.CoordinatorService/Join")
        calls: list[Callable[[], object]] = [
            lambda: live.stub.GetRunStatus(pb.GetRunStatusRequest(run_id="none")),
            lambda: live.stub.Join(pb.JoinRequest(run_id="r", plan=plan(teachers=0))),
            lambda: live.stub.Join(pb.JoinRequest(run_id="r" * 201, plan=plan())),
            lambda: live.stub.Drain(pb.DrainRequest()),
            lambda: no_message(b"\xff\xff"),
        ]
        expected = Counter(status_of(call) for call in calls)
        stream = Stream(live.address, live.channel)
        stream.send(report=pb.Report(step=1))
        expected[stream.end()[0].lower()] += 1
        assert sum(expected.values()) == 6
        assert len(expected) >= 2
        wait_until(lambda: live.refused() == expected, 20, f"these refusals: {expected}")


def test_a_ranks_machine_and_its_further_streams_are_shown(tmp_path: Path) -> None:
    with serving(tmp_path) as live:
        live.stub.Join(pb.JoinRequest(run_id="again", plan=plan(networks=2, ranks=1)))
        streams = [
            Stream(live.address).attach("again", host=f"node{i}", client="c", attempt=i)
            for i in (1, 2, 3)
        ]
        labels = 'rank="0",run="again"'
        info = f'switokd_rank_info{{host="node3",networks="t,s",{labels}}}'
        wait_until(lambda: info in live.series(), 20, "the rank's last machine")
        assert live.series()[f"switokd_rank_reconnects_total{{{labels}}}"] == 2
        streams[2].send(leave=pb.Leave())
        streams[2].end()
        wait_until(lambda: info not in live.series(), 20, "the end of the rank's series")
