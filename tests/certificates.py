"""Certificates of every kind for the tests, and a coordinator that uses them.

Not covered: the certificates that `switokd certificates` makes (`tests/cli/test_certificates.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from switokd.coordination.certificates import Authority, Issued
from switokd.coordination.credentials import Credentials
from tests.support import process

WORKER, OPERATOR = "worker-token-0123456789", "operator-token-0123456789"


@dataclass
class Certificates:
    """A folder of certificates: of one CA, of another one, expired, for other names.

    Tokens of both roles lie there as well.
    """

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.authority, self.other = Authority.new(10), Authority.new(10)
        self.put("ca", self.authority.made)
        self.put("other-ca", self.other.made)
        self.put("server", self.authority.server(["127.0.0.1", "localhost"], 5))
        self.put("server-expired", self.authority.server(["127.0.0.1"], -2))
        self.put("server-elsewhere", self.authority.server(["example.org"], 5))
        self.put("client", self.authority.client("rank", 5))
        self.put("client-expired", self.authority.client("rank", -2))
        self.put("client-other", self.other.client("rank", 5))
        for name, token in (("worker", WORKER), ("operator", OPERATOR)):
            self.write(f"{name}.token", f"{token}\n".encode())

    def put(self, name: str, issued: Issued) -> None:
        self.write(f"{name}.key", issued.key)
        self.write(f"{name}.crt", issued.certificate)

    def write(self, name: str, content: bytes) -> None:
        """Replace a file at once, as programs that renew certificates do."""
        partial = self.folder / f".{name}"
        partial.write_bytes(content)
        partial.chmod(0o600)
        partial.replace(self.folder / name)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def server(self, name: str = "server") -> list[str]:
        """Options of a coordinator that shows a certificate."""
        files = (self.path(f"{name}.crt"), self.path(f"{name}.key"))
        return ["--tls-certificate", files[0], "--tls-key", files[1]]

    def client_ca(self) -> list[str]:
        return ["--tls-client-ca", self.path("ca.crt")]

    def tokens(self, *roles: str) -> list[str]:
        """Options of a coordinator that asks for tokens of these roles."""
        return [w for r in roles for w in (f"--{r}-token-file", self.path(f"{r}.token"))]

    def credentials(
        self, address: str, ca: str = "ca", client: str = "", token: str = ""
    ) -> Credentials:
        """What a client shows. ca: "" for plain text."""
        return Credentials(
            address,
            self.path(f"{ca}.crt") if ca else "",
            self.path(f"{client}.crt") if client else "",
            self.path(f"{client}.key") if client else "",
            self.path(f"{token}.token") if token else "",
        )

    def settings(self, ca: str = "ca", client: str = "", token: str = "") -> list[str]:
        """The same as settings of a run file."""
        words = [f"coordinator.tls.ca={self.path(f'{ca}.crt')}"] if ca else []
        if client:
            words.append(f"coordinator.tls.certificate={self.path(f'{client}.crt')}")
            words.append(f"coordinator.tls.key={self.path(f'{client}.key')}")
        return [*words, f"coordinator.token_file={self.path(f'{token}.token')}"] if token else words


@dataclass
class Served:
    """A coordinator that runs."""

    child: subprocess.Popen[str]
    grpc: str
    http: str
    log: Path

    @property
    def pid(self) -> int:
        return self.child.pid


@contextmanager
def serving(folder: Path, *options: str, **env: str) -> Iterator[Served]:
    """Run a coordinator on free ports, until the end of the test."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "switokd", "coordinator", "--port=0", "--http-port=0"]
    log = folder / "coordinator.log"
    words = ["sh", "-c", f'exec "$@" 2>>{log}', "sh", *command, *options]
    with process(words, folder, None, **env) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line, log.read_text()
        ready = json.loads(line)
        yield Served(child, ready["grpc"], ready["http"], log)
