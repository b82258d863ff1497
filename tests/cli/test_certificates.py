"""`switokd certificates`, and a run with all that it makes: TLS, client certificates, tokens.

Not covered: single mistakes (`tests/coordination/test_credentials.py`).
"""

from __future__ import annotations

import json
import shlex
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509

from tests.certificates import serving
from tests.preloaded import call, forked, switokd_command, train, train_ranks
from tests.support import lines, wait_until

NAMES = ("teacher1", "teacher2", "student")
WORDS = ["digits-2t1s", "schedule.max_steps=80", "data.batch_size=24", "data.workers=0"]
WORDS += [f"networks.{name}.model=tests.sleepers:Flat" for name in NAMES]
SECRET_FILES = ("ca.key", "server.key", "client.key", "worker.token", "operator.token")


def make(folder: Path, *options: str) -> str:
    code, out, err = call(folder, switokd_command, "certificates", "certs", *options)
    assert code == 0, err
    return out


def commands(text: str) -> dict[str, list[str]]:
    """The options and settings of the commands that are printed, by subcommand."""
    found = [shlex.split(line) for line in text.splitlines() if line.startswith("  switokd ")]
    return {words[1]: words[2:] for words in found}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_files_are_private_and_name_the_hosts(tmp_path: Path) -> None:
    make(tmp_path, "--host", "gpu1.example.org", "--host", "10.1.2.3", "--days", "30")
    folder = tmp_path / "certs"
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()}
    assert modes == {
        **dict.fromkeys(SECRET_FILES, 0o600),
        **dict.fromkeys(("ca.crt", "server.crt", "client.crt"), 0o644),
    }
    server = certificate(folder / "server.crt")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gpu1.example.org", "localhost"]
    addresses = [str(a) for a in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["10.1.2.3", "127.0.0.1", "::1"]
    valid = server.not_valid_after_utc - server.not_valid_before_utc
    assert valid.days == 30


def test_the_same_ca_issues_again_and_tokens_stay(tmp_path: Path) -> None:
    make(tmp_path)
    folder = tmp_path / "certs"
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    make(tmp_path, "--host", "other")
    changed = {f.name for f in folder.iterdir() if f.read_bytes() != before[f.name]}
    assert changed == {"server.crt", "server.key", "client.crt", "client.key"}
    certificate(folder / "server.crt").verify_directly_issued_by(certificate(folder / "ca.crt"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["certs", "--host", "gpu1:50051"], "'gpu1:50051' cannot be in a certificate"),
        (["certs", "--host", ""], "'' cannot be in a certificate"),
        (["file/certs"], "file/certs cannot be written: Not a directory"),
        (["foreign"], "foreign: ca.crt and ca.key are not a CA that this command has made"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "ca.crt").write_text("another CA")
    code, out, err = call(tmp_path, switokd_command, "certificates", *options)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert words in err


def test_a_run_with_all_of_it_decides_the_same(tmp_path: Path) -> None:
    """The printed commands work, and no secret shows in a command line, a log or the metrics."""
    plain = train(tmp_path / "plain", 3, *WORDS)
    printed = commands(make(tmp_path))
    options = [o.replace("0.0.0.0", "127.0.0.1") for o in printed["coordinator"]]
    log = tmp_path / "ranks.log"
    seen: set[str] = set()
    with serving(tmp_path, *options) as served:
        settings = [s for s in printed["train"] if s != "RECIPE"]
        port = served.grpc.rpartition(":")[2]
        settings = [s.replace(":50051", f":{port}") for s in settings]
        words = (*WORDS, *settings, "run_dir=out")
        with forked(train_ranks, 3, words, cwd=tmp_path, out=log) as child:
            run = tmp_path / "out" / "run.json"
            wait_until(lambda: child.poll() is not None or run.exists(), 60, "the start")
            for member in psutil.process_iter():
                with suppress(psutil.Error):
                    seen.add(" ".join(member.cmdline()))
            assert child.wait(60) == 0, log.read_text()
        public = "\n".join([*seen, log.read_text(), served.log.read_text()])
    assert stat.S_IMODE(run.stat().st_mode) == 0o600
    secrets = [
        (tmp_path / "certs" / f"{role}.token").read_text() for role in ("worker", "operator")
    ]
    for secret in (*secrets, json.loads(run.read_text())["secret"]):
        assert secret.strip() not in public
    assert lines(tmp_path / "out" / "decisions.jsonl") == lines(plain / "decisions.jsonl")
    for name in NAMES:
        assert (tmp_path / f"out/weights/{name}.pt").read_bytes() == (
            plain / f"weights/{name}.pt"
        ).read_bytes()


def test_a_run_that_is_refused_ends_with_one_line(tmp_path: Path) -> None:
    """All ranks have the same mistake; the exit code says that another start is no use."""
    make(tmp_path)
    certs = tmp_path / "certs"
    options = [f"--tls-certificate={certs}/server.crt", f"--tls-key={certs}/server.key"]
    with serving(tmp_path, *options) as served:
        words = (*WORDS, f"coordinator.address={served.grpc}", "run_dir=out")
        code, _, err = call(tmp_path, train_ranks, 3, words)
    assert code == 2, err
    (line,) = {line.partition("the coordinator")[2] for line in err.splitlines() if line}
    assert "asks for TLS: set coordinator.tls.ca" in line


def test_an_operators_command_uses_the_environment(tmp_path: Path) -> None:
    printed = commands(make(tmp_path))
    options = [o.replace("0.0.0.0", "127.0.0.1") for o in printed["coordinator"]]
    certs = tmp_path / "certs"
    env: Any = {
        "SWITOKD_TLS_CA": str(certs / "ca.crt"),
        "SWITOKD_TLS_CERTIFICATE": str(certs / "client.crt"),
        "SWITOKD_TLS_KEY": str(certs / "client.key"),
    }
    with serving(tmp_path, *options) as served:
        words = ("runs", "--json", "--coordinator", served.grpc)
        code, _, err = call(tmp_path, switokd_command, *words, seconds=60, **env)
        assert (code, "the call has none" in err) == (2, True), err
        others = tmp_path / "others"
        assert call(tmp_path, switokd_command, "certificates", str(others), seconds=60)[0] == 0
        for wrong, code, said in (
            ({"SWITOKD_TLS_CA": ""}, 4, "asks for TLS: set SWITOKD_TLS_CA to the file"),
            ({"SWITOKD_TLS_CA": str(others / "ca.crt")}, 4, "not issued by SWITOKD_TLS_CA ("),
            ({"SWITOKD_TLS_CERTIFICATE": ""}, 4, "SWITOKD_TLS_CERTIFICATE"),
            ({"SWITOKD_TLS_CA": "none"}, 2, "SWITOKD_TLS_CA: none cannot be read"),
            ({"SWITOKD_TOKEN_FILE": "none"}, 2, "SWITOKD_TOKEN_FILE: none cannot be read"),
        ):
            found, _, err = call(tmp_path, switokd_command, *words, seconds=60, **{**env, **wrong})
            assert (found, said in err.splitlines()[-1]) == (code, True), err
        env["SWITOKD_TOKEN"] = (certs / "operator.token").read_text().strip()
        code, out, err = call(tmp_path, switokd_command, *words, seconds=60, **env)
        assert code == 0, err
        assert json.loads(out)["runs"] == []
        options = [o.replace("127.0.0.1:50051", served.grpc) for o in printed["runs"]]
        code, out, err = call(tmp_path, switokd_command, "runs", *options, "--json", seconds=60)
        assert (code, json.loads(out)["runs"]) == (0, []), err
