"""TLS at both ports of a real coordinator: who gets through, and certificates that are replaced.

Not covered: what a rank says (`tests/coordination/test_credentials.py`).
"""

from __future__ import annotations

import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest

from switokd.coordination.credentials import Credentials
from switokd.v1 import coordinator_pb2 as pb
from switokd.v1 import coordinator_pb2_grpc as pb_grpc
from tests.certificates import Certificates, serving
from tests.support import run, wait_until

COMMAND = [sys.executable, "-m", "switokd", "coordinator", "--port=0", "--http-port=0"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def answer(credentials: Credentials) -> str:
    """The status code of a call: NOT_FOUND if it gets through."""
    with credentials.channel([]) as channel:
        stub = pb_grpc.CoordinatorServiceStub(channel)
        try:
            stub.GetRunStatus(
                pb.GetRunStatusRequest(run_id="none"), timeout=10, metadata=credentials.metadata()
            )
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def get(url: str, ca: str, client: tuple[str, str] | None = None, token: str = "") -> int:
    """The HTTP status of a page; 0 if the connection is refused."""
    context = ssl.create_default_context(cafile=ca)
    if client:
        context.load_cert_chain(*client)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5, context=context) as page:
            return int(page.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def test_callers_check_the_coordinator(certificates: Certificates, tmp_path: Path) -> None:
    with serving(tmp_path, *certificates.server()) as served:
        assert answer(certificates.credentials(served.grpc)) == "NOT_FOUND"
        assert answer(certificates.credentials(served.grpc, ca="other-ca")) == "UNAVAILABLE"
        assert answer(certificates.credentials(served.grpc, ca="")) == "UNAVAILABLE"
        url = f"https://{served.http}"
        assert get(f"{url}/metrics", certificates.path("ca.crt")) == 200
        assert get(f"{url}/metrics", certificates.path("other-ca.crt")) == 0
        with pytest.raises((OSError, urllib.error.URLError)):
            urllib.request.urlopen(f"http://{served.http}/metrics", timeout=5)
        # The port that strangers have tried still answers, and has written nothing about them.
        assert answer(certificates.credentials(served.grpc)) == "NOT_FOUND"
        assert "Traceback" not in served.log.read_text()
        assert "ssl" not in served.log.read_text().lower()


def test_the_coordinator_checks_callers(certificates: Certificates, tmp_path: Path) -> None:
    options = [*certificates.server(), *certificates.client_ca()]
    with serving(tmp_path, *options) as served:
        found = {
            name: answer(certificates.credentials(served.grpc, client=name))
            for name in ("", "client", "client-expired", "client-other")
        }
        assert found == {
            "": "UNAVAILABLE",
            "client": "NOT_FOUND",
            "client-expired": "UNAVAILABLE",
            "client-other": "UNAVAILABLE",
        }
        url, ca = f"https://{served.http}", certificates.path("ca.crt")
        client = (certificates.path("client.crt"), certificates.path("client.key"))
        other = (certificates.path("client-other.crt"), certificates.path("client-other.key"))
        assert get(f"{url}/healthz", ca) == 200  # a probe has no certificate
        assert get(f"{url}/metrics", ca) == 401
        assert get(f"{url}/metrics", ca, client) == 200
        assert get(f"{url}/metrics", ca, other) == 0


def test_a_certificate_is_replaced_without_a_restart(
    certificates: Certificates, tmp_path: Path
) -> None:
    own = Certificates(tmp_path)
    with serving(tmp_path / "c", *own.server(), *own.client_ca()) as served:
        before = own.credentials(served.grpc, client="client")
        with before.channel([]) as channel:
            stub = pb_grpc.CoordinatorServiceStub(channel)
            streams = stub.Train(iter([]), timeout=30)
            assert answer(before) == "NOT_FOUND"
            own.put("server", certificates.authority.server(["127.0.0.1"], 5))
            # A key without its certificate would be useless: the old pair serves on.
            own.write("ca.crt", certificates.authority.made.certificate)
            own.put("client", certificates.authority.client("rank", 5))
            after = own.credentials(served.grpc, client="client")
            assert answer(after) == "NOT_FOUND"
            assert (
                get(
                    f"https://{served.http}/metrics",
                    own.path("ca.crt"),
                    (own.path("client.crt"), own.path("client.key")),
                )
                == 200
            )
            streams.cancel()
        own.write("server.key", b"not a key")
        assert answer(after) == "NOT_FOUND"
        assert answer(after) == "NOT_FOUND"
        wait_until(lambda: "stays in use" in served.log.read_text(), 5, "the line about the key")
        assert served.log.read_text().count("stays in use") == 1
        assert "BEGIN" not in served.log.read_text()


def test_an_expired_certificate_is_said_and_may_be_replaced(tmp_path: Path) -> None:
    own = Certificates(tmp_path)
    with serving(tmp_path / "c", *own.server("server-expired")) as served:
        assert answer(own.credentials(served.grpc)) == "UNAVAILABLE"
        assert "it expired on" in served.log.read_text()
        own.put("server-expired", own.authority.server(["127.0.0.1"], 5))
        assert answer(own.credentials(served.grpc)) == "NOT_FOUND"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--host=0.0.0.0"],
            "--host 0.0.0.0: other machines would reach this coordinator in plain",
        ),
        (["--http-host=0.0.0.0"], "--http-host 0.0.0.0: other machines would reach this"),
        (["--tls-key={server.key}"], "--tls-certificate and --tls-key belong together"),
        (["--tls-client-ca={ca.crt}"], "--tls-client-ca needs --tls-certificate"),
        (
            ["--tls-certificate={server.crt}", "--tls-key={client.key}"],
            "are not a certificate and its key in PEM format, without a password (key values",
        ),
        (
            ["--tls-certificate={server.crt}", "--tls-key={nothing}"],
            "nothing: No such file or directory",
        ),
        (
            [
                "--tls-certificate={server.crt}",
                "--tls-key={server.key}",
                "--tls-client-ca={ca.key}",
            ],
            "--tls-client-ca {ca.key}: this holds no certificate in PEM format",
        ),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    options: list[str], words: str, certificates: Certificates, tmp_path: Path
) -> None:
    names = ("server.crt", "server.key", "client.key", "ca.crt", "ca.key", "nothing")

    def filled(text: str) -> str:
        for name in names:
            text = text.replace("{" + name + "}", certificates.path(name))
        return text

    code, out, err = run([*COMMAND, *map(filled, options)], tmp_path, 30)
    assert (code, out) == (2, ""), err
    assert len(err.splitlines()) == 1, err
    assert filled(words) in err
    if "plain" in words:
        assert "--allow-plaintext" in err
        assert "--tls-certificate" in err


def test_plain_text_is_allowed_explicitly(tmp_path: Path) -> None:
    with serving(tmp_path, "--host=0.0.0.0", "--allow-plaintext") as served:
        port = served.grpc.rpartition(":")[2]
        assert answer(Credentials(f"127.0.0.1:{port}")) == "NOT_FOUND"
    local = ("--host=127.0.0.1", "--http-host=localhost")
    with (
        serving(tmp_path, *local) as served,
        urllib.request.urlopen(f"http://{served.http}/healthz", timeout=5) as page,
    ):
        assert page.status == 200
