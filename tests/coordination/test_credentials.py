"""What a rank says if it and its coordinator do not trust each other; real coordinators.

Not covered: what the coordinator does about callers (`tests/services/test_security.py`,
`test_tls.py`).
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from switokd.config.run_file import load
from switokd.coordination import connection as connection_module
from switokd.coordination import diagnosis, tokens
from switokd.coordination.client import plan_of
from switokd.coordination.connection import Connection
from switokd.coordination.credentials import Credentials
from switokd.coordination.diagnosis import problem_with
from switokd.coordination.membership import Endpoint, Membership
from switokd.coordination.process import coordinator_process
from switokd.coordination.tokens import hide_token
from switokd.errors import UsageError
from switokd.runtime.environment import Environment
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.certificates import OPERATOR, WORKER, Certificates, serving
from tests.support import wait_until

SECRET = b"a secret of thirty-two bytes...."


@pytest.fixture(autouse=True)
def _look_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks look after a second why nobody answers; the tests have many of them."""
    monkeypatch.setattr(connection_module, "LOOK_SECONDS", 0.15)
    monkeypatch.setattr(diagnosis, "SECONDS", 0.5)


AT_ONCE = 15.0
"""Seconds within which a rank must say what is wrong, on a busy machine."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def config_of(address: str, *words: str) -> Any:
    return load("digits-2t1s", [f"coordinator.address={address}", *words])


def joined(address: str, *words: str, secret: bytes = SECRET, epoch: int = 1) -> str:
    """Join as rank 0, and return what `join_first` returns."""
    config = config_of(address, *words)
    membership = Membership(Endpoint(address), "run", 0, epoch, secret)
    connection = Connection(
        membership, config.coordinator, plan_of(config, config.placement_on(3), 1)
    )
    try:
        return connection.join_first(config.coordinator, print)
    finally:
        connection.close()


def error(address: str, *words: str, **more: Any) -> str:
    """The one line of an error that comes at once."""
    started = time.monotonic()
    with pytest.raises(UsageError) as caught:
        joined(address, *words, **more)
    assert time.monotonic() - started < AT_ONCE
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert address in message
    return message


def test_a_rank_and_a_coordinator_that_trust_each_other(
    certificates: Certificates, tmp_path: Path
) -> None:
    options = [*certificates.server(), *certificates.client_ca(), *certificates.tokens("worker")]
    with serving(tmp_path, *options) as served:
        words = certificates.settings(client="client", token="worker")
        assert joined(served.grpc, *words) == ""
        named = served.grpc.replace("127.0.0.1", "localhost")
        assert joined(named, *words) == ""


def test_a_certificate_that_cannot_be_trusted(certificates: Certificates, tmp_path: Path) -> None:
    with serving(tmp_path / "a", *certificates.server()) as served:
        message = error(served.grpc, *certificates.settings(ca="other-ca"))
        assert f"not issued by coordinator.tls.ca ({certificates.path('other-ca.crt')})" in message
        assert "asks for TLS: set coordinator.tls.ca" in error(served.grpc)
        assert "holds no certificate" in error(
            served.grpc, f"coordinator.tls.ca={certificates.path('worker.token')}"
        )
    with serving(tmp_path / "b", *certificates.server("server-expired")) as served:
        message = error(served.grpc, *certificates.settings())
        assert "has a certificate that expired on 20" in message
        assert "without a restart" in message
    with serving(tmp_path / "c", *certificates.server("server-elsewhere")) as served:
        message = error(served.grpc, *certificates.settings())
        assert "has a certificate for other names than 127.0.0.1" in message
    with serving(tmp_path / "d") as served:
        message = error(served.grpc, *certificates.settings())
        assert "speaks no TLS: leave coordinator.tls out" in message


def test_a_rank_that_the_coordinator_cannot_trust(
    certificates: Certificates, tmp_path: Path
) -> None:
    options = [*certificates.server(), *certificates.client_ca()]
    with serving(tmp_path, *options) as served:
        asks = "asks for a certificate of the ranks: set coordinator.tls.certificate"
        assert asks in error(served.grpc, *certificates.settings())
        message = error(served.grpc, *certificates.settings(client="client-expired"))
        assert f"{certificates.path('client-expired.crt')}), which expired on 20" in message
        message = error(served.grpc, *certificates.settings(client="client-other"))
        assert "--tls-client-ca" in message
        mixed = [
            f"coordinator.tls.ca={certificates.path('ca.crt')}",
            f"coordinator.tls.certificate={certificates.path('client.crt')}",
            f"coordinator.tls.key={certificates.path('client-other.key')}",
        ]
        assert "are not a certificate and its key" in error(served.grpc, *mixed)


def test_a_token_that_is_wrong_or_missing(certificates: Certificates, tmp_path: Path) -> None:
    with serving(tmp_path, *certificates.tokens("worker")) as served:
        message = error(served.grpc)
        assert "the call has none (coordinator.token_file, or the environment" in message
        message = error(served.grpc, *certificates.settings(ca="", token="operator"))
        assert "the token is not one of this coordinator's" in message
        assert OPERATOR not in message
        assert joined(served.grpc, *certificates.settings(ca="", token="worker")) == ""


def test_a_wrong_secret(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        assert joined(served.grpc) == ""
        message = error(served.grpc, secret=SECRET[::-1])
        assert "refuses the run: run 'run': this is not the run's secret" in message


def test_a_job_that_starts_again_goes_on_without_a_coordinator_that_it_cannot_trust(
    certificates: Certificates, tmp_path: Path
) -> None:
    with serving(tmp_path, *certificates.server("server-expired")) as served:
        reason = joined(served.grpc, *certificates.settings(), epoch=2)
    assert "expired on" in reason


def test_a_coordinator_that_is_not_there_yet_is_waited_for(
    certificates: Certificates, tmp_path: Path
) -> None:
    """A port where nobody listens, or where somebody listens and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert problem_with(Credentials(address)) is None
        assert problem_with(certificates.credentials(address)) is None
    assert problem_with(Credentials(address)) is None
    assert problem_with(certificates.credentials(address)) is None


def test_files_that_are_replaced_serve_the_next_call(tmp_path: Path) -> None:
    own = Certificates(tmp_path)
    options = [*own.server(), *own.client_ca(), *own.tokens("worker")]
    with serving(tmp_path / "c", *options) as served:
        config = config_of(served.grpc, *own.settings(client="client-expired", token="operator"))
        membership = Membership(Endpoint(served.grpc), "run", 0, 1, SECRET)
        plan = plan_of(config, config.placement_on(3), 1)
        connection = Connection(membership, config.coordinator, plan)
        with pytest.raises(grpc.RpcError):
            connection.join(2.0)
        own.put("client-expired", own.authority.client("rank", 5))
        with pytest.raises(grpc.RpcError) as caught:
            connection.join(10.0)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        own.write("operator.token", WORKER.encode())
        connection.join(10.0)
        connection.close()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["coordinator.address=gpu1:50051"], "gpu1:50051 is another machine, and there is no TLS"),
        (
            ["coordinator.address=10.0.0.9:50051", "coordinator.token_file=t"],
            "the token would go to 10.0.0.9:50051 in plain text",
        ),
        (["coordinator.tls.certificate=a"], "certificate and key belong together"),
        (
            ["coordinator.tls.certificate=a", "coordinator.tls.key=b"],
            "certificate needs ca, with which the ranks check the coordinator",
        ),
    ],
)
def test_settings_that_do_not_fit(words: list[str], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        load("digits-2t1s", words)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_settings_that_fit() -> None:
    for words in (
        ["coordinator.address=gpu1:50051", "coordinator.allow_plaintext=true"],
        ["coordinator.address=gpu1:50051", "coordinator.tls.ca=a"],
        ["coordinator.address='[::1]:50051'"],
        ["coordinator.address=127.1.2.3:50051", "coordinator.token_file=t"],
        ["coordinator.address=localhost:50051"],
    ):
        load("digits-2t1s", words)


def test_paths_may_differ_between_machines() -> None:
    first, second = (
        load("digits-2t1s", [f"coordinator.tls.ca={n}", f"coordinator.token_file={n}"])
        for n in "ab"
    )
    assert first.must_agree() == second.must_agree()
    assert first.digest == second.digest


def test_a_token_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokens, "_hidden", [])
    monkeypatch.setenv("SWITOKD_TOKEN", WORKER)
    here = Credentials("127.0.0.1:1")
    assert here.metadata() == (("authorization", f"Bearer {WORKER}"),)
    hide_token()
    assert "SWITOKD_TOKEN" not in os.environ
    assert here.metadata() == (("authorization", f"Bearer {WORKER}"),)
    with pytest.raises(UsageError, match=r"in plain text; set coordinator\.tls\.ca"):
        Credentials("10.0.0.9:1").metadata()
    assert Credentials("10.0.0.9:1", ca="a").metadata()
    monkeypatch.setattr(tokens, "_hidden", [])
    assert here.metadata() == ()
    assert WORKER not in repr(replace(here, token=WORKER))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", None])
def test_a_file_without_a_token_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"^coordinator\.token_file") as caught:
        Credentials("127.0.0.1:1", token_file=str(path)).metadata()
    assert str(path) in str(caught.value)


HOSTS = Environment(rank=0, world_size=2, local_rank=0, local_world_size=1, master_addr="127.0.0.1")
"""As rank 0 of a run over two machines, whose coordinator is started on this one."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("SWITOKD_WORKER_TOKEN", "a token of something else")
    monkeypatch.setenv("SWITOKD_TOKEN", "a token of something else")
    with coordinator_process(load("digits-2t1s"), HOSTS) as wait:
        yield wait()


def status(credentials: Credentials) -> str:
    with credentials.channel([]) as channel:
        stub = pb_grpc.CoordinatorServiceStub(channel)
        request = pb.GetRunStatusRequest(run_id="none")
        try:
            stub.GetRunStatus(request, timeout=10, metadata=credentials.metadata())
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def test_a_coordinator_for_several_machines_is_neither_plain_nor_open(endpoint: Endpoint) -> None:
    settings = load("digits-2t1s").coordinator
    own = Credentials.of(endpoint, settings)
    assert status(own) == "NOT_FOUND"
    assert status(replace(own, token="")) == "UNAUTHENTICATED"
    assert status(Credentials(endpoint.grpc)) == "UNAVAILABLE"
    assert endpoint.http is not None
    assert endpoint.http.startswith("127.0.0.1:")
    assert endpoint.token not in repr(endpoint)


def test_its_key_is_private_and_outlives_a_restart_but_not_the_run(endpoint: Endpoint) -> None:
    assert endpoint.pid is not None
    child = psutil.Process(endpoint.pid)
    words = child.cmdline()
    key = Path(words[words.index("--tls-key") + 1])
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert endpoint.token not in " ".join(words)
    assert not {"SWITOKD_TOKEN", "SWITOKD_WORKER_TOKEN"} & child.environ().keys()
    own = Credentials.of(endpoint, load("digits-2t1s").coordinator)
    child.kill()
    wait_until(lambda: status(own) == "NOT_FOUND", 30, "the coordinator to be back")


def test_its_files_are_removed_at_the_end() -> None:
    with coordinator_process(load("digits-2t1s"), HOSTS) as wait:
        words = psutil.Process(wait().pid).cmdline()
        key = Path(words[words.index("--tls-key") + 1])
        assert key.exists()
    assert not key.parent.exists()


def test_plain_text_between_machines_must_be_allowed() -> None:
    config = load("digits-2t1s", ["coordinator.allow_plaintext=true"])
    with coordinator_process(config, HOSTS) as wait:
        endpoint = wait()
        assert (endpoint.ca, endpoint.token) == ("", "")
        assert status(Credentials.of(endpoint, config.coordinator)) == "NOT_FOUND"


def test_one_machine_needs_no_certificate() -> None:
    with coordinator_process(load("digits-2t1s"), Environment()) as wait:
        endpoint = wait()
        assert (endpoint.ca, endpoint.token) == ("", "")
        assert status(Credentials(endpoint.grpc)) == "NOT_FOUND"
