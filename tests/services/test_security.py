"""Bearer tokens at a real coordinator: what each role may do, and where tokens do not show.

Not covered: what a rank says about its token (`tests/coordination/test_credentials.py`).
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from switokd.errors import UsageError
from switokd.services.coordinator.authorisation import CallerRole
from switokd.services.coordinator.security import Security, Tokens
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.certificates import OPERATOR, WORKER, Certificates, Served, serving
from tests.services.test_coordinator import COMMAND, plan
from tests.support import run

NONE, WRONG = "", "not-a-token-of-this-one"
CALLS: dict[str, Callable[[Any, Any], object]] = {
    "Join": lambda stub, metadata: stub.Join(
        pb.JoinRequest(run_id="r", rank=0, plan=plan()), timeout=10, metadata=metadata
    ),
    "Train": lambda stub, metadata: list(stub.Train(iter([]), timeout=10, metadata=metadata)),
    "GetRunStatus": lambda stub, metadata: stub.GetRunStatus(
        pb.GetRunStatusRequest(run_id="r"), timeout=10, metadata=metadata
    ),
}
FREE = dict.fromkeys(CALLS, "OK")
OUT = dict.fromkeys(CALLS, "UNAUTHENTICATED")


def code(call: Callable[[], object]) -> str:
    """How a call ends."""
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@contextmanager
def stub_of(served: Served) -> Iterator[Any]:
    with grpc.insecure_channel(served.grpc) as channel:
        stub = pb_grpc.CoordinatorServiceStub(channel)
        stub.health = health_pb2_grpc.HealthStub(channel)  # type: ignore[attr-defined]
        yield stub


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def answers(stub: Any, token: str) -> dict[str, str]:
    return {name: code(lambda c=c: c(stub, metadata(token))) for name, c in CALLS.items()}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ((), {NONE: FREE, WRONG: FREE}),
        (
            ("worker", "operator"),
            {NONE: OUT, WRONG: OUT, WORKER: FREE, OPERATOR: FREE},
        ),
        (("worker",), {NONE: OUT, WORKER: FREE, OPERATOR: OUT}),
        (
            ("operator",),
            {NONE: {**FREE, "GetRunStatus": "UNAUTHENTICATED"}, WORKER: OUT, OPERATOR: FREE},
        ),
    ],
    ids=lambda value: "+".join(value) or "none" if isinstance(value, tuple) else "",
)
def test_what_each_role_may_do(
    roles: tuple[str, ...],
    expected: dict[str, dict[str, str]],
    certificates: Certificates,
    tmp_path: Path,
) -> None:
    with serving(tmp_path, *certificates.tokens(*roles)) as served, stub_of(served) as stub:
        assert {token: answers(stub, token) for token in expected} == expected
        reply = stub.health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_only_an_operator_may_drain() -> None:
    """The method itself is another module's; what is asked of its caller is decided here."""
    with_both = Security(Tokens("w", text=WORKER), Tokens("o", text=OPERATOR))
    drain = "/switokd.v1.CoordinatorService/Drain"
    expected = {NONE: "UNAUTHENTICATED", WRONG: "UNAUTHENTICATED", WORKER: "PERMISSION_DENIED"}
    for token, name in expected.items():
        refused = with_both.refusal(drain, metadata(token))
        assert refused is not None
        assert refused[0].name == name
    assert with_both.refusal(drain, metadata(OPERATOR)) is None
    nobody = Security().refusal(drain, metadata(OPERATOR))
    assert nobody is not None
    assert "--operator-token-file" in nobody[1]


def test_the_role_of_a_call() -> None:
    security = Security(Tokens("w", text=WORKER), Tokens("o", text=OPERATOR))

    def role(*pairs: tuple[str, Any]) -> CallerRole | None:
        return security.role_of(SimpleNamespace(invocation_metadata=lambda: pairs))

    assert role(("authorization", f"Bearer {OPERATOR}")) is CallerRole.OPERATOR
    assert role(("authorization", f"bearer {WORKER}")) is CallerRole.WORKER
    for value in (WORKER, f"Basic {WORKER}", "Bearer ", "Bearer", f"Bearer {WRONG}", b"Bearer x"):
        assert role(("authorization", value)) is None
    assert role() is None


def test_the_one_refused_is_told_and_nobody_else(
    certificates: Certificates, tmp_path: Path
) -> None:
    options = certificates.tokens("worker", "operator")
    with serving(tmp_path, *options) as served, stub_of(served) as stub:
        for token, words in ((NONE, "the call has none"), (WRONG, "is not one of")):
            with pytest.raises(grpc.RpcError) as caught:
                CALLS["GetRunStatus"](stub, metadata(token))
            assert words in (caught.value.details() or "")
        log = served.log.read_text()
        assert "refused /switokd.v1.CoordinatorService/GetRunStatus from ipv4:127.0.0.1" in log
        for token in (WORKER, OPERATOR, WRONG):
            assert token not in log


def test_tokens_are_replaced_without_a_restart(tmp_path: Path) -> None:
    own = Certificates(tmp_path)
    with serving(tmp_path / "c", *own.tokens("worker")) as served, stub_of(served) as stub:
        new = "a-new-token-for-all-workers"
        own.write("worker.token", f"{new}\n{WORKER}\n".encode())  # both, while it is handed out
        assert answers(stub, WORKER) == answers(stub, new) == FREE
        own.write("worker.token", f"{new}\n".encode())
        assert (answers(stub, WORKER), answers(stub, new)) == (OUT, FREE)
        own.write("worker.token", b"\n")
        assert (answers(stub, WORKER), answers(stub, new)) == (OUT, FREE)
        (tmp_path / "worker.token").unlink()
        assert answers(stub, new) == FREE
        assert "its old tokens stay valid" in served.log.read_text()


def test_a_token_may_come_from_the_environment(tmp_path: Path) -> None:
    env = {"SWITOKD_WORKER_TOKEN": WORKER, "SWITOKD_OPERATOR_TOKEN": OPERATOR}
    with serving(tmp_path, **env) as served, stub_of(served) as stub:
        expected = {NONE: OUT, WORKER: FREE, OPERATOR: FREE}
        assert {token: answers(stub, token) for token in expected} == expected
        for member in [p for p in psutil.process_iter() if p.pid == served.pid]:
            assert not any(token in " ".join(member.cmdline()) for token in (WORKER, OPERATOR))


def test_metrics_ask_for_a_token(certificates: Certificates, tmp_path: Path) -> None:
    scraper = "token-of-prometheus-0123456789"
    file = tmp_path / "metrics.token"
    file.write_text(scraper)
    file.chmod(0o600)

    def get(path: str, token: str = "") -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"http://{served.http}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as page:
                return int(page.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    with serving(tmp_path / "c", f"--metrics-token-file={file}") as served:
        assert [get("/metrics", token) for token in (NONE, WRONG, scraper)] == [401, 401, 200]
        assert get("/healthz") == 200


@pytest.mark.parametrize("kind", ["worker", "operator", "metrics"])
def test_tokens_never_cross_the_network_in_plain_text(
    kind: str, certificates: Certificates, tmp_path: Path
) -> None:
    command = [
        *COMMAND,
        "--port=0",
        "--http-port=0",
        f"--{kind}-token-file={certificates.path('worker.token')}",
    ]
    code, out, err = run([*command, "--host=0.0.0.0", "--allow-plaintext"], tmp_path, 30)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert "tokens would cross the network in plain text" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a token has 16 to 512 printable characters"),
        (b"short", "a token has 16 to 512 printable characters"),
        (b"two words in one line", "a token has 16 to 512 printable characters"),
        ("schlüssel-mit-umlaut".encode(), "a token has 16 to 512 printable characters"),
        (b"x" * 5000, "4096 bytes at most"),
        (None, "No such file or directory"),
    ],
)
def test_a_wrong_file_of_tokens_is_one_line(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        Tokens("--worker-token-file", path)
    assert str(path) in str(caught.value)
    if content:
        assert content.decode() not in str(caught.value)


def test_a_file_that_others_may_read_is_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    path.write_text(WORKER)
    for mode, is_said in ((0o600, False), (0o640, True), (0o604, True)):
        caplog.clear()
        path.chmod(mode)
        Tokens("--worker-token-file", path)
        assert (f"chmod 600 {path}" in caplog.text) is is_said
